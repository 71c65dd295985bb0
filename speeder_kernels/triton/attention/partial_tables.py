"""Sums of a bias table's gradient, without atomics.

A program owns a partial table, adds to it tile after tile, and a last kernel adds the partial tables in order. So the
sums do not depend on which program is faster.

Sums by distance: where ranks are consecutive, the distances of a tile are its diagonals: each row is turned until its
diagonals stand in columns, which are then summed. Where they are not, the tile is first multiplied from both sides with
matrices of ones and zeros that put every query and key at the place its rank says, and is then such a tile.

Shape letters: Q queries of a tile, K keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from speeder_kernels.triton.attention.tuples import TileShape
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
def add_diagonals(row, tile_QK, distance, TILE: TileShape):
    """Add to `row[d]` the sum of the tile's elements with `distance + q - k == d`. TILE.Q is at most TILE.K."""
    query_Q, turn_K = tl.arange(0, TILE.Q), tl.arange(0, TILE.K)
    key_QK = query_Q[:, None] + turn_K[None, :]
    turned_QK = tl.gather(tile_QK, key_QK & (TILE.K - 1), 1)
    near_K = tl.sum(tl.where(key_QK < TILE.K, turned_QK, 0.0), axis=0)
    far_K = tl.sum(tl.where(key_QK < TILE.K, 0.0, turned_QK), axis=0)
    near = row + distance - turn_K
    tl.store(near, tl.load(near) + near_K)
    tl.store(near + TILE.K, tl.load(near + TILE.K) + far_K)
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
def add_by_rank(row, tile_QK, rank_q_Q, rank_k_K, buckets, PRECISION: tl.constexpr, TILE: TileShape):
    """Add a tile of any ranks. Queries and keys are taken by windows of ranks, most often one of each."""
    distance_QK = rank_q_Q[:, None] - rank_k_K[None, :]
    is_pair = (rank_q_Q >= 0)[:, None] & (rank_k_K >= 0)[None, :]
    is_last = distance_QK >= buckets - 1
    add_bucket(row, buckets - 1, tl.sum(tl.where(is_pair & is_last, tile_QK, 0.0)))
    add_bucket(row, 0, tl.sum(tl.where(is_pair & (distance_QK <= 0) & (is_last == 0), tile_QK, 0.0)))
    between = is_pair & (distance_QK > 0) & (distance_QK < buckets - 1)
    if tl.max(between.to(tl.int32)) > 0:
        between_QK = tl.where(between, tile_QK, 0.0)
        place_Q, place_K = tl.arange(0, TILE.Q), tl.arange(0, TILE.K)
        last_k = tl.max(rank_k_K, axis=0)
        while last_k >= 0:
            first_k = last_k - (TILE.K - 1)
            ones_KK = (rank_k_K[:, None] - first_k == place_K[None, :]).to(tl.float32)
            placed_QK = multiply_in_parts(between_QK, ones_KK, PRECISION, True)
            last_q = tl.max(rank_q_Q, axis=0)
            while last_q >= 0:
                first_q = last_q - (TILE.Q - 1)
                distance = first_q - first_k
                if (distance > -TILE.Q) & (distance - TILE.K < buckets - 1):
                    ones_QQ = (rank_q_Q[None, :] - first_q == place_Q[:, None]).to(tl.float32)
                    tile_QK = multiply_in_parts(ones_QQ, placed_QK, PRECISION, False)
                    add_diagonals(row, tile_QK, distance, TILE)
                last_q = tl.max(tl.where(rank_q_Q < first_q, rank_q_Q, -1), axis=0)
            last_k = tl.max(tl.where(rank_k_K < first_k, rank_k_K, -1), axis=0)


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
