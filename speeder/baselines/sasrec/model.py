"""SASRec trained with cross-entropy over the whole catalogue: the sequential baseline, tuned to be strong.

A causal pre-norm transformer over item embeddings with learned positions; scores are dot products with the same item
embeddings. The architecture is that of Kang and McAuley (2018, arXiv 1808.09781). The full softmax in place of its
sampled binary loss makes it a strong baseline (Klenitskiy and Vasilev 2023, arXiv 2309.07602).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speeder.baselines.sequential.base import SequentialModel, pad
from speeder.recipes.sasrec import SASRecConfig


class SASRec(SequentialModel):
    """The model. ``fit_sasrec`` makes a trained one; see `SequentialModel`."""

    name, label, config_class = "sasrec", "SASRec (cross-entropy)", SASRecConfig

    def __init__(self, num_items: int, config: SASRecConfig | None = None) -> None:
        super().__init__(num_items, config)
        config = self.config
        self.positions = nn.Embedding(config.max_length, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        for embedding in (self.items, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, items_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Items (B, L) int64, padded on the right with any item -> hidden states (B, L, hidden_size).

        Attention is causal, so padding on the right does not affect a position. Positions count from a sequence's end,
        so the predicting position is always one that occurs in training, even if histories have become longer.
        """
        steps_L = torch.arange(items_BL.shape[1], device=items_BL.device)
        from_end_BL = (lengths_B[:, None] - 1 - steps_L).clamp_min(0)
        # as in the paper's code: else the blocks' outputs drown the items
        scale = self.config.hidden_size**0.5
        hidden = self.dropout(self.items(items_BL) * scale + self.positions(from_end_BL))
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)

    def last_states(self, items_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """See `SequentialModel`."""
        rows_B = torch.arange(len(items_BL), device=items_BL.device)
        return self(items_BL, lengths_B)[rows_B, lengths_B - 1]

    def examples(self, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The windows: no position sees a later one, so one pass predicts every item but the first."""
        return list(windows)

    def states(self, examples: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """A batch of windows -> the state (n, hidden_size) before every item but the first, and these items (n,)."""
        device = self.items.weight.device
        lengths = torch.tensor([len(window) - 1 for window in examples])
        items_BL = pad(examples)
        real = torch.arange(items_BL.shape[1] - 1) < lengths[:, None]
        targets = items_BL[:, 1:][real].to(device)
        # padding never meets the wide product with the items
        return self(items_BL[:, :-1].to(device), lengths.to(device))[real.to(device)], targets


class _Block(nn.Module):
    """Pre-norm causal attention and a GELU feed-forward layer, each with a residual connection."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm, self.forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        batch, length, _ = x_BLC.shape
        qkv = self.qkv(self.attention_norm(x_BLC)).view(batch, length, 3, self.heads, -1)
        q_BHLD, k_BHLD, v_BHLD = qkv.permute(2, 0, 3, 1, 4)
        # No dropout inside the attention: it would cost the fused kernel.
        mixed_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, is_causal=True)
        x_BLC = x_BLC + self._drop(self.out(mixed_BHLD.transpose(1, 2).flatten(2)))
        return x_BLC + self._drop(self.down(F.gelu(self.up(self.forward_norm(x_BLC)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)
