"""pack_tokens in Triton: the rows of a batch in one pass, and the sums of rows for its backward.

Shape letters: T tokens, V text vocabulary, U items in the batch, P position prompts, H hidden size, R rows of
the table whose gradient is summed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from speeder_kernels.triton.tiles import cdiv, column_block, launch, tile

SUM_AHEAD = 4  # rows of a sum that are fetched before the first is added


@triton.jit
def _rows(table, row, inside, H, column):
    """Columns of a table's rows; NaN, not read, where not `inside`."""
    mask = inside[:, None] & (column[None, :] < H)
    return tl.load(table + row[:, None] * H + column[None, :], mask=mask, other=float("nan"))


@triton.jit(do_not_specialize=["T", "V", "U", "P"])
def pack_tokens_kernel(
    out, text, items, prompts, input_ids, item_rows, ranks, T, H, V, U, P,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program packs BLOCK_T tokens' BLOCK_H columns; what a token does not use is not read.

    NaN is the row of a token whose index lies outside its table (V, U and P rows): nothing is read there.
    """
    columns_of_blocks = tl.cdiv(H, BLOCK_H)
    token = (tl.program_id(0) // columns_of_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(0) % columns_of_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    in_batch = token < T
    row = tl.load(item_rows + token, mask=in_batch, other=-1)
    is_item = in_batch & (row >= 0)
    is_text = in_batch & (row < 0)
    rank = tl.load(ranks + token, mask=is_item, other=-1)
    text_row = tl.load(input_ids + token, mask=is_text, other=0)
    in_row = column[None, :] < H
    has_prompt = (rank >= 0)[:, None] & in_row
    words = _rows(text, text_row, is_text & (text_row >= 0) & (text_row < V), H, column)
    tokens = _rows(items, row, is_item & (row < U), H, column)
    prompt = _rows(prompts, rank, (rank >= 0) & (rank < P), H, column)
    x = tl.where(is_item[:, None], tokens, words)
    # Not `x + 0` where there is no prompt: a row is passed on bit by bit.
    x = tl.where(has_prompt, (x.to(tl.float32) + prompt.to(tl.float32)).to(x.dtype), x)
    tl.store(out + token[:, None] * H + column[None, :], x, mask=in_batch[:, None] & in_row)


@triton.jit(do_not_specialize=["R"])
def sum_rows_kernel(
    out, grad, order, starts, R, H, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, AHEAD: tl.constexpr
):
    """A program owns BLOCK_R rows' BLOCK_H columns and adds their tokens one after another, in token order."""
    columns_of_blocks = tl.cdiv(H, BLOCK_H)
    row = (tl.program_id(0) // columns_of_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(0) % columns_of_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    in_table, in_row = row < R, column[None, :] < H
    start = tl.load(starts + row, mask=in_table, other=0)
    count = tl.load(starts + row + 1, mask=in_table, other=0) - start
    total = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for first in range(0, tl.max(count), AHEAD):
        # Unrolled, so that the loads of AHEAD tokens are under way before the first sum needs one.
        for ahead in tl.static_range(AHEAD):
            here = first + ahead < count
            token = tl.load(order + start + first + ahead, mask=here, other=0)
            x = tl.load(grad + token[:, None] * H + column[None, :], mask=here[:, None] & in_row, other=0.0)
            total += x.to(tl.float32)
    tl.store(
        out + row[:, None] * H + column[None, :],
        total.to(out.dtype.element_ty),
        mask=in_table[:, None] & in_row,
    )


def _blocks(name: str, x: Tensor) -> tuple[int, int, int]:
    """Rows and columns of a program's block of `x (rows, H)`, and warps."""
    row = tile(x.device, name, x.element_size())
    columns = column_block(x.shape[1], min(row["elements"], 1024))
    return row["elements"] // columns, columns, row["num_warps"]


def pack_tokens(
    input_ids: Tensor,
    text_embedding: Tensor,
    item_tokens: Tensor,
    item_rows: Tensor,
    ranks: Tensor,
    position_prompts: Tensor,
) -> Tensor:
    """`(T, H)`; contiguous tensors, int64 indices. A token with an index outside its table gets NaN."""
    tokens, hidden = input_ids.shape[0], text_embedding.shape[1]
    out = text_embedding.new_empty(tokens, hidden)
    block_t, block_h, warps = _blocks("pack_tokens", out)
    grid = (cdiv(tokens, block_t) * cdiv(hidden, block_h),)
    tensors = (out, text_embedding, item_tokens, position_prompts, input_ids, item_rows, ranks)
    launch(
        pack_tokens_kernel,
        grid,
        *tensors,
        tokens,
        hidden,
        *(x.shape[0] for x in (text_embedding, item_tokens, position_prompts)),
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        num_warps=warps,
        fuse=False,
    )
    return out


def sum_rows(grad: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """`(R, H)`: row r is the sum of `grad[order[starts[r]:starts[r + 1]]]`, first to last."""
    rows, hidden = starts.shape[0] - 1, grad.shape[1]
    out = grad.new_empty(rows, hidden)
    if rows == 0:
        return out
    block_r, block_h, warps = _blocks("sum_rows", out)
    grid = (cdiv(rows, block_r) * cdiv(hidden, block_h),)
    sizes = dict(BLOCK_R=block_r, BLOCK_H=block_h, AHEAD=SUM_AHEAD)
    launch(
        sum_rows_kernel, grid, out, grad, order, starts, rows, hidden, **sizes, num_warps=warps, fuse=False
    )
    return out
