"""The scores of a tile with their bias.

Scores are kept in base 2: the scale and the bias come multiplied by log2(e), and `exp2` is one instruction.

The bias of a tile of scores is looked up in a window: the WINDOW buckets that can occur in the tile, held in shared
memory. A lookup in global memory would go through another layout of the tile and back, element by element. A tile is
*wide* where its distances may not fit into one window.

Shape letters: Q queries of a tile, K keys of a tile, W buckets of a window.
"""

from __future__ import annotations

import triton
import triton.language as tl

from speeder_kernels.triton.attention.ranks import ANY_RANKS, CONSECUTIVE, NO_ITEM
from speeder_kernels.triton.attention.tuples import (
    HeadTables,
    TileRanks,
    TileShape,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_window(tables: HeadTables, first, WINDOW: tl.constexpr):
    """Buckets `first ..` of a head, in base 2; past either end of the table its last one again."""
    bucket = tl.minimum(tl.maximum(first + tl.arange(0, WINDOW), 0), tables.buckets - 1)
    return tl.load(tables.relative + bucket) * LOG2E


@triton.jit
def look_up(window_W, index):
    """`window_W[index]`, shaped as `index`, which is a tile."""
    flat = tl.reshape(index, (index.shape[0] * index.shape[1],))
    return tl.reshape(tl.gather(window_W, flat, 0), index.shape)


@triton.jit
def is_wide(q: TileRanks, k: TileRanks, TILE: TileShape):
    """Whether a tile's distances may not fit into one window: its ranks lie wide apart. Such tiles are rare."""
    HALF: tl.constexpr = triton.next_power_of_2(TILE.Q + TILE.K) // 2
    is_wide_q = (q.kind == ANY_RANKS) & (q.high - q.low >= HALF)
    is_wide_k = (k.kind == ANY_RANKS) & (k.high - k.low >= HALF)
    return (is_wide_q | is_wide_k) & (q.kind != NO_ITEM) & (k.kind != NO_ITEM)


@triton.jit
def is_far(q: TileRanks, k: TileRanks, buckets, BLOCK_K: tl.constexpr):
    """Whether all of a tile's tokens are items and all so far apart that they share the last bucket."""
    is_run = (q.kind == CONSECUTIVE) & (k.kind == CONSECUTIVE)
    return is_run & (q.low - k.low - (BLOCK_K - 1) >= buckets - 1)


@triton.jit
def relative_bias(
    tables: HeadTables, wide, q: TileRanks, k: TileRanks, step, rank_q, rank_k, TILE: TileShape
):
    """The bias of a tile of scores by distance, in base 2; -inf where the tile is wide.

    Where ranks are consecutive, what an element looks up is fixed by its place in the tile: no arithmetic on ranks,
    and the elements of a thread that lie on one diagonal share a load.

    `step` (Q, K) is the query's number less the key's; `rank_q` and `rank_k` broadcast to it.
    """
    WINDOW: tl.constexpr = triton.next_power_of_2(TILE.Q + TILE.K)
    if (q.kind == NO_ITEM) | (k.kind == NO_ITEM):
        bias = tl.zeros(step.shape, tl.float32)
    elif wide:
        bias = tl.full(step.shape, float("-inf"), tl.float32)
    elif is_far(q, k, tables.buckets, TILE.K):
        bias = tl.zeros(step.shape, tl.float32) + tl.load(tables.relative + tables.buckets - 1) * LOG2E
    elif (q.kind == CONSECUTIVE) & (k.kind == CONSECUTIVE):
        bias = look_up(load_window(tables, q.low - k.low - TILE.K, WINDOW), step + TILE.K)
    else:
        # Distances begin at place 1. Place 0 is for pairs that are not two items: they are below it by far.
        window_W = load_window(tables, q.low - k.high - 1, WINDOW)
        above_q = tl.where(rank_q >= 0, rank_q - q.low, -4 * WINDOW)
        below_k = tl.where(rank_k >= 0, k.high - rank_k, -4 * WINDOW)
        index = tl.maximum(above_q + below_k + 1, 0)
        bias = look_up(tl.where(tl.arange(0, WINDOW) > 0, window_W, 0.0), index)
    return bias


@triton.jit
def add_wide_bias(scores, tables: HeadTables, rank_q, rank_k, TILE: TileShape):
    """The scores of a tile of any ranks with their bias, window after window."""
    WINDOW: tl.constexpr = triton.next_power_of_2(TILE.Q + TILE.K)
    bucket = tl.minimum(tl.maximum(rank_q - rank_k, 0), tables.buckets - 1)
    bucket = tl.where((rank_q >= 0) & (rank_k >= 0), bucket, -1)
    for first in range(0, tables.buckets, WINDOW - 1):
        window_W = load_window(tables, first - 1, WINDOW)
        index = bucket - first + 1
        index = tl.where((index > 0) & (index < WINDOW), index, 0)
        scores += look_up(tl.where(tl.arange(0, WINDOW) > 0, window_W, 0.0), index)
    return scores


@triton.jit
def biased_scores(
    products, any_wide, scale, tables: HeadTables, q: TileRanks, k: TileRanks, step, rank_q_Q, rank_k_K,
    WIDE: tl.constexpr, TILE: TileShape,
):  # fmt: skip
    """A tile of products as scores in base 2 with their bias by distance, and `any_wide` with the tile taken in.

    A tile that is wide becomes -inf, and is left to a second walk with WIDE, for which all others become -inf.
    `step` is as in `relative_bias`.
    """
    wide = is_wide(q, k, TILE)
    any_wide |= wide
    scores = products * scale
    if WIDE:
        scores = add_wide_bias(scores, tables, rank_q_Q[:, None], rank_k_K[None, :], TILE)
        scores = tl.where(wide, scores, float("-inf"))
    else:
        # The branches must not contain the product: Triton would then lay the tile out for it alone, and
        # bring it into the layout of the second product through shared memory.
        scores += relative_bias(tables, wide, q, k, step, rank_q_Q[:, None], rank_k_K[None, :], TILE)
    return scores, any_wide


@triton.jit
def add_absolute(scores, rank_q_Q, bias_K):
    """The scores with the keys' own bias, which a query that is no item does not feel."""
    return scores + tl.where(rank_q_Q >= 0, 1.0, 0.0)[:, None] * bias_K[None, :]


@triton.jit
def load_absolute(absolute, rank, positions):
    """The bias by key rank, in base 2; zero where a token is no item."""
    position = tl.minimum(rank, positions - 1)
    return tl.load(absolute + position, mask=rank >= 0, other=0.0) * LOG2E
