"""Where the tiles of a batch lie, and how their rows are read and written.

A tile is BLOCK tokens of one sequence. Tiles are numbered so that a program finds its own from `cu_seqlens`
alone: sequence s owns the numbers from `cu_seqlens[s] // BLOCK + s` on, which are enough and at most two too many.
Tokens behind the last sequence (the tail of a batch that is padded to a fixed size) count as sequence B, which has
queries without keys and keys without queries: it gets zeros, as whatever sees nothing does. So a grid has
`T // BLOCK + B + 1` tiles whatever the lengths are, and the host need not know them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from speeder_kernels.triton.attention.tuples import (
    Rows,
    TileShape,
)


@triton.jit
def first_tile(cu_seqlens, sequence, BLOCK: tl.constexpr):
    """The number of a sequence's first tile."""
    return tl.load(cu_seqlens + sequence) // BLOCK + sequence


@triton.jit
def find_sequence(cu_seqlens, tile, sequences, BLOCK: tl.constexpr):
    """Whose tile this is, by bisection; `sequences` itself stands for the tail."""
    low, high = 0, sequences + 1
    while high - low > 1:
        middle = (low + high) // 2
        is_after = first_tile(cu_seqlens, middle, BLOCK) <= tile
        low = tl.where(is_after, middle, low)
        high = tl.where(is_after, high, middle)
    return low


@triton.jit
def sequence_span(cu_seqlens, sequence, sequences):
    """Its first token, and its length: 0 of the tail, as all but `with_tail` take it."""
    start = tl.load(cu_seqlens + sequence)
    return start, tl.load(cu_seqlens + tl.minimum(sequence + 1, sequences)) - start


@triton.jit
def with_tail(start, length, sequence, sequences, tokens):
    """A sequence's length; of the tail, what is left of all `tokens`."""
    return tl.where(sequence < sequences, length, tokens - start)


@triton.jit
def seen_keys(first_q, length_q, length_k, CAUSAL: tl.constexpr, TILE: TileShape):
    """How many keys all queries of a tile see, in whole blocks, and how many any of them does."""
    if CAUSAL:
        # The first query sees keys up to first_q + shift, and the last one the most.
        shift = length_k - length_q
        seen_by_all = tl.minimum(tl.maximum(first_q + shift + 1, 0), length_k)
        end = tl.minimum(tl.maximum(tl.minimum(first_q + TILE.Q, length_q) + shift, 0), length_k)
    else:
        seen_by_all = length_k
        end = length_k
    return seen_by_all // TILE.K * TILE.K, end


@triton.jit
def of_sequence(x: Rows, start):
    """The rows of a sequence. Offsets are 64-bit: a batch may hold more than 2^31 elements."""
    return Rows(data=x.data + start.to(tl.int64) * x.stride, stride=x.stride, head_stride=x.head_stride)


@triton.jit
def of_head(x: Rows, head):
    """The rows of a head."""
    return Rows(data=x.data + head.to(tl.int64) * x.head_stride, stride=x.stride, head_stride=x.head_stride)


@triton.jit
def rows_of(x: Rows, start, head):
    """The rows of a sequence and head. Adding the offsets up first takes fewer registers here; in a loop over heads,
    where a sequence's offset stays, `of_head` of `of_sequence` does."""
    offset = start.to(tl.int64) * x.stride + head.to(tl.int64) * x.head_stride
    return Rows(data=x.data + offset, stride=x.stride, head_stride=x.head_stride)


@triton.jit
def load_rows(x: Rows, first, length, BLOCK: tl.constexpr, TILE: TileShape, WHOLE: tl.constexpr):
    """BLOCK rows from `first` on of a sequence that begins at `x`, `(BLOCK, BLOCK_D)`; zeros past its end.

    WHOLE promises that all rows are there.
    """
    row, column = tl.arange(0, BLOCK), tl.arange(0, TILE.BLOCK_D)
    start = x.data + tl.cast(first, tl.int64) * x.stride
    pointers = start + row.to(tl.int64)[:, None] * x.stride + column[None, :]
    if WHOLE and TILE.BLOCK_D == TILE.D:
        return tl.load(pointers)
    elif WHOLE:
        return tl.load(pointers, mask=(column < TILE.D)[None, :], other=0.0)
    elif TILE.BLOCK_D == TILE.D:
        return tl.load(pointers, mask=(first + row < length)[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=(first + row < length)[:, None] & (column < TILE.D)[None, :], other=0.0)


@triton.jit
def store_rows(x, first, stride, length, values, BLOCK: tl.constexpr, TILE: TileShape):
    """The counterpart of `load_rows`: `x` is a pointer, rows are `stride` apart."""
    row, column = tl.arange(0, BLOCK), tl.arange(0, TILE.BLOCK_D)
    pointers = x + tl.cast(first, tl.int64) * stride + row.to(tl.int64)[:, None] * stride + column[None, :]
    mask = (first + row < length)[:, None] & (column < TILE.D)[None, :]
    tl.store(pointers, values.to(x.dtype.element_ty), mask=mask)
