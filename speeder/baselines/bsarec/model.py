"""BSARec trained with cross-entropy over the whole catalogue: self-attention beside a low-pass filter.

The model is that of Shin et al. (AAAI 2024, arXiv 2312.10325), as their code has it. The filter mixes all positions of
a history, later ones into earlier ones too. So every prefix of a history is an example of its own, read alone, and
predicts its next item from its last position: no state has seen what it is to predict.

Two things differ from their code. Places before a history's first item are empty (zero), where theirs hold the padding
item's vector. And all items of the training part are predicted, where theirs are a user's last ``max_length``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speeder.baselines.sequential.base import SequentialModel, pad
from speeder.recipes.bsarec import BSARecConfig

_EPSILON = 1e-12  # of layer norms, as in the authors' code


class BSARec(SequentialModel):
    """The model. `fit_bsarec` makes a trained one; see `SequentialModel`."""

    name, label, config_class = "bsarec", "BSARec", BSARecConfig
    config: BSARecConfig

    def __init__(self, num_items: int, config: BSARecConfig | None = None) -> None:
        super().__init__(num_items, config)
        config = self.config
        self.positions = nn.Embedding(config.max_length, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=_EPSILON)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.register_buffer("low_pass", low_pass_matrix(config.max_length, config.c), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def examples(self, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Every prefix of two items or more: the last one is predicted from the others."""
        return [window[:end] for window in windows for end in range(2, len(window) + 1)]

    def states(self, examples: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """A batch of prefixes -> (n, hidden_size), of all but each one's last item, and those items (n,)."""
        device = self.items.weight.device
        lengths = torch.tensor([len(example) - 1 for example in examples], device=device)
        targets = torch.from_numpy(np.array([example[-1] for example in examples]))
        states = self.last_states(pad([example[:-1] for example in examples]).to(device), lengths)
        return states, targets.to(device)

    def last_states(self, items_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Histories (B, L) int64, padded on the right with any item, L ≤ ``max_length`` -> (B, hidden_size).

        Nothing reads the padding. Positions count from a history's end, as with padding on the left.
        """
        length = items_BL.shape[1]
        steps_L = torch.arange(length, device=items_BL.device)
        last_B = lengths_B - 1
        from_end_BL = (last_B[:, None] - steps_L).clamp_min(0)
        real_B1L = (steps_L < lengths_B[:, None])[:, None]
        # Padding counts as zero in the filter, so only the distance of two items matters, not where a history begins.
        low_BLL = self.low_pass[:length, :length] * real_B1L
        earlier_LL = steps_L <= steps_L[:, None]
        x_BLC = self.dropout(self.norm(self.items(items_BL) + self.positions(from_end_BL)))
        for block in self.blocks[:-1]:
            x_BLC = block(x_BLC, x_BLC, low_BLL, earlier_LL)
        rows_B = torch.arange(len(items_BL), device=items_BL.device)
        # only the last position is read, so the last block makes no other
        last_B1C = x_BLC[rows_B, last_B][:, None]
        return self.blocks[-1](last_B1C, x_BLC, low_BLL[rows_B, last_B][:, None], real_B1L)[:, 0]


class _Block(nn.Module):
    """alpha x filter + (1 - alpha) x attention, then a GELU feed-forward layer; a norm after each residual."""

    def __init__(self, config: BSARecConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.dropout, self.alpha = config.heads, config.dropout, config.alpha
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.root_beta = nn.Parameter(torch.randn(width))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.filter_norm, self.attention_norm, self.forward_norm = (
            nn.LayerNorm(width, eps=_EPSILON) for _ in range(3)
        )

    def forward(self, x_BQC: Tensor, all_BLC: Tensor, low_BQL: Tensor, seen_BQL: Tensor) -> Tensor:
        """States of the positions Q that are made, of all positions; the filter's rows, and what attention may see."""
        low_BQC = low_BQL @ all_BLC
        filtered_BQC = low_BQC + self.root_beta.square() * (x_BQC - low_BQC)
        filtered_BQC = self.filter_norm(self._drop(filtered_BQC) + x_BQC)
        attended_BQC = self.attention_norm(self._drop(self._attend(x_BQC, all_BLC, seen_BQL)) + x_BQC)
        x_BQC = self.alpha * filtered_BQC + (1 - self.alpha) * attended_BQC
        return self.forward_norm(self._drop(self.down(F.gelu(self.up(x_BQC)))) + x_BQC)

    def _attend(self, x_BQC: Tensor, all_BLC: Tensor, seen_BQL: Tensor) -> Tensor:
        q_BHQD = self._split(self.query(x_BQC))
        k_BHLD, v_BHLD = (self._split(each) for each in self.key_value(all_BLC).chunk(2, dim=-1))
        seen = seen_BQL[:, None] if seen_BQL.dim() == 3 else seen_BQL
        dropout = self.dropout if self.training else 0.0
        mixed_BHQD = F.scaled_dot_product_attention(q_BHQD, k_BHLD, v_BHLD, attn_mask=seen, dropout_p=dropout)
        return self.out(mixed_BHQD.transpose(1, 2).flatten(2))

    def _split(self, x_BLC: Tensor) -> Tensor:
        return x_BLC.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def low_pass_matrix(length: int, c: int) -> Tensor:
    """The low-pass filter over ``length`` places as a matrix (length, length), float32.

    It keeps the ``c // 2 + 1`` lowest frequencies of `torch.fft.rfft`, as the authors' code reads c: with their mirror
    images these are c frequencies if c is odd. Row t says what each place gives to place t, and depends on the distance
    of the two alone. So a part of the matrix filters a history that fills a part of the places, the others being zero.
    At these lengths a product with it is faster than two Fourier transforms.
    """
    spectrum = torch.fft.rfft(torch.eye(length, dtype=torch.float64), dim=0)
    spectrum[c // 2 + 1 :] = 0
    return torch.fft.irfft(spectrum, n=length, dim=0).float()
