"""The catalogue of a model and its items' tokens: computed from the catalogue and kept, or read from a store."""

from __future__ import annotations

import torch

from speeder.data.catalogue import ItemCatalogue
from speeder.data.fingerprints import ids_hash
from speeder.errors import SpeederError
from speeder.model.content import Kept, autocast_dtype, content_of, for_later, hash_of
from speeder.model.item_pairs import ItemPairs
from speeder.model.item_store import ItemStore
from speeder.model.kv_cache import SharedPrefix
from speeder.model.mrc import MRC


class ItemTokensMixin:
    """The catalogue and the item tokens of [`SpeederForCausalLM`]."""

    item_pairs: ItemPairs | None
    item_store: ItemStore | None
    _checked_store: tuple[ItemStore, Kept[None]] | None
    _catalogue: ItemCatalogue | None = None
    _kept_tokens: Kept[tuple[torch.Tensor, torch.Tensor, bytes | None]]
    _kept_prefix: Kept[SharedPrefix]

    @property
    def catalogue(self) -> ItemCatalogue | None:
        """The items; to assign another catalogue is to call `set_catalogue`."""
        return self._catalogue

    @catalogue.setter
    def catalogue(self, catalogue: ItemCatalogue) -> None:
        self.set_catalogue(catalogue)

    def set_catalogue(self, catalogue: ItemCatalogue) -> None:
        """Set the catalogue of the items with ids from `V` on.

        Raises:
            SpeederError: it lacks a modality that this model reads; an item has no modality; or the model has a learned
                embedding per item or item pairs, and the catalogue does not begin with the items of their rows.
        """
        warm = self._check_warm_items(catalogue)
        if self.item_pairs is not None:
            self.item_pairs.check_catalogue(catalogue)
        for part in self._copies_of_mrc():
            part.set_catalogue(catalogue)
        self.config.warm_items_hash = warm
        self._catalogue = catalogue
        self.config.num_items = len(catalogue)
        self.item_store = self._checked_store = None
        self.clear_cache()

    def _copies_of_mrc(self) -> list[MRC]:
        """MRC; and each adapter's own, where PEFT has made some."""
        return [part for part in self.mrc.modules() if isinstance(part, MRC)]

    def _check_warm_items(self, catalogue: ItemCatalogue) -> str | None:
        """Rows of the learned embedding belong to items by place: another order would give them to other items.

        Returns the hash of these items' ids.
        """
        count = self.config.num_warm_items
        if count == 0:
            return self.config.warm_items_hash
        here = ids_hash(catalogue.ids[:count])
        known = self.config.warm_items_hash  # None: new, or of version 0.1.0, which noted none
        if known not in (None, here):
            raise SpeederError(
                f"catalogue: expected one that begins with the {count} items that this model has a learned embedding "
                "of, in the same order; new items come after them (add_items)"
            )
        return here

    def set_trained_items(self, trained: torch.Tensor) -> None:
        """Tell which items training reads or predicts. The learned embedding of the others is left out of their tokens.

        `speeder.train` calls it; without a call every row counts as trained.

        Args:
            trained: `(I,)` bool.

        Raises:
            ValueError: it has another shape or dtype.
            SpeederError: the model has no catalogue.
        """
        if trained.dtype != torch.bool or tuple(trained.shape) != (self.config.num_items,):
            raise ValueError(
                f"trained: expected ({self.config.num_items},) bool, got {tuple(trained.shape)} {trained.dtype}"
            )
        if self.catalogue is None:
            raise SpeederError("set_trained_items: expected a model with a catalogue")
        if self.config.item_embedding:
            for part in self._copies_of_mrc():
                part.item_trained.copy_(trained[: len(part.item_trained)])

    def use_item_store(self, store: ItemStore | None) -> None:
        """Read item tokens from a store, such as `TokenShards` or `ItemIndex`, instead of compressing the catalogue.

        It is used in evaluation mode, until training mode, another catalogue or None.

        Raises:
            SpeederError: the store was made with other weights or another catalogue.
        """
        checked = None if store is None else (store, Kept())
        if checked is not None:
            checked[1].get(content_of(self.mrc), lambda: self._check_store(store))
        self.clear_cache()
        self.item_store = None if self.training else store
        self._checked_store = checked

    def item_table(self) -> torch.Tensor | ItemStore:
        """The store of item tokens, if one is in use, else the whole catalogue's `(I, K, H)` tokens; to be read only.

        Raises:
            SpeederError: MRC has changed, and the store was made with other weights.
        """
        if self.item_store is None:
            return self.item_tokens()[0]
        store, checked = self.item_store, self._checked_store
        if checked is not None and checked[0] is store:
            checked[1].get(content_of(self.mrc), lambda: self._check_store(store))
        return store

    @torch.no_grad()
    def _check_store(self, store: ItemStore) -> None:
        """Raise `SpeederError` unless a store has this model's weights and catalogue, and MRC's tokens of a few."""
        store.check(self)
        rows = torch.linspace(0, self.config.num_items - 1, 4, device=self.device).long().unique()
        with self.evaluating():
            mine, kept = self.mrc(rows)[0].float(), store.rows(rows).tokens.float()
        if not torch.allclose(mine, kept, rtol=0.02, atol=0.02 * float(mine.abs().max())):
            raise SpeederError(
                "item store: expected the tokens that MRC computes, got others, though weights and catalogue are the "
                "same: a hook, an adapter or a changed feature is in between; make the store again, or call "
                "use_item_store(None)"
            )

    def item_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Compress the whole catalogue.

        In evaluation mode without gradients the result is kept. It is used again as long as the content of MRC is the
        same: every weight is read and compared by its hash, however it was written.

        Returns:
            tokens `(I, K, H)` and gates `(I, M)` float32, columns in the order of `config.gate_names`. They may be the
            kept ones: if something is written into them, the next call computes them anew.
        """
        if self.training or torch.is_grad_enabled():
            return self.mrc.whole()
        device, content = self.device.type, content_of(self.mrc)
        if content is not None:
            content += (autocast_dtype(device),)
        with for_later(device):
            if content is None:
                return self.mrc.whole()
            tokens, gates, known = self._kept_tokens.get(content, self._compressed)
            # a caller may have written into them, such as by numpy, of which torch's versions do not tell
            if hash_of(tokens, gates) != known:
                self._kept_tokens.clear()
                tokens, gates, _ = self._kept_tokens.get(content, self._compressed)
        return tokens, gates

    def _compressed(self) -> tuple[torch.Tensor, torch.Tensor, bytes | None]:
        tokens, gates = self.mrc.whole()
        return tokens, gates, hash_of(tokens, gates)

    def clear_cache(self) -> None:
        """Free what is kept between calls: the item tokens, and the states of the text before histories.

        It is not needed for right results: what is kept is compared with the model's content before it is used. Only a
        catalogue must not be changed in place: set another one.
        """
        self._kept_tokens.clear()
        self._kept_prefix.clear()
