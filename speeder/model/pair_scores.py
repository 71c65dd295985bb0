"""What the item pairs add to a model's scores by `config.pair_weight`: after histories, and at a batch's positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csr_array
from transformers import Cache

from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError
from speeder.model.config import SpeederConfig
from speeder.model.item_pairs import ItemPairs
from speeder.model.packing import check_integers

if TYPE_CHECKING:
    from speeder.recipes.neighbours import ItemPairsConfig


class PairScoresMixin:
    """The item pairs of [`SpeederForCausalLM`]."""

    config: SpeederConfig
    catalogue: ItemCatalogue | None
    item_pairs: ItemPairs | None = None  # of training; looked up where `config.pair_weight` is not 0

    def set_item_pairs(
        self, training_sequences: Sequence[Sequence[int]], config: ItemPairsConfig | None = None
    ) -> None:
        """Count the pairs of items that are near each other in users' sequences, such as `data.split.training()`.

        They take part in scores by `config.pair_weight`, and are saved with the model. A recipe with `pairs: true`
        counts them and chooses the weight.

        Raises:
            IndexError: an item outside the catalogue. TypeError: an item is not an integer.
        """
        self.item_pairs = ItemPairs.of_sequences(training_sequences, self.catalogue, config)

    def pair_scores(self, histories: Sequence[Sequence[int]]) -> csr_array | None:
        """What is added to the scores after histories of item indices: `(n, I)` float32; None without a `pair_weight`.

        Raises:
            SpeederError: there are no item pairs.
        """
        if not self.config.pair_weight:
            return None
        read = [history[-self.config.max_history :] for history in histories]
        return self._weighted(self._counted_pairs().rows(read, self.config.num_items))

    def pair_scores_at(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        past_ids: torch.Tensor | None,
    ) -> csr_array:
        """What is added to the logits of each position: `(B * S, I)` float32. Arguments are those of `forward`, checked
        before.

        Raises:
            SpeederError: there are no item pairs.
        """
        pairs = self._counted_pairs()
        return self._weighted(
            pairs.at_positions(input_ids, self.config, attention_mask, cu_seqlens, past_ids)
        )

    def _checked_past_ids(
        self, past_ids: torch.Tensor | None, batch: int, cache: Cache | None
    ) -> torch.Tensor | None:
        """The ids of the cache's tokens, `(B, past)`; None for an empty cache. Raises where the item pairs are missing,
        too: before the cache takes anything in."""
        self._counted_pairs()
        past = cache.get_seq_length() if cache is not None else 0
        if past == 0:
            return None
        if past_ids is None or tuple(past_ids.shape) != (batch, past):
            got = None if past_ids is None else tuple(past_ids.shape)
            raise ValueError(
                f"past_ids: expected ({batch}, {past}) beside a cache of {past} tokens, as pair_weight is not 0, "
                f"got {got}"
            )
        check_integers("past_ids", past_ids)
        low, high = past_ids.aminmax()
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"past_ids: expected ids in 0..{self.config.vocab_size - 1}, got {int(low)}..{int(high)}"
            )
        return past_ids

    def _counted_pairs(self) -> ItemPairs:
        if self.item_pairs is None:
            raise SpeederError(
                f"pair_weight: expected 0 without item pairs, got {self.config.pair_weight}; count them by "
                "model.set_item_pairs(data.split.training()), which a checkpoint has not"
            )
        return self.item_pairs

    def _weighted(self, added: csr_array) -> csr_array:
        added.data *= np.float32(self.config.pair_weight)
        return added
