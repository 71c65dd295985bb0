"""Ranks of targets among all items, by one pass that compresses the catalogue piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from speeder.model.item_store import ItemRows, scoring_vectors, seen_table

if TYPE_CHECKING:
    from speeder.model.modeling import SpeederForCausalLM

_ROWS = 1024  # users whose scores of a piece are held at once


class ReadOnDemand:
    """A store for reading histories only: their items are compressed as they occur."""

    def __init__(self, model: SpeederForCausalLM):
        self._model = model

    def rows(self, items: torch.Tensor) -> ItemRows:
        """The tokens of `(n,)` items."""
        wanted = torch.unique(items)
        return ItemRows(wanted, self._model.mrc(wanted)[0])


@torch.no_grad()
def streamed_ranks(
    model: SpeederForCausalLM, histories: Sequence[Sequence[int]], targets: np.ndarray
) -> np.ndarray:
    """The rank of each history's target among all items that are not in the history, 1 being best.

    As `evaluate`'s "masked" ranks, except that other items with the target's score, up to rounding, may fall on either
    side. Memory grows with the number of histories, not with the catalogue.

    Args:
        histories: item indices, oldest first.
        targets: `(n,)` int64 items.

    Returns:
        `(n,)` int64; the last rank, `I`, for a target that is in its history.
    """
    with model.evaluating():
        before, model.item_store = model.item_store, ReadOnDemand(model)
        try:
            queries = torch.cat(list(model.user_states(histories)))
        finally:
            model.item_store = before
        wanted = torch.from_numpy(targets).to(queries.device)
        hidden = seen_table(
            [sorted({*map(int, history)}) for history in histories], len(queries), queries.device
        )
        items, places = torch.unique(wanted, return_inverse=True)
        own = torch.cat([scoring_vectors(model.mrc(rows)[0]).float() for rows in items.split(_ROWS)])
        own_scores = (queries * own[places]).sum(dim=1, keepdim=True)
        better = torch.zeros_like(wanted)
        start = 0
        for tokens, _ in model.mrc.pieces():
            vectors = scoring_vectors(tokens).float()
            for rows in torch.arange(len(queries), device=queries.device).split(_ROWS):
                at_least = queries[rows] @ vectors.T >= own_scores[rows]
                columns = torch.cat([hidden[rows], wanted[rows, None]], dim=1) - start
                inside = (columns >= 0) & (columns < len(vectors))
                row, place = inside.nonzero(as_tuple=True)
                at_least[row, columns[row, place]] = False
                better[rows] += at_least.sum(dim=1)
            start += len(vectors)
        ranks = torch.where((hidden == wanted[:, None]).any(dim=1), model.config.num_items, better + 1)
    return ranks.cpu().numpy()
