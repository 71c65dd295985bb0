"""Item pairs: which items are near each other in training histories. They are counted; nothing is trained.

A model adds them to its scores: `score(i) = query · vector(i) + pair_weight · Σ_j decay^age(j) · P[item_j, i]`, over
the newest items of the history. A row of `P` has few entries, so the sum is sparse; `queries.py` merges it exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from scipy.sparse import coo_array, csr_array, diags_array

from speeder.data.catalogue import ItemCatalogue
from speeder.data.fingerprints import ids_hash, training_hash
from speeder.data.item_indices import item_array
from speeder.errors import SpeederError
from speeder.io.files import read_json
from speeder.io.tensors import load_tensors, save_tensors

if TYPE_CHECKING:  # recipes are checked by pydantic, which a model alone need not load
    from speeder.model.config import SpeederConfig
    from speeder.recipes.neighbours import ItemPairsConfig

FILES = ("item_pairs.safetensors", "item_pairs.json")  # the JSON file, written last, has the other's hash
ARRAYS = ("data", "indices", "indptr")  # of a matrix in compressed rows


def count_pairs(
    training_sequences: Sequence[Sequence[int]], num_items: int, config: ItemPairsConfig
) -> csr_array:
    """`(I, I)` float32: entry (i, j) is what item i of a history gives to j.

    Every pair of items of a user, j being `d` <= `window` places after i, adds `window_decay ** (d - 1)` to (i, j), and
    `backward` times as much to (j, i). The sum is divided by the roots of both items' counts + 1, as frequent
    items are near everything.

    Raises:
        IndexError: an item outside the catalogue.
    """
    items, lengths = _flat("training_sequences", training_sequences, num_items)
    users, longest = np.repeat(np.arange(len(lengths)), lengths), lengths.max(initial=0)
    total = csr_array((num_items, num_items), dtype=np.float64)
    for distance in range(1, min(config.window, longest - 1) + 1):
        one_user = users[distance:] == users[:-distance]
        pair = items[:-distance][one_user], items[distance:][one_user]
        weights = np.full(len(pair[0]), config.window_decay ** (distance - 1))
        forward = coo_array((weights, pair), shape=total.shape).tocsr()  # adds up a pair that occurs twice
        total = total + forward + config.backward * forward.T.tocsr()
    scale = diags_array(1 / np.sqrt(np.bincount(items, minlength=num_items) + 1.0))
    pairs = csr_array(scale @ total @ scale, dtype=np.float32)
    pairs.sum_duplicates()
    return pairs


def recent_items(histories: Sequence[Sequence[int]], newest: int, decay: float, num_items: int) -> csr_array:
    """`(n, num_items)` float32: the weights of each history's newest items, `decay` to the power of the number of newer
    ones.

    Raises:
        TypeError: an item is not an integer. IndexError: an item outside the catalogue.
    """
    items, lengths = _flat("histories", histories, num_items)
    ends = np.cumsum(lengths)
    return newest_before(items, ends - lengths, ends, newest, decay, num_items)


def newest_before(
    items: np.ndarray, first: np.ndarray, end: np.ndarray, newest: int, decay: float, num_items: int
) -> csr_array:
    """`(n, num_items)` float32: the weights of the newest of `items[first:end]`, for each of `(n,)` ranges."""
    newest = min(newest, int((end - first).max(initial=0)))
    age = np.arange(newest)[
        ::-1
    ]  # the oldest first: the order in which an item that occurs twice is added up
    place = end[:, None] - 1 - age
    row, column = np.nonzero(place >= first[:, None])
    values = np.power(decay, age[column]).astype(np.float32)
    found = items[place[row, column]]
    return csr_array((values, (row, found)), shape=(len(end), num_items))


def _flat(name: str, sequences: Sequence[Sequence[int]], num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """All items end to end, and the lengths of the sequences."""
    arrays = [item_array(name, sequence) for sequence in sequences]
    items = np.concatenate([np.empty(0, dtype=np.int64), *arrays])
    if len(items) and not 0 <= items.min() <= items.max() < num_items:
        raise IndexError(f"{name}: expected items in 0..{num_items - 1}, got {items.min()}..{items.max()}")
    return items, np.array([len(array) for array in arrays], dtype=np.int64)


def _count_before(marked: np.ndarray) -> np.ndarray:
    """`(T + 1,)`: how many of `(T,)` are marked before each place, and in all."""
    return np.concatenate([[0], np.cumsum(marked)])


class ItemPairs:
    """The counted pairs of a catalogue's items.

    Rows belong to items by place, so a catalogue must begin with the counted items, in the same order. Items that were
    added later have no pairs.

    Args:
        config: how they were counted, and how much of a history is looked up.
        pairs: `(I, I)` float32, none below 0; see `count_pairs`.
        items_hash: `ids_hash` of the items.
        training_hash: hash of the sequences that were counted, for the leak check.

    Raises:
        ValueError: `pairs` has another shape, or an entry that is below 0 or not finite.
    """

    def __init__(self, config: ItemPairsConfig, pairs: csr_array, *, items_hash: str, training_hash: str):
        if pairs.shape[0] != pairs.shape[1] or pairs.dtype != np.float32:
            raise ValueError(f"pairs: expected (I, I) float32, got {pairs.shape} {pairs.dtype}")
        if not (np.isfinite(pairs.data) & (pairs.data >= 0)).all():
            raise ValueError("pairs: expected finite numbers of at least 0")
        self.config, self.pairs = config, pairs
        self.items_hash, self.training_hash = items_hash, training_hash

    @classmethod
    def of_sequences(
        cls,
        training_sequences: Sequence[Sequence[int]],
        catalogue: ItemCatalogue,
        config: ItemPairsConfig | None = None,
    ) -> ItemPairs:
        """Count the pairs of sequences, such as `data.split.training()`.

        Raises:
            IndexError: an item outside the catalogue. TypeError: an item is not an integer.
        """
        from speeder.recipes.neighbours import ItemPairsConfig

        config = config or ItemPairsConfig()
        pairs = count_pairs(training_sequences, len(catalogue), config)
        hashed = training_hash(training_sequences)
        return cls(config, pairs, items_hash=ids_hash(catalogue.ids), training_hash=hashed)

    @property
    def num_items(self) -> int:
        """`I`, the items that were counted."""
        return self.pairs.shape[0]

    def check_catalogue(self, catalogue: ItemCatalogue) -> None:
        """Raise `SpeederError` unless a catalogue begins with the counted items, in the same order."""
        if len(catalogue) < self.num_items or ids_hash(catalogue.ids[: self.num_items]) != self.items_hash:
            raise SpeederError(
                f"catalogue: expected one that begins with the {self.num_items} items whose pairs this model has "
                "counted, in the same order; new items come after them (add_items)"
            )

    def rows(self, histories: Sequence[Sequence[int]], num_items: int | None = None) -> csr_array:
        """What histories add to scores, without a weight: `(n, num_items)` float32, empty for an empty history.

        Args:
            histories: item indices, oldest first.
            num_items: of the catalogue, with items that were added later; None: `I`.

        Raises:
            TypeError: an item is not an integer. IndexError: an item outside the catalogue.
        """
        total = self.num_items if num_items is None else num_items
        return self._looked_up(
            recent_items(histories, self.config.pair_history, self.config.pair_decay, total)
        )

    def _looked_up(self, read: csr_array) -> csr_array:
        """The sums of the pairs of `(n, num_items)` weighted items, of the same shape."""
        found = csr_array(read[:, : self.num_items] @ self.pairs)
        found.resize(read.shape)
        found.sort_indices()
        return found

    def at_positions(
        self,
        input_ids: torch.Tensor,
        config: SpeederConfig,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        past_ids: torch.Tensor | None = None,
    ) -> csr_array:
        """What the pairs add to the logits of each position, whose history ends with the position's own token:
        `(B * S, I)` float32, without a weight; nothing at padding.

        Args:
            input_ids: `(B, S)` ids of the extended vocabulary; `(1, T)` with `cu_seqlens`.
            attention_mask: `(B, past + S)`, 0 at padding.
            past_ids: `(B, past)` ids before `input_ids`.
        """
        whole = input_ids if past_ids is None else torch.cat([past_ids.to(input_ids), input_ids], dim=1)
        ids, width = whole.flatten().cpu().numpy(), whole.shape[1]
        tokens = np.arange(len(ids))
        if cu_seqlens is None:
            row_start = tokens // width * width
        else:
            borders = cu_seqlens.cpu().numpy().astype(np.int64)
            row_start = np.repeat(borders[:-1], np.diff(borders))
        read = np.ones(len(ids), dtype=bool)
        if attention_mask is not None:
            read = attention_mask.flatten().cpu().numpy().astype(bool)
        is_item = read & (ids >= config.text_vocab_size)
        before = _count_before(is_item)
        # the first of each item's tokens
        begins = is_item & ((before[:-1] - before[row_start]) % config.tokens_per_item == 0)
        before = _count_before(begins)
        first, end = before[row_start], np.where(read, before[1:], before[row_start])
        asked = tokens.reshape(-1, width)[:, width - input_ids.shape[1] :].flatten()
        items = ids[begins] - config.text_vocab_size
        newest, decay = self.config.pair_history, self.config.pair_decay
        return self._looked_up(
            newest_before(items, first[asked], end[asked], newest, decay, config.num_items)
        )

    def save(self, folder: str | Path) -> None:
        """Write `item_pairs.safetensors` and `item_pairs.json` into a folder, each whole or not at all."""
        tensors = {name: torch.from_numpy(getattr(self.pairs, name)) for name in ARRAYS}
        record = {
            "config": asdict(self.config),
            "num_items": self.num_items,
            "items_hash": self.items_hash,
            "training_hash": self.training_hash,
        }
        save_tensors(Path(folder), tensors, record, "tensors", FILES)

    @classmethod
    def load(cls, folder: str | Path) -> ItemPairs:
        """Read what `save` wrote.

        Raises:
            SpeederError: a file is missing or damaged, or the two do not belong together.
        """
        folder = Path(folder)
        try:
            saved = read_json(folder / FILES[1])
            tensors = load_tensors(folder, saved["tensors"], FILES)
            shape = (saved["num_items"], saved["num_items"])
            pairs = csr_array(tuple(tensors[name].numpy() for name in ARRAYS), shape=shape)
            pairs.check_format()
            hashes = {name: str(saved[name]) for name in ("items_hash", "training_hash")}
            from speeder.recipes.neighbours import ItemPairsConfig

            return cls(ItemPairsConfig(**saved["config"]), pairs, **hashes)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise SpeederError(f"{folder}: no readable item pairs: {error}") from error
