"""The tile product of the two ops over all items: rows of hidden states against rows of items."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def score_tile(
    rows, rows_left, items, items_left, H, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Dot products `(BLOCK_N, BLOCK_I)` in float32 of the rows from `rows` on with those from `items` on, of H columns.

    `*_left` rows exist; what lies behind them is not read and counts as zeros. The pointers come advanced to the
    tile, so that offsets within it fit 32 bits.
    """
    row, item = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_I)
    in_rows, in_items = (row < rows_left)[:, None], (item < items_left)[None, :]
    scores = tl.zeros((BLOCK_N, BLOCK_I), tl.float32)
    for first in range(0, H, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        inside = column < H
        h = tl.load(rows + row[:, None] * H + column[None, :], mask=in_rows & inside[None, :], other=0.0)
        x = tl.load(items + item[None, :] * H + column[:, None], mask=in_items & inside[:, None], other=0.0)
        scores = tl.dot(h, x, scores, input_precision="ieee")
    return scores


def pad_columns(x: Tensor) -> Tensor:
    """Zeros behind the last column, up to a multiple of 16: then rows are read 16 bytes at a time and straight into
    shared memory. Other widths would go element by element through registers, which they overflow. Widths of
    language models are multiples of 16 anyway, and are not copied."""
    missing = -x.shape[1] % 16
    return torch.nn.functional.pad(x, (0, missing)) if missing else x
