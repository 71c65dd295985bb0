"""Ranks of targets among all items, by one pass that compresses the catalogue piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.sparse import csc_array, csr_array

from speeder.model.item_store import ItemRows, scoring_vectors, seen_table
from speeder.model.queries import Queries

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
    return _ranks(model, histories, targets, queries_on_demand(model, histories), [1.0])[0]


@torch.no_grad()
def ranks_by_weight(
    model: SpeederForCausalLM,
    histories: Sequence[Sequence[int]],
    targets: np.ndarray,
    weights: Sequence[float],
) -> np.ndarray:
    """As `streamed_ranks` for each of `(w,)` weights of the item pairs, by one pass over the dense scores.

    Returns:
        `(w, n)` int64.

    Raises:
        SpeederError: there are no item pairs.
    """
    before, model.config.pair_weight = model.config.pair_weight, 1.0
    try:
        queries = queries_on_demand(model, histories)
    finally:
        model.config.pair_weight = before
    return _ranks(model, histories, targets, queries, weights)


def queries_on_demand(model: SpeederForCausalLM, histories: Sequence[Sequence[int]]) -> Queries:
    """The queries of histories, without ever compressing the whole catalogue."""
    with model.evaluating():
        before, model.item_store = model.item_store, ReadOnDemand(model)
        try:
            return Queries.cat(model.user_states(histories))
        finally:
            model.item_store = before


def _ranks(
    model: SpeederForCausalLM,
    histories: Sequence[Sequence[int]],
    targets: np.ndarray,
    queries: Queries,
    weights: Sequence[float],
) -> np.ndarray:
    """`(w, n)` ranks by the dense scores and so many times what is added to them."""
    dense, added = queries.dense, queries.added
    device = dense.device
    with model.evaluating():
        wanted = torch.from_numpy(targets).to(device)
        hidden = seen_table([sorted({*map(int, history)}) for history in histories], len(queries), device)
        items, places = torch.unique(wanted, return_inverse=True)
        own = torch.cat([scoring_vectors(model.mrc(rows)[0]).float() for rows in items.split(_ROWS)])
        own_scores = (dense * own[places]).sum(dim=1)
        own_added = torch.zeros_like(own_scores)
        if added is not None:
            own_added = torch.from_numpy(added[np.arange(len(targets)), targets]).to(own_added)
            added = csc_array(added)  # cut by items
        better = torch.zeros(len(weights), len(queries), dtype=torch.int64, device=device)
        start = 0
        for tokens, _ in model.mrc.pieces():
            vectors = scoring_vectors(tokens).float()
            more = None if added is None else csr_array(added[:, start : start + len(vectors)])
            for rows in torch.arange(len(queries), device=device).split(_ROWS):
                scores = dense[rows] @ vectors.T
                pairs = 0.0
                if more is not None:
                    pairs = torch.from_numpy(more[rows.cpu().numpy()].toarray()).to(device)
                columns = torch.cat([hidden[rows], wanted[rows, None]], dim=1) - start
                inside = (columns >= 0) & (columns < len(vectors))
                row, place = inside.nonzero(as_tuple=True)
                for number, weight in enumerate(weights):
                    least = own_scores[rows] + weight * own_added[rows]
                    at_least = scores + weight * pairs >= least[:, None]
                    at_least[row, columns[row, place]] = False
                    better[number, rows] += at_least.sum(dim=1)
            start += len(vectors)
        ranks = torch.where((hidden == wanted[:, None]).any(dim=1), model.config.num_items, better + 1)
    return ranks.cpu().numpy()
