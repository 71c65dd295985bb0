"""Tokens of some items, if those of the whole catalogue are too many to hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

from speeder.data.item_indices import item_indices


@dataclass(frozen=True)
class ItemRows:
    """The items that a pass reads or scores.

    Attributes:
        items: `(U,)` int64 item indices, ascending, each once.
        tokens: `(U, K, H)` their tokens.
    """

    items: torch.Tensor
    tokens: torch.Tensor

    def places(self, items: torch.Tensor) -> torch.Tensor:
        """The rows of items in `tokens`; the items must be in `self.items`."""
        return torch.searchsorted(self.items, items)


class ItemStore(Protocol):
    """Item tokens outside the model, and a search among them, such as `TokenShards` and `ItemIndex`."""

    def rows(self, items: torch.Tensor) -> ItemRows:
        """The tokens of `(n,)` items, on their device."""

    def topk(
        self, queries: torch.Tensor, k: int, seen: Sequence[Sequence[int]] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(n, k)` float32 scores, descending, and int64 items for `(n, H)` queries, without each query's seen
        items."""

    def check(self, model: nn.Module) -> None:
        """Raise `SpeederError` unless the tokens are those of the model's MRC as it is now."""

    def vectors(self) -> Iterator[tuple[int, torch.Tensor]]:
        """All items in parts: the first item of a part, and the `(n, H)` scoring vectors of its items."""


def scoring_vectors(tokens: torch.Tensor) -> torch.Tensor:
    """`(I, K, H)` item tokens to `(I, H)` scoring vectors, in their dtype: the token itself, or the RMS-normalised
    mean of several."""
    if tokens.shape[1] == 1:
        return tokens[:, 0]
    return F.rms_norm(tokens.mean(dim=1), tokens.shape[-1:], eps=1e-6)


def vectors_of(vectors: torch.Tensor | ItemStore, items: torch.Tensor) -> torch.Tensor:
    """The `(n, H)` scoring vectors of `(n,)` items, of `(I, H)` vectors or of a store."""
    if isinstance(vectors, torch.Tensor):
        return vectors[items]
    rows = vectors.rows(items)
    return scoring_vectors(rows.tokens)[rows.places(items)]


def seen_table(seen: Sequence[Sequence[int]] | None, rows: int, device: torch.device) -> torch.Tensor:
    """Lists of items as `(n, L)` int64, padded with -1; raises `TypeError` for an item that is no integer."""
    seen = None if seen is None else [item_indices("seen", row) for row in seen]
    longest = max(map(len, seen), default=0) if seen is not None else 0
    table = [[*row, *[-1] * (longest - len(row))] for row in seen] if longest else [[]] * rows
    return torch.tensor(table, dtype=torch.int64, device=device).reshape(rows, longest)


def hide(scores: torch.Tensor, items: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """`(n, c)` scores, -inf for each row's `(n, L)` hidden items."""
    for column in hidden.unbind(dim=1):
        scores = scores.masked_fill(items == column[:, None], -torch.inf)
    return scores


def best(scores: torch.Tensor, items: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` best of `(n, c)`; equal scores keep their order."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), items.gather(1, order)
