"""item_cross_entropy in Triton: log-sum-exp over tiles of items, never an (N, I) matrix.

The backward goes over chunks of items. A chunk's gradient of the logits is computed once, into at most
`CHUNK_BYTES` (or `CHUNK_ITEMS` columns) of scratch memory, and serves both gradients: three products in all
where two kernels that each compute the logits for themselves need four, or more where a row of H sums does not
fit a program's registers. Programs own what they write, and sums that programs share are added in a fixed
order: no atomics.

Shape letters: N rows, I items, H hidden size, C items of a chunk, S splits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from speeder_kernels.triton import tiles
from speeder_kernels.triton.items.score_tile import pad_columns, score_tile
from speeder_kernels.triton.sum_parts import sum_parts
from speeder_kernels.triton.tiles import cdiv, launch, tile

CHUNK_BYTES = 64 << 20  # much of it stays in the L2 cache of an H100 (50 MB) between the three products
CHUNK_ITEMS = 1024  # at least: below, a product has too few terms to be worth its launch


class Logits(NamedTuple):
    """What logits are made of; in a kernel, a tensor is a pointer."""

    hidden: Tensor  # (N, H)
    item_table: Tensor  # (I, H)
    log_q: Tensor | None  # (I,): what is taken off an item's logit
    scale: float


@triton.jit
def _logit_tile(
    x: Logits, first_row, first_item, N, ITEMS, H,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Logits of one tile `(BLOCK_N, BLOCK_I)`; -inf behind the last item, so that it has no weight."""
    rows = x.hidden + tl.cast(first_row, tl.int64) * H
    items = x.item_table + tl.cast(first_item, tl.int64) * H
    logits = (
        score_tile(rows, N - first_row, items, ITEMS - first_item, H, BLOCK_N, BLOCK_I, BLOCK_H) * x.scale
    )
    item = first_item + tl.arange(0, BLOCK_I)
    if x.log_q is not None:
        logits -= tl.load(x.log_q + item, mask=item < ITEMS, other=0.0)[None, :]
    return tl.where((item < ITEMS)[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=["N", "ITEMS", "TILES"])
def item_cross_entropy_kernel(
    largest_parts, total_parts, x: Logits, N, ITEMS, H, TILES,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program reads TILES tiles of items for BLOCK_N rows: the largest logit, and the sum of exp(logit - largest)."""
    first_row, split = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    start = split * TILES * BLOCK_I
    for first_item in range(start, tl.minimum(start + TILES * BLOCK_I, ITEMS), BLOCK_I):
        logits = _logit_tile(x, first_row, first_item, N, ITEMS, H, BLOCK_N, BLOCK_I, BLOCK_H)
        before = largest
        largest = tl.maximum(largest, tl.max(logits, axis=1))
        base = tl.where(
            largest == float("-inf"), 0.0, largest
        )  # a row of -inf alone: exp(-inf), not exp(NaN)
        total = total * tl.exp(before - base) + tl.sum(tl.exp(logits - base[:, None]), axis=1)
    row = first_row + tl.arange(0, BLOCK_N)
    place = tl.cast(split, tl.int64) * N + row
    tl.store(largest_parts + place, largest, mask=row < N)
    tl.store(total_parts + place, total, mask=row < N)


@triton.jit(do_not_specialize=["N", "ITEMS", "S"])
def combine_loss_kernel(
    loss, lse, largest_parts, total_parts, x: Logits, targets, N, ITEMS, H, S,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The splits' sums, first to last, and the target's own logit: loss and log-sum-exp of BLOCK_N rows.

    NaN is the loss of a target that is no item: nothing is read there.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_batch = row < N
    largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for split in range(S):
        part = tl.load(largest_parts + tl.cast(split, tl.int64) * N + row, mask=in_batch, other=0.0)
        largest = tl.maximum(largest, part)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(S):
        place = tl.cast(split, tl.int64) * N + row
        part = tl.load(largest_parts + place, mask=in_batch, other=0.0)
        total += tl.load(total_parts + place, mask=in_batch, other=0.0) * tl.exp(part - base)
    target = tl.load(targets + row, mask=in_batch, other=-1)
    is_item = (target >= 0) & (target < ITEMS)
    products = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for first in range(0, H, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        inside = is_item[:, None] & (column < H)[None, :]
        h = tl.load(x.hidden + row[:, None] * H + column[None, :], mask=inside, other=0.0)
        item = tl.load(x.item_table + target[:, None] * H + column[None, :], mask=inside, other=0.0)
        products += h.to(tl.float32) * item.to(tl.float32)
    logit = tl.sum(products, axis=1) * x.scale
    if x.log_q is not None:
        logit -= tl.load(x.log_q + target, mask=is_item, other=0.0)
    log_sum = base + tl.log(tl.where(in_batch, total, 1.0))
    tl.store(lse + row, log_sum, mask=in_batch)
    tl.store(loss + row, tl.where(is_item, log_sum - logit, float("nan")), mask=in_batch)


@triton.jit(do_not_specialize=["N", "ITEMS", "START"])
def logit_gradient_kernel(
    grad_logits, grad, targets, lse, x: Logits, N, ITEMS, H, START, C,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One tile of the chunk's `(N, C)`: (probability - 1 where the item is the target) * grad * scale."""
    tiles_of_row = C // BLOCK_I
    first_row = tl.program_id(0) // tiles_of_row * BLOCK_N
    first_column = tl.program_id(0) % tiles_of_row * BLOCK_I
    first_item = START + first_column
    logits = _logit_tile(x, first_row, first_item, N, ITEMS, H, BLOCK_N, BLOCK_I, BLOCK_H)
    row = first_row + tl.arange(0, BLOCK_N)
    in_batch = row < N
    log_sum = tl.load(lse + row, mask=in_batch, other=0.0)
    target = tl.load(targets + row, mask=in_batch, other=-1)
    upstream = tl.load(grad + row, mask=in_batch, other=0.0) * x.scale
    item = first_item + tl.arange(0, BLOCK_I)
    share = tl.exp(logits - log_sum[:, None]) - tl.where(item[None, :] == target[:, None], 1.0, 0.0)
    out = share * upstream[:, None]
    column = first_column + tl.arange(0, BLOCK_I)
    place = row.to(tl.int64)[:, None] * C + column[None, :]
    tl.store(grad_logits + place, out.to(grad_logits.dtype.element_ty), mask=in_batch[:, None])


@triton.jit(do_not_specialize=["N", "ITEMS", "START", "STEPS"])
def grad_hidden_kernel(
    parts, grad_logits, item_table, N, ITEMS, H, START, C, STEPS, ADD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N rows' BLOCK_H columns of its split's part, and sums over STEPS blocks of items of
    the chunk. ADD: earlier chunks are in the part already."""
    first_row, first_column, split = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_H, tl.program_id(2)
    row, column, k = tl.arange(0, BLOCK_N), first_column + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K)
    in_rows, in_columns = (row < N - first_row)[:, None], (column < H)[None, :]
    gradients = grad_logits + tl.cast(first_row, tl.int64) * C
    total = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    # Counted in blocks, so that Triton sees that every block starts at a multiple of 16 bytes.
    for block in range(split * STEPS, tl.minimum((split + 1) * STEPS, C // BLOCK_K)):
        first = block * BLOCK_K
        g = tl.load(gradients + row[:, None] * C + (first + k)[None, :], mask=in_rows, other=0.0)
        items = item_table + tl.cast(START + first, tl.int64) * H
        in_items = (START + first + k < ITEMS)[:, None]
        x = tl.load(items + k[:, None] * H + column[None, :], mask=in_items & in_columns, other=0.0)
        total = tl.dot(g, x, total, input_precision="ieee")
    place = parts + (tl.cast(split, tl.int64) * N + first_row) * H + row[:, None] * H + column[None, :]
    inside = in_rows & in_columns
    if ADD:
        total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, total, mask=inside)


@triton.jit(do_not_specialize=["N", "ITEMS", "START"])
def grad_table_kernel(
    grad_table, grad_logits, hidden, N, ITEMS, H, START, C,
    BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_I items' BLOCK_H columns and sums over all rows, first to last."""
    first_item, first_column = tl.program_id(0) * BLOCK_I, tl.program_id(1) * BLOCK_H
    item, column, k = tl.arange(0, BLOCK_I), first_column + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K)
    in_columns = (column < H)[None, :]
    total = tl.zeros((BLOCK_I, BLOCK_H), tl.float32)
    for first in range(0, N, BLOCK_K):
        in_rows = (k < N - first)[:, None]
        gradients = grad_logits + tl.cast(first, tl.int64) * C + first_item
        g = tl.load(gradients + k[:, None] * C + item[None, :], mask=in_rows, other=0.0)
        rows = hidden + tl.cast(first, tl.int64) * H
        h = tl.load(rows + k[:, None] * H + column[None, :], mask=in_rows & in_columns, other=0.0)
        total = tl.dot(tl.trans(g), h, total, input_precision="ieee")
    first_item += START
    inside = (item < ITEMS - first_item)[:, None] & in_columns
    place = grad_table + tl.cast(first_item, tl.int64) * H + item[:, None] * H + column[None, :]
    tl.store(place, total.to(grad_table.dtype.element_ty), mask=inside)


def _splits(device: torch.device, programs: int, steps: int) -> tuple[int, int]:
    """How many splits share `steps` out, and the steps of each, so that `programs` times that fill the device."""
    share = cdiv(steps, min(steps, cdiv(2 * tiles.processors(device), programs)))
    return cdiv(steps, share), share


def item_cross_entropy(
    hidden: Tensor, item_table: Tensor, targets: Tensor, scale: float, log_q: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss `(N,)` and log-sum-exp `(N,)`; contiguous tensors, int64 targets, float32 log_q.

    The loss of a target that is no item, -100 say, is NaN; where nothing depends on it, the gradients are as without
    the row.
    """
    hidden, item_table = pad_columns(hidden), pad_columns(item_table)
    device, (n, h), i = hidden.device, hidden.shape, item_table.shape[0]
    row = tile(device, "item_cross_entropy", hidden.element_size())
    row_blocks = cdiv(n, row["BLOCK_N"])
    splits, share = _splits(device, row_blocks, cdiv(i, row["BLOCK_I"]))
    largest, total = hidden.new_empty(2, splits, n, dtype=torch.float32)
    x = Logits(hidden, item_table, log_q, scale)
    grid = (row_blocks, splits)
    launch(item_cross_entropy_kernel, grid, largest, total, x, n, i, h, share, **row, fuse=True)
    loss, lse = (hidden.new_empty(n, dtype=torch.float32) for _ in range(2))
    row = tile(device, "combine_loss")
    grid = (cdiv(n, row["BLOCK_N"]),)
    launch(
        combine_loss_kernel, grid, loss, lse, largest, total, x, targets, n, i, h, splits, **row, fuse=True
    )
    return loss, lse


def item_cross_entropy_backward(
    grad: Tensor,
    hidden: Tensor,
    item_table: Tensor,
    targets: Tensor,
    lse: Tensor,
    scale: float,
    log_q: Tensor | None,
    needs: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden `(N, H)` and item_table `(I, H)`, each empty (0 rows) where its bit in `needs` is not set."""
    width = hidden.shape[1]
    hidden, item_table = pad_columns(hidden), pad_columns(item_table)
    device, (n, h), i, size = hidden.device, hidden.shape, item_table.shape[0], hidden.element_size()
    grad_hidden = hidden.new_empty(n if needs & 1 else 0, h)
    grad_table = item_table.new_empty(i if needs & 2 else 0, h)
    logit_row = tile(device, "logit_gradient", size)
    hidden_row, table_row = tile(device, "grad_hidden", size), tile(device, "grad_table", size)

    # Whole blocks of every kernel, so that none of them meets a chunk's border within a block.
    step = max(logit_row["BLOCK_I"], hidden_row["BLOCK_K"], table_row["BLOCK_I"])
    chunk = step * min(cdiv(i, step), max(CHUNK_BYTES // (n * size), CHUNK_ITEMS) // step)
    grad_logits = hidden.new_empty(n, chunk)
    blocks = cdiv(n, hidden_row["BLOCK_N"]), cdiv(h, hidden_row["BLOCK_H"])
    splits, share = _splits(device, blocks[0] * blocks[1], chunk // hidden_row["BLOCK_K"])
    parts = hidden.new_empty(splits if needs & 1 else 0, n, h, dtype=torch.float32)

    x = Logits(hidden, item_table, log_q, scale)
    for start in range(0, i if needs else 0, chunk):
        grid = (cdiv(n, logit_row["BLOCK_N"]) * (chunk // logit_row["BLOCK_I"]),)
        launch(
            logit_gradient_kernel, grid,
            grad_logits, grad, targets, lse, x, n, i, h, start, chunk, **logit_row, fuse=True,
        )  # fmt: skip
        if needs & 1:
            tensors, grid = (parts, grad_logits, item_table), (*blocks, splits)
            launch(
                grad_hidden_kernel, grid, *tensors, n, i, h, start, chunk, share, ADD=start > 0, **hidden_row, fuse=True
            )  # fmt: skip
        if needs & 2:
            grid = (chunk // table_row["BLOCK_I"], cdiv(h, table_row["BLOCK_H"]))
            tensors = (grad_table, grad_logits, hidden)
            launch(grad_table_kernel, grid, *tensors, n, i, h, start, chunk, **table_row, fuse=True)
    if needs & 1:
        sum_parts(parts, grad_hidden)
    return grad_hidden[:, :width].contiguous(), grad_table[:, :width].contiguous()
