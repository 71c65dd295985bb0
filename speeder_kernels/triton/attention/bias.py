"""What the kernels of spae_attention share: where a tile lies, what its ranks are, and its scores with the bias.

A tile is BLOCK tokens of one sequence. Tiles are numbered so that a program finds its own from `cu_seqlens`
alone: sequence s owns the numbers from `cu_seqlens[s] // BLOCK + s` on, which are enough and at most two too many.
Tokens behind the last sequence (the tail of a batch that is padded to a fixed size) count as sequence B, which has
queries without keys and keys without queries: it gets zeros, as whatever sees nothing does. So a grid has
`T // BLOCK + B + 1` tiles whatever the lengths are, and the host need not know them.

Scores are kept in base 2: the scale and the bias come multiplied by log2(e), and `exp2` is one instruction.

The bias of a tile of scores is looked up in a window: the WINDOW buckets that can occur in the tile, held in shared
memory. A lookup in global memory would go through another layout of the tile and back, element by element.

Shape letters: Q queries of a tile, K keys of a tile, D head size, W buckets of a window.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# What the ranks of a tile are. `describe_kernel` writes two numbers a tile: the rank that its first token has or
# would have, and minus the kind less one; or the lowest and the highest rank where the kind is ANY_RANKS.
NO_ITEM = tl.constexpr(0)
CONSECUTIVE = tl.constexpr(1)  # items alone, their ranks rise one by one
WITH_GAPS = tl.constexpr(2)  # they rise with the position, but between them are tokens that are no item
ANY_RANKS = tl.constexpr(3)
LARGEST_RANK = tl.constexpr(1 << 30)  # above it no rank counts as consecutive, so that sums do not overflow


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
def load_rows(
    x, first, stride, length, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr
):
    """BLOCK rows from `first` on of a sequence that begins at `x`, `(BLOCK, BLOCK_D)`; zeros past its end.

    WHOLE promises that all rows are there. Offsets are 64-bit: a batch may hold more than 2^31 elements.
    """
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    start = x + tl.cast(first, tl.int64) * stride
    pointers = start + row.to(tl.int64)[:, None] * stride + column[None, :]
    if WHOLE and BLOCK_D == D:
        return tl.load(pointers)
    elif WHOLE:
        return tl.load(pointers, mask=(column < D)[None, :], other=0.0)
    elif BLOCK_D == D:
        return tl.load(pointers, mask=(first + row < length)[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=(first + row < length)[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def store_rows(x, first, stride, length, values, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of `load_rows`."""
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    pointers = x + tl.cast(first, tl.int64) * stride + row.to(tl.int64)[:, None] * stride + column[None, :]
    mask = (first + row < length)[:, None] & (column < D)[None, :]
    tl.store(pointers, values.to(x.dtype.element_ty), mask=mask)


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
def describe_kernel(
    summary_q,
    summary_k,
    cu_seqlens_q,
    cu_seqlens_k,
    rank_q,
    rank_k,
    sequences,
    tiles_q,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Two int32 for each tile of queries and of keys; a program a tile."""
    tile = tl.program_id(0)
    if tile < tiles_q:
        describe_tile(summary_q, cu_seqlens_q, rank_q, tile, sequences, BLOCK_Q)
    else:
        describe_tile(summary_k, cu_seqlens_k, rank_k, tile - tiles_q, sequences, BLOCK_K)


@triton.jit
def tile_ranks(summary, tile, BLOCK: tl.constexpr):
    """Kind, lowest and highest rank of a tile, or bounds of them; the lowest is the first token's where they rise."""
    low, high = tl.load(summary + 2 * tile), tl.load(summary + 2 * tile + 1)
    kind = tl.where(high < 0, -1 - high, ANY_RANKS)
    return kind, low, tl.where(high < 0, low + (BLOCK - 1), high)


@triton.jit
def load_window(relative, first, buckets, WINDOW: tl.constexpr):
    """Buckets `first ..` of a head, in base 2; past either end of the table its last one again."""
    bucket = tl.minimum(tl.maximum(first + tl.arange(0, WINDOW), 0), buckets - 1)
    return tl.load(relative + bucket) * LOG2E


@triton.jit
def look_up(window_W, index):
    """`window_W[index]`, shaped as `index`, which is a tile."""
    flat = tl.reshape(index, (index.shape[0] * index.shape[1],))
    return tl.reshape(tl.gather(window_W, flat, 0), index.shape)


@triton.jit
def is_wide(kind_q, low_q, high_q, kind_k, low_k, high_k, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Whether a tile's distances may not fit into one window: its ranks lie wide apart. Such tiles are rare."""
    HALF: tl.constexpr = triton.next_power_of_2(BLOCK_Q + BLOCK_K) // 2
    is_wide_q = (kind_q == ANY_RANKS) & (high_q - low_q >= HALF)
    is_wide_k = (kind_k == ANY_RANKS) & (high_k - low_k >= HALF)
    return (is_wide_q | is_wide_k) & (kind_q != NO_ITEM) & (kind_k != NO_ITEM)


@triton.jit
def is_far(kind_q, low_q, kind_k, low_k, buckets, BLOCK_K: tl.constexpr):
    """Whether all of a tile's tokens are items and all so far apart that they share the last bucket."""
    is_run = (kind_q == CONSECUTIVE) & (kind_k == CONSECUTIVE)
    return is_run & (low_q - low_k - (BLOCK_K - 1) >= buckets - 1)


@triton.jit
def relative_bias(
    relative, buckets, wide, kind_q, low_q, high_q, kind_k, low_k, high_k, step, rank_q, rank_k,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The bias of a tile of scores by distance, in base 2; -inf where the tile is wide.

    Where ranks are consecutive, what an element looks up is fixed by its place in the tile: no arithmetic on ranks,
    and the elements of a thread that lie on one diagonal share a load.

    Args:
        relative: the head's row of the table.
        step: query number less key number, as large as the tile; `rank_q` and `rank_k` broadcast to it.
    """
    WINDOW: tl.constexpr = triton.next_power_of_2(BLOCK_Q + BLOCK_K)
    if (kind_q == NO_ITEM) | (kind_k == NO_ITEM):
        bias = tl.zeros(step.shape, tl.float32)
    elif wide:
        bias = tl.full(step.shape, float("-inf"), tl.float32)
    elif is_far(kind_q, low_q, kind_k, low_k, buckets, BLOCK_K):
        bias = tl.zeros(step.shape, tl.float32) + tl.load(relative + buckets - 1) * LOG2E
    elif (kind_q == CONSECUTIVE) & (kind_k == CONSECUTIVE):
        bias = look_up(load_window(relative, low_q - low_k - BLOCK_K, buckets, WINDOW), step + BLOCK_K)
    else:
        # Distances begin at place 1. Place 0 is for pairs that are not two items: they are below it by far.
        window_W = load_window(relative, low_q - high_k - 1, buckets, WINDOW)
        above_q = tl.where(rank_q >= 0, rank_q - low_q, -4 * WINDOW)
        below_k = tl.where(rank_k >= 0, high_k - rank_k, -4 * WINDOW)
        index = tl.maximum(above_q + below_k + 1, 0)
        bias = look_up(tl.where(tl.arange(0, WINDOW) > 0, window_W, 0.0), index)
    return bias


@triton.jit
def add_wide_bias(scores, relative, buckets, rank_q, rank_k, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The scores of a tile of any ranks with their bias, window after window."""
    WINDOW: tl.constexpr = triton.next_power_of_2(BLOCK_Q + BLOCK_K)
    bucket = tl.minimum(tl.maximum(rank_q - rank_k, 0), buckets - 1)
    bucket = tl.where((rank_q >= 0) & (rank_k >= 0), bucket, -1)
    for first in range(0, buckets, WINDOW - 1):
        window_W = load_window(relative, first - 1, buckets, WINDOW)
        index = bucket - first + 1
        index = tl.where((index > 0) & (index < WINDOW), index, 0)
        scores += look_up(tl.where(tl.arange(0, WINDOW) > 0, window_W, 0.0), index)
    return scores


@triton.jit
def biased_scores(
    products, any_wide, scale, relative, buckets, kind_q, low_q, high_q, kind_k, low_k, high_k, step,
    rank_q_Q, rank_k_K, WIDE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of products as scores in base 2 with their bias by distance, and `any_wide` with the tile taken in.

    A tile that is wide becomes -inf, and is left to a second walk with WIDE, for which all others become -inf.
    `step` is as in `relative_bias`.
    """
    wide = is_wide(kind_q, low_q, high_q, kind_k, low_k, high_k, BLOCK_Q, BLOCK_K)
    any_wide |= wide
    scores = products * scale
    if WIDE:
        scores = add_wide_bias(
            scores, relative, buckets, rank_q_Q[:, None], rank_k_K[None, :], BLOCK_Q, BLOCK_K
        )
        scores = tl.where(wide, scores, float("-inf"))
    else:
        # The branches must not contain the product: Triton would then lay the tile out for it alone, and
        # bring it into the layout of the second product through shared memory.
        scores += relative_bias(
            relative, buckets, wide, kind_q, low_q, high_q, kind_k, low_k, high_k, step,
            rank_q_Q[:, None], rank_k_K[None, :], BLOCK_Q, BLOCK_K,
        )  # fmt: skip
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
