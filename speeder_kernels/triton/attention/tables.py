"""The gradients of spae_attention's two bias tables, without atomics.

A program owns a partial table, adds to it tile after tile, and a last kernel adds the partial tables in order. So the
sums do not depend on which program is faster.

The relative table: a tile's gradients of scores, computed once more (in `queries_kernel` there are no registers left
for what follows), are summed by distance. Where ranks are consecutive, the distances are the tile's diagonals: each
row is turned until its diagonals stand in columns, which are then summed. Where they are not, the tile is first
multiplied from both sides with matrices of ones and zeros that put every query and key at the place its rank says,
and is then such a tile.

The absolute table: sums over a key's queries come from `keys_kernel`; here they are summed by rank.

Shape letters: Q queries of a tile, K keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from speeder_kernels.triton.attention.bias import (
    ANY_RANKS,
    NO_ITEM,
    add_absolute,
    add_wide_bias,
    find_sequence,
    first_tile,
    is_far,
    is_wide,
    load_absolute,
    load_rows,
    relative_bias,
    sequence_span,
    tile_ranks,
)
from speeder_kernels.triton.sum_parts import sum_of_parts

# A partial table has this many places before its first bucket and after its last, for the distances that belong to
# them: what a tile gives is then added without a clamp. Twice the keys of a tile is enough.
PAD = tl.constexpr(128)


@triton.jit
def clear_row(row, width):
    """Zeros in a program's own row."""
    for first in range(0, width, 1024):
        column = first + tl.arange(0, 1024)
        tl.store(row + column, tl.zeros((1024,), tl.float32), mask=column < width)
    tl.debug_barrier()


@triton.jit
def add_bucket(row, bucket, value):
    """Add one number to a program's own row."""
    tl.store(row + bucket, tl.load(row + bucket) + value)
    tl.debug_barrier()  # the next to read it may be another thread


@triton.jit
def add_diagonals(row, tile_QK, distance, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Add to `row[d]` the sum of the tile's elements with `distance + q - k == d`. BLOCK_Q is at most BLOCK_K."""
    query_Q, turn_K = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    key_QK = query_Q[:, None] + turn_K[None, :]
    turned_QK = tl.gather(tile_QK, key_QK & (BLOCK_K - 1), 1)
    near_K = tl.sum(tl.where(key_QK < BLOCK_K, turned_QK, 0.0), axis=0)
    far_K = tl.sum(tl.where(key_QK < BLOCK_K, 0.0, turned_QK), axis=0)
    near = row + distance - turn_K
    tl.store(near, tl.load(near) + near_K)
    tl.store(near + BLOCK_K, tl.load(near + BLOCK_K) + far_K)
    tl.debug_barrier()


@triton.jit
def multiply_in_parts(a, b, PRECISION: tl.constexpr, PARTS_OF_A: tl.constexpr):
    """`a @ b`, float32, where one of them holds ones and zeros.

    Tensor cores take the other one in two parts, which hold 16 (bfloat16) or 22 (tf32) of its 24 bits.
    """
    if PRECISION == "ieee":
        return tl.dot(a, b, input_precision="ieee")
    x = a if PARTS_OF_A else b
    if PRECISION == "bf16":
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
    else:
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        low = x - high
    if PARTS_OF_A:
        return tl.dot(low, b, tl.dot(high, b))
    else:
        return tl.dot(a, low, tl.dot(a, high))


@triton.jit
def add_by_rank(
    row, tile_QK, rank_q_Q, rank_k_K, buckets,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add a tile of any ranks. Queries and keys are taken by windows of ranks, most often one of each."""
    distance_QK = rank_q_Q[:, None] - rank_k_K[None, :]
    is_pair = (rank_q_Q >= 0)[:, None] & (rank_k_K >= 0)[None, :]
    is_last = distance_QK >= buckets - 1
    add_bucket(row, buckets - 1, tl.sum(tl.where(is_pair & is_last, tile_QK, 0.0)))
    add_bucket(row, 0, tl.sum(tl.where(is_pair & (distance_QK <= 0) & (is_last == 0), tile_QK, 0.0)))
    between = is_pair & (distance_QK > 0) & (distance_QK < buckets - 1)
    if tl.max(between.to(tl.int32)) > 0:
        between_QK = tl.where(between, tile_QK, 0.0)
        place_Q, place_K = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
        last_k = tl.max(rank_k_K, axis=0)
        while last_k >= 0:
            first_k = last_k - (BLOCK_K - 1)
            ones_KK = (rank_k_K[:, None] - first_k == place_K[None, :]).to(tl.float32)
            placed_QK = multiply_in_parts(between_QK, ones_KK, PRECISION, True)
            last_q = tl.max(rank_q_Q, axis=0)
            while last_q >= 0:
                first_q = last_q - (BLOCK_Q - 1)
                distance = first_q - first_k
                if (distance > -BLOCK_Q) & (distance - BLOCK_K < buckets - 1):
                    ones_QQ = (rank_q_Q[None, :] - first_q == place_Q[:, None]).to(tl.float32)
                    tile_QK = multiply_in_parts(ones_QQ, placed_QK, PRECISION, False)
                    add_diagonals(row, tile_QK, distance, BLOCK_Q, BLOCK_K)
                last_q = tl.max(tl.where(rank_q_Q < first_q, rank_q_Q, -1), axis=0)
            last_k = tl.max(tl.where(rank_k_K < first_k, rank_k_K, -1), axis=0)


@triton.jit
def tile_gradients(
    row, q_QD, grad_QD, lse2_Q, delta_Q, k, v, k_stride, v_stride, rank_q_Q, rank_k, relative, absolute,
    summary_k,
    kind_q, low_q, high_q, far_summary_k, far_kind_q, far_low_q, first_q, end, length_k, shift, buckets,
    positions,
    scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, FAR_K: tl.constexpr,
):  # fmt: skip
    """Add a tile of queries against keys 0 to `end` to the program's row.

    Tiles of `queries_kernel`, which contain this kernel's, are left out where they are far: it has summed them.
    """
    row_Q, row_K = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    step_QK = row_Q[:, None] - row_K[None, :]
    for first_k in tl.range(0, end, BLOCK_K, disable_licm=True):
        kind_k, low_k, high_k = tile_ranks(summary_k, first_k // BLOCK_K, BLOCK_K)
        far_kind_k, far_low_k, _ = tile_ranks(far_summary_k, first_k // FAR_K, FAR_K)
        far = is_far(far_kind_q, far_low_q, far_kind_k, far_low_k, buckets, FAR_K)
        if (kind_q != NO_ITEM) & (kind_k != NO_ITEM) & (far == 0):
            rank_k_K = tl.load(rank_k + first_k + row_K, mask=first_k + row_K < length_k, other=-1)
            k_KD = load_rows(k, first_k, k_stride, length_k, BLOCK_K, D, BLOCK_D, False)
            v_KD = load_rows(v, first_k, v_stride, length_k, BLOCK_K, D, BLOCK_D, False)
            scores_QK = tl.dot(q_QD, tl.trans(k_KD), input_precision="ieee") * scale
            wide = is_wide(kind_q, low_q, high_q, kind_k, low_k, high_k, BLOCK_Q, BLOCK_K)
            if wide:
                scores_QK = add_wide_bias(
                    scores_QK, relative, buckets, rank_q_Q[:, None], rank_k_K[None, :], BLOCK_Q, BLOCK_K
                )
            else:
                scores_QK += relative_bias(
                    relative, buckets, wide, kind_q, low_q, high_q, kind_k, low_k, high_k, step_QK,
                    rank_q_Q[:, None], rank_k_K[None, :], BLOCK_Q, BLOCK_K,
                )  # fmt: skip
            if absolute is not None:
                scores_QK = add_absolute(scores_QK, rank_q_Q, load_absolute(absolute, rank_k_K, positions))
            # Pairs that are not two items have no bias, and what is not seen has no weight.
            counts = (rank_q_Q >= 0)[:, None] & (rank_k_K >= 0)[None, :]
            if CAUSAL:
                counts = counts & ((first_k + row_K)[None, :] <= (first_q + shift + row_Q)[:, None])
            weights_QK = tl.math.exp2(tl.where(counts, scores_QK - lse2_Q[:, None], float("-inf")))
            grad_weights_QK = tl.dot(grad_QD, tl.trans(v_KD), input_precision="ieee")
            grad_scores_QK = weights_QK * (grad_weights_QK - delta_Q[:, None])
            if (kind_q == ANY_RANKS) | (kind_k == ANY_RANKS):
                add_by_rank(row, grad_scores_QK, rank_q_Q, rank_k_K, buckets, PRECISION, BLOCK_Q, BLOCK_K)
            else:
                distance = tl.minimum(tl.maximum(low_q - low_k, -BLOCK_Q), buckets - 1 + BLOCK_K)
                add_diagonals(row, grad_scores_QK, distance, BLOCK_Q, BLOCK_K)


@triton.jit(
    do_not_specialize=["tokens_q", "heads", "group", "sequences", "buckets", "positions", "tiles", "slots"]
)
def relative_kernel(
    partials,
    far,
    grad,
    q,
    k,
    v,
    lse2,
    delta,
    cu_seqlens_q,
    cu_seqlens_k,
    rank_q,
    rank_k,
    relative,
    absolute,
    summary_q,
    summary_k,
    far_summary_q,
    far_summary_k,
    grad_stride,
    grad_head_stride,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    tokens_q,
    heads,
    group,
    sequences,
    buckets,
    positions,
    scale,
    tiles,
    slots,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FAR_Q: tl.constexpr,
    FAR_K: tl.constexpr,
):
    """partials (slots, Hq, R + 2 PAD): ds by distance, each slot over every slots-th tile of queries.

    `far` (Hq, Tq) is what `queries_kernel` has summed already, in tiles of FAR_Q queries and FAR_K keys, multiples of
    this kernel's.
    """
    head = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    wide_head, key_head = head.to(tl.int64), (head // group).to(tl.int64)
    width = buckets + 2 * PAD
    row = partials + tl.program_id(0).to(tl.int64) * width
    clear_row(row, width)
    row += PAD
    relative += head * buckets
    if absolute is not None:
        absolute += head * positions
    far_Q = tl.zeros((BLOCK_Q,), tl.float32)
    for tile in tl.range(slot, tiles, slots, disable_licm=True):
        sequence = find_sequence(cu_seqlens_q, tile, sequences, BLOCK_Q)
        first_q = (tile - first_tile(cu_seqlens_q, sequence, BLOCK_Q)) * BLOCK_Q
        start_q, length_q = sequence_span(cu_seqlens_q, sequence, sequences)
        start_k, length_k = sequence_span(cu_seqlens_k, sequence, sequences)
        kind_q, low_q, high_q = tile_ranks(summary_q, tile, BLOCK_Q)
        if (first_q < length_q) & (kind_q != NO_ITEM):
            q_sequence = q + start_q.to(tl.int64) * q_stride + wide_head * q_head_stride
            grad_sequence = grad + start_q.to(tl.int64) * grad_stride + wide_head * grad_head_stride
            k_sequence = k + start_k.to(tl.int64) * k_stride + key_head * k_head_stride
            v_sequence = v + start_k.to(tl.int64) * v_stride + key_head * v_head_stride
            q_QD = load_rows(q_sequence, first_q, q_stride, length_q, BLOCK_Q, D, BLOCK_D, False)
            grad_QD = load_rows(grad_sequence, first_q, grad_stride, length_q, BLOCK_Q, D, BLOCK_D, False)
            row_Q = first_q + tl.arange(0, BLOCK_Q)
            inside = row_Q < length_q
            at = wide_head * tokens_q + start_q + row_Q
            lse2_Q = tl.load(lse2 + at, mask=inside, other=float("inf"))
            delta_Q = tl.load(delta + at, mask=inside, other=0.0)
            far_Q += tl.load(far + at, mask=inside, other=0.0)
            rank_q_Q = tl.load(rank_q + start_q + row_Q, mask=inside, other=-1)
            far_tile = first_tile(cu_seqlens_q, sequence, FAR_Q) + first_q // FAR_Q
            far_kind_q, far_low_q, _ = tile_ranks(far_summary_q, far_tile, FAR_Q)
            shift = length_k - length_q
            end = length_k
            if CAUSAL:
                end = tl.minimum(tl.maximum(tl.minimum(first_q + BLOCK_Q, length_q) + shift, 0), length_k)
            tile_gradients(
                row, q_QD, grad_QD, lse2_Q, delta_Q, k_sequence, v_sequence, k_stride, v_stride, rank_q_Q,
                rank_k + start_k, relative, absolute, summary_k + 2 * first_tile(cu_seqlens_k, sequence,
                BLOCK_K),
                kind_q, low_q, high_q, far_summary_k + 2 * first_tile(cu_seqlens_k, sequence, FAR_K),
                far_kind_q,
                far_low_q, first_q, end, length_k, shift, buckets, positions, scale,
                CAUSAL, PRECISION, D, BLOCK_D, BLOCK_Q, BLOCK_K, FAR_K,
            )  # fmt: skip
    add_bucket(row, buckets - 1, tl.sum(far_Q, axis=0))


@triton.jit(do_not_specialize=["tokens", "heads", "positions", "slots"])
def absolute_kernel(partials, column_sums, rank_k, tokens, heads, positions, slots, BLOCK_K: tl.constexpr):
    """partials (slots, Hq, A): column_sums (Hq, Tk) summed by the keys' ranks, each slot over every slots-th block."""
    head = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    row = partials + tl.program_id(0).to(tl.int64) * positions
    clear_row(row, positions)
    place_K = tl.arange(0, BLOCK_K)
    for block in range(slot, tl.cdiv(tokens, BLOCK_K), slots):
        key_K = block * BLOCK_K + place_K
        rank_K = tl.load(rank_k + key_K, mask=key_K < tokens, other=-1)
        sums_K = tl.load(column_sums + head.to(tl.int64) * tokens + key_K, mask=key_K < tokens, other=0.0)
        position_K = tl.minimum(rank_K, positions - 1)
        # Keys of one position add up in the first of them, which alone writes.
        same_KK = position_K[:, None] == position_K[None, :]
        total_K = tl.sum(tl.where(same_KK, sums_K[None, :], 0.0), axis=1)
        is_first_K = tl.sum((same_KK & (place_K[None, :] < place_K[:, None])).to(tl.int32), axis=1) == 0
        mask_K = is_first_K & (rank_K >= 0)
        tl.store(row + position_K, tl.load(row + position_K, mask=mask_K, other=0.0) + total_K, mask=mask_K)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["heads", "buckets", "slots"])
def reduce_kernel(
    table, partials, heads, buckets, slots, PADDING: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr
):
    """table (Hq, R): the sum of partials (slots, Hq, R + 2 PADDING), whose padding belongs to the outer buckets."""
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * BLOCK
    bucket = first + tl.arange(0, BLOCK)
    width = (buckets + 2 * PADDING).to(tl.int64)
    partials += head * width
    total = sum_of_parts(partials, slots, heads * width, PADDING + bucket, bucket < buckets, BLOCK_P)
    if PADDING > 0:
        pad = tl.arange(0, PADDING)
        if first == 0:
            before = sum_of_parts(partials, slots, heads * width, pad, pad < PADDING, BLOCK_P)
            total += tl.where(bucket == 0, tl.sum(before, axis=0), 0.0)
        if first + BLOCK >= buckets:
            column = PADDING + buckets + pad
            after = sum_of_parts(partials, slots, heads * width, column, pad < PADDING, BLOCK_P)
            total += tl.where(bucket == buckets - 1, tl.sum(after, axis=0), 0.0)
    tl.store(table + head * buckets + bucket, total, mask=bucket < buckets)
