"""Tokens of some items alone, where those of the whole catalogue are too many to hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class ItemRows:
    """What a pass reads or scores of a catalogue.

    Attributes:
        items: `(U,)` int64 item indices, rising, each once.
        tokens: `(U, K, H)` their tokens.
    """

    items: torch.Tensor
    tokens: torch.Tensor

    def places(self, items: torch.Tensor) -> torch.Tensor:
        """Where items stand in `tokens`; they must be among `self.items`."""
        return torch.searchsorted(self.items, items)


class ItemStore(Protocol):
    """Item tokens and a search among them that do not live in the model, such as `TokenShards` and `ItemIndex`."""

    def rows(self, items: torch.Tensor) -> ItemRows:
        """The tokens of `(n,)` items, on their device."""

    def topk(
        self, queries: torch.Tensor, k: int, seen: Sequence[Sequence[int]] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(n, k)` float32 scores, falling, and int64 items of `(n, H)` queries, without those that each has seen."""

    def vectors(self) -> Iterator[tuple[int, torch.Tensor]]:
        """All items in parts: the first item of a part, and the `(n, H)` vectors that its items are scored by."""


def scoring_vectors(tokens: torch.Tensor) -> torch.Tensor:
    """`(I, K, H)` tokens to the `(I, H)` vectors, in their dtype, that items are scored by: the token itself, or the
    RMS-normalised mean of several."""
    if tokens.shape[1] == 1:
        return tokens[:, 0]
    return F.rms_norm(tokens.mean(dim=1), tokens.shape[-1:], eps=1e-6)


def seen_table(seen: Sequence[Sequence[int]] | None, rows: int, device: torch.device) -> torch.Tensor:
    """Lists of items as `(n, L)` int64, -1 where a list is shorter."""
    longest = max(map(len, seen), default=0) if seen is not None else 0
    table = [[*row, *[-1] * (longest - len(row))] for row in seen] if longest else [[]] * rows
    return torch.tensor(table, dtype=torch.int64, device=device).reshape(rows, longest)
