"""Attention of few queries to many keys, as when one token is decoded against a long cache.

The queries of all heads that share a key head stand in one tile of Q rows, so that keys and values are read once;
more rows than that take several tiles, each of which reads them. The keys of a sequence are split among programs, and
`combine_kernel` puts their results together in the order of the keys.

Shape letters: Q rows of a tile (a query of one head each), K keys of a tile, D head size, S splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from speeder_kernels.triton.attention.bias import LN2, LOG2E
from speeder_kernels.triton.attention.forward import softmax_step
from speeder_kernels.triton.attention.sequences import load_rows, rows_of, sequence_span
from speeder_kernels.triton.attention.tuples import (
    Inputs,
    Ranks,
    Tables,
    TileShape,
)


@triton.jit(do_not_specialize=["key_heads", "group", "splits", "blocks_q", "buckets", "positions"])
def decode_kernel(
    parts, parts_lse2, x: Inputs, ranks: Ranks, tables: Tables,
    key_heads, group, splits, blocks_q, buckets, positions, scale,
    CAUSAL: tl.constexpr, TILE: TileShape,
):  # fmt: skip
    """A program takes a block of rows of one sequence and key head, and one of the `splits` parts of the keys.

    parts (Tq, Hq, splits, D) and parts_lse2 (Tq, Hq, splits), in float32 and base 2. Nothing is written for rows that
    are in no program's block: of a sequence longer than was told, and behind the last sequence.
    """
    program = tl.program_id(0)
    split, program = program % splits, program // splits
    block, program = program % blocks_q, program // blocks_q
    key_head, sequence = program % key_heads, program // key_heads
    start_q, length_q = sequence_span(ranks.cu_seqlens_q, sequence, sequence + 1)
    start_k, length_k = sequence_span(ranks.cu_seqlens_k, sequence, sequence + 1)
    row_Q = block * TILE.Q + tl.arange(0, TILE.Q)
    query_Q = row_Q // group
    head_Q = key_head * group + row_Q % group
    inside = query_Q < length_q
    row_K, row_D = tl.arange(0, TILE.K), tl.arange(0, TILE.BLOCK_D)
    token_Q = (start_q + query_Q).to(tl.int64)
    row_pointers = x.q.data + token_Q[:, None] * x.q.stride + head_Q.to(tl.int64)[:, None] * x.q.head_stride
    q_QD = tl.load(row_pointers + row_D[None, :], mask=inside[:, None] & (row_D < TILE.D)[None, :], other=0.0)
    k, v = rows_of(x.k, start_k, key_head), rows_of(x.v, start_k, key_head)
    if tables.relative is not None or tables.absolute is not None:
        rank_q_Q = tl.load(ranks.rank_q + token_Q, mask=inside, other=-1)
    acc_QD = tl.zeros((TILE.Q, TILE.BLOCK_D), tl.float32)
    top_Q = tl.full((TILE.Q,), float("-inf"), tl.float32)
    total_Q = tl.zeros((TILE.Q,), tl.float32)
    shift = length_k - length_q
    part = tl.cdiv(tl.cdiv(length_k, TILE.K), splits) * TILE.K
    for first_k in range(split * part, tl.minimum(split * part + part, length_k), TILE.K):
        k_KD = load_rows(k, first_k, length_k, TILE.K, TILE, False)
        scores_QK = tl.dot(q_QD, tl.trans(k_KD), input_precision="ieee") * scale
        key_K = first_k + row_K
        visible = inside[:, None] & (key_K < length_k)[None, :]
        if CAUSAL:
            visible = visible & (key_K[None, :] <= query_Q[:, None] + shift)
        if tables.relative is not None or tables.absolute is not None:
            rank_k_K = tl.load(ranks.rank_k + start_k + key_K, mask=key_K < length_k, other=-1)
            is_pair = visible & (rank_q_Q >= 0)[:, None] & (rank_k_K >= 0)[None, :]
        if tables.relative is not None:
            bucket = tl.minimum(tl.maximum(rank_q_Q[:, None] - rank_k_K[None, :], 0), buckets - 1)
            rows = tables.relative + head_Q[:, None] * buckets
            scores_QK += tl.load(rows + bucket, mask=is_pair, other=0.0) * LOG2E
        if tables.absolute is not None:
            position = tl.minimum(rank_k_K, positions - 1)[None, :]
            rows = tables.absolute + head_Q[:, None] * positions
            scores_QK += tl.load(rows + position, mask=is_pair, other=0.0) * LOG2E
        scores_QK = tl.where(visible, scores_QK, float("-inf"))
        v_KD = load_rows(v, first_k, length_k, TILE.K, TILE, False)
        acc_QD, top_Q, total_Q = softmax_step(acc_QD, top_Q, total_Q, scores_QK, v_KD)
    is_blind_Q = total_Q == 0.0
    out_QD = acc_QD / tl.where(is_blind_Q, 1.0, total_Q)[:, None]
    at_Q = (token_Q * (key_heads * group) + head_Q) * splits + split
    lse2_Q = top_Q + tl.math.log2(tl.where(is_blind_Q, 1.0, total_Q))
    tl.store(parts_lse2 + at_Q, lse2_Q, mask=inside)
    pointers = parts + at_Q[:, None] * TILE.D + row_D[None, :]
    tl.store(pointers, out_QD, mask=inside[:, None] & (row_D < TILE.D)[None, :])


@triton.jit(do_not_specialize=["splits", "heads", "sequences"])
def combine_kernel(
    out, lse, parts, parts_lse2, cu_seqlens_q, splits, heads, sequences,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A program puts one row together: parts (Tq, Hq, splits, D) and parts_lse2 (Tq, Hq, splits) of decode_kernel.

    A row behind the last sequence has no parts: zeros, as where a query sees no key.
    """
    row = tl.program_id(0).to(tl.int64)
    parts_of_row = tl.where(row < tl.load(cu_seqlens_q + sequences).to(tl.int64) * heads, splits, 0)
    split_S, column_D = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    lse2_S = tl.load(parts_lse2 + row * splits + split_S, mask=split_S < parts_of_row, other=float("-inf"))
    top = tl.max(lse2_S, axis=0)
    is_blind = top == float("-inf")
    weights_S = tl.math.exp2(lse2_S - tl.where(is_blind, 0.0, top))
    total = tl.where(is_blind, 1.0, tl.sum(weights_S, axis=0))
    mask = (split_S < parts_of_row)[:, None] & (column_D < D)[None, :]
    parts_SD = tl.load(
        parts + (row * splits + split_S)[:, None] * D + column_D[None, :], mask=mask, other=0.0
    )
    out_D = tl.sum(parts_SD * weights_S[:, None], axis=0) / total
    tl.store(out + row * D + column_D, out_D.to(out.dtype.element_ty), mask=column_D < D)
    tl.store(lse + row, tl.where(is_blind, float("inf"), (top + tl.math.log2(total)) * LN2))
