"""What the ranks of each tile of queries and of keys are: the bias by distance is looked up accordingly.

`describe_kernel` writes two numbers a tile, its summary: the rank that its first token has or would have, and minus
the kind less one; or the lowest and the highest rank, where the kind is ANY_RANKS.
"""

from __future__ import annotations

import triton
import triton.language as tl

from speeder_kernels.triton.attention.sequences import find_sequence, first_tile, sequence_span
from speeder_kernels.triton.attention.tuples import Ranks, TileRanks

NO_ITEM = tl.constexpr(0)
CONSECUTIVE = tl.constexpr(1)  # items alone, their ranks rise one by one
WITH_GAPS = tl.constexpr(2)  # they rise with the position, but between them are tokens that are no item
ANY_RANKS = tl.constexpr(3)
LARGEST_RANK = tl.constexpr(1 << 30)  # above it no rank counts as consecutive, so that sums do not overflow


@triton.jit
def describe_tile(summary, cu_seqlens, rank, tile, sequences, BLOCK: tl.constexpr):
    """Write down what the ranks of one tile are."""
    sequence = find_sequence(cu_seqlens, tile, sequences, BLOCK)
    start, length = sequence_span(cu_seqlens, sequence, sequences)
    place = tl.arange(0, BLOCK)
    position = (tile - first_tile(cu_seqlens, sequence, BLOCK)) * BLOCK + place
    inside = position < length
    ranks = tl.load(rank + start + position, mask=inside, other=-1)
    is_item = ranks >= 0
    low = tl.min(tl.where(is_item, ranks, 2147483647), axis=0)
    high = tl.max(ranks, axis=0)
    first = tl.min(tl.where(is_item, ranks - place, 2147483647), axis=0)
    is_rising = (first == tl.max(tl.where(is_item, ranks - place, -BLOCK), axis=0)) & (high < LARGEST_RANK)
    is_full = tl.sum((inside != is_item).to(tl.int32), axis=0) == 0
    kind = tl.where(is_rising, tl.where(is_full, CONSECUTIVE, WITH_GAPS), ANY_RANKS)
    kind = tl.where(high < 0, NO_ITEM, kind)
    tl.store(summary + 2 * tile, tl.where(kind == ANY_RANKS, low, first))
    tl.store(summary + 2 * tile + 1, tl.where(kind == ANY_RANKS, high, -1 - kind))


@triton.jit(do_not_specialize=["sequences", "tiles_q"])
def describe_kernel(ranks: Ranks, sequences, tiles_q, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The summaries of all tiles: a program a tile, of queries first."""
    tile = tl.program_id(0)
    if tile < tiles_q:
        describe_tile(ranks.summary_q, ranks.cu_seqlens_q, ranks.rank_q, tile, sequences, BLOCK_Q)
    else:
        describe_tile(ranks.summary_k, ranks.cu_seqlens_k, ranks.rank_k, tile - tiles_q, sequences, BLOCK_K)


@triton.jit
def tile_ranks(summary, tile, BLOCK: tl.constexpr):
    """Kind, lowest and highest rank of a tile, or bounds of them; the lowest is the first token's where they rise."""
    low, high = tl.load(summary + 2 * tile), tl.load(summary + 2 * tile + 1)
    kind = tl.where(high < 0, -1 - high, ANY_RANKS)
    return TileRanks(kind=kind, low=low, high=tl.where(high < 0, low + (BLOCK - 1), high))
