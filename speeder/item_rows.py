"""Tokens of some items alone, where those of the whole catalogue are too many to hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
