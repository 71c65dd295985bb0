"""The gradient of q, and sums that the bias tables' gradients need: a program owns a tile of queries of one head and
walks over their keys. `backward_rows.py` has the formulas.

Shape letters: Q queries of a tile, K keys of a tile, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from speeder_kernels.triton.attention.bias import add_absolute, biased_scores, is_far, load_absolute
from speeder_kernels.triton.attention.ranks import tile_ranks
from speeder_kernels.triton.attention.sequences import (
    find_sequence,
    first_tile,
    load_rows,
    rows_of,
    seen_keys,
    sequence_span,
    store_rows,
    with_tail,
)
from speeder_kernels.triton.attention.tuples import (
    HeadTables,
    Inputs,
    Keys,
    OutputTile,
    QueryTile,
    Ranks,
    RowTerms,
    Scales,
    Tables,
    TileRanks,
    TileShape,
)


@triton.jit
def add_keys(
    sums, queries: QueryTile, outputs: OutputTile, keys: Keys, tables: HeadTables, begin, end, shift, scale,
    NEED_Q: tl.constexpr, NEED_FAR: tl.constexpr, CORRECT: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, TILE: TileShape,
):  # fmt: skip
    """Add what keys `begin` to `end` give to a tile of queries. `sums` are the gradient of q, the sums of ds over all
    keys (with CORRECT) and over those that are far, the weight of these, and any_wide.

    Tiles that are wide are left out and noted in `any_wide`; with WIDE, they alone are taken.
    """
    grad_q_QD, sum_Q, far_Q, far_weight_Q, any_wide = sums
    row_Q, row_K = tl.arange(0, TILE.Q), tl.arange(0, TILE.K)
    step_QK = row_Q[:, None] - row_K[None, :]
    # What does not change in the loop is computed again rather than held: registers are short.
    for first_k in tl.range(begin, end, TILE.K, disable_licm=True):
        k_KD = load_rows(keys.k, first_k, keys.length, TILE.K, TILE, not MASKED)
        products_QK = tl.dot(queries.q_QD, tl.trans(k_KD), input_precision="ieee")
        if tables.relative is not None or tables.absolute is not None:
            rank_k_K = tl.load(keys.rank + first_k + row_K, mask=first_k + row_K < keys.length, other=-1)
        if tables.relative is not None:
            ranks_k = tile_ranks(keys.summary, first_k // TILE.K, TILE.K)
            scores_QK, any_wide = biased_scores(
                products_QK, any_wide, scale, tables, queries.ranks, ranks_k, step_QK, queries.rank_Q, rank_k_K,
                WIDE, TILE,
            )  # fmt: skip
        else:
            scores_QK = products_QK * scale
        if tables.absolute is not None:
            bias_K = load_absolute(tables.absolute, rank_k_K, tables.positions)
            scores_QK = add_absolute(scores_QK, queries.rank_Q, bias_K)
        if MASKED:
            visible = (first_k + row_K < keys.length)[None, :]
            if CAUSAL:
                visible = visible & ((first_k + row_K)[None, :] <= (queries.first + shift + row_Q)[:, None])
            scores_QK = tl.where(visible, scores_QK, float("-inf"))
        weights_QK = tl.math.exp2(scores_QK - outputs.lse2_Q[:, None])
        v_KD = load_rows(keys.v, first_k, keys.length, TILE.K, TILE, not MASKED)
        grad_weights_QK = tl.dot(outputs.grad_QD, tl.trans(v_KD), input_precision="ieee")
        grad_scores_QK = weights_QK * (grad_weights_QK - outputs.delta_Q[:, None])
        if NEED_Q:
            grad_q_QD = tl.dot(grad_scores_QK.to(k_KD.dtype), k_KD, grad_q_QD, input_precision="ieee")
        if CORRECT:
            new_Q = tl.sum(grad_scores_QK, axis=1)
            sum_Q += new_Q
        if NEED_FAR:
            far = is_far(queries.ranks, ranks_k, tables.buckets, TILE.K)
            if CORRECT:
                far_Q += tl.where(far, new_Q, 0.0)
                far_weight_Q += tl.where(far, tl.sum(weights_QK, axis=1), 0.0)
            elif far:
                far_Q += tl.sum(grad_scores_QK, axis=1)
    return grad_q_QD, sum_Q, far_Q, far_weight_Q, any_wide


@triton.jit(do_not_specialize=["tokens_q", "heads", "group", "sequences", "buckets", "positions"])
def queries_kernel(
    grad_q, far, x: Inputs, terms: RowTerms, ranks: Ranks, tables: Tables,
    tokens_q, heads, group, sequences, buckets, positions, scales: Scales,
    CORRECT: tl.constexpr, CAUSAL: tl.constexpr, TILE: TileShape,
):  # fmt: skip
    """grad_q (Tq, Hq, D), and far (Hq, Tq): ds summed over the keys that are so far that they share the last bucket,
    in tiles where all are. None stands for what nobody needs. With CORRECT, delta is replaced by the exact one.
    """
    NEED_Q: tl.constexpr = grad_q is not None
    NEED_FAR: tl.constexpr = far is not None
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    sequence = find_sequence(ranks.cu_seqlens_q, tile, sequences, TILE.Q)
    first = first_tile(ranks.cu_seqlens_q, sequence, TILE.Q)
    start_q, length_q = sequence_span(ranks.cu_seqlens_q, sequence, sequences)
    start_k, length_k = sequence_span(ranks.cu_seqlens_k, sequence, sequences)
    length_q = with_tail(start_q, length_q, sequence, sequences, tokens_q)
    number = tl.cdiv(length_q, TILE.Q) - 1 - (tile - first)  # the long ones first, as in forward
    first_q = number * TILE.Q
    if number >= 0:
        query_head, key_head = head.to(tl.int64), (head // group).to(tl.int64)
        q = rows_of(x.q, start_q, query_head)
        grad = rows_of(x.grad, start_q, query_head)
        k = rows_of(x.k, start_k, key_head)
        v = rows_of(x.v, start_k, key_head)
        q_QD = load_rows(q, first_q, length_q, TILE.Q, TILE, False)
        grad_QD = load_rows(grad, first_q, length_q, TILE.Q, TILE, False)
        row_Q = first_q + tl.arange(0, TILE.Q)
        inside = row_Q < length_q
        at = query_head * tokens_q + start_q + row_Q
        lse2_Q = tl.load(terms.lse2 + at, mask=inside, other=float("inf"))
        delta_Q = tl.load(terms.delta + at, mask=inside, other=0.0)
        rank_q_Q = row_Q
        ranks_q = TileRanks(kind=0, low=0, high=0)
        relative, absolute, summary_k = tables.relative, tables.absolute, ranks.summary_k
        if relative is not None or absolute is not None:
            rank_q_Q = tl.load(ranks.rank_q + start_q + row_Q, mask=inside, other=-1)
        if relative is not None:
            relative += head * buckets
            ranks_q = tile_ranks(ranks.summary_q, first + number, TILE.Q)
            summary_k += 2 * first_tile(ranks.cu_seqlens_k, sequence, TILE.K)
        if absolute is not None:
            absolute += head * positions
        queries = QueryTile(q_QD=q_QD, rank_Q=rank_q_Q, ranks=ranks_q, first=first_q)
        outputs = OutputTile(grad_QD=grad_QD, lse2_Q=lse2_Q, delta_Q=delta_Q)
        keys = Keys(k=k, v=v, rank=ranks.rank_k + start_k, summary=summary_k, length=length_k)
        biases = HeadTables(relative=relative, buckets=buckets, absolute=absolute, positions=positions)
        grad_q_QD = tl.zeros((TILE.Q, TILE.BLOCK_D), tl.float32)
        sum_Q = tl.zeros((TILE.Q,), tl.float32)
        far_Q = tl.zeros((TILE.Q,), tl.float32)
        far_weight_Q = tl.zeros((TILE.Q,), tl.float32)
        any_wide = False
        shift = length_k - length_q
        whole, end = seen_keys(first_q, length_q, length_k, CAUSAL, TILE)
        grad_q_QD, sum_Q, far_Q, far_weight_Q, any_wide = add_keys(
            (grad_q_QD, sum_Q, far_Q, far_weight_Q, any_wide), queries, outputs, keys, biases, 0, whole, shift,
            scales.base2, NEED_Q, NEED_FAR, CORRECT, CAUSAL, False, False, TILE,
        )  # fmt: skip
        grad_q_QD, sum_Q, far_Q, far_weight_Q, any_wide = add_keys(
            (grad_q_QD, sum_Q, far_Q, far_weight_Q, any_wide), queries, outputs, keys, biases, whole, end, shift,
            scales.base2, NEED_Q, NEED_FAR, CORRECT, CAUSAL, True, False, TILE,
        )  # fmt: skip
        if relative is not None:  # noqa: SIM102 - the one is decided when compiling
            if any_wide:  # such a tile is not far
                grad_q_QD, sum_Q, far_Q, far_weight_Q, any_wide = add_keys(
                    (grad_q_QD, sum_Q, far_Q, far_weight_Q, any_wide), queries, outputs, keys, biases, 0, end, shift,
                    scales.base2, NEED_Q, False, CORRECT, CAUSAL, True, True, TILE,
                )  # fmt: skip
        if NEED_Q:
            grad_q += (start_q.to(tl.int64) * heads + head) * TILE.D
            grad_q_QD *= scales.natural
            store_rows(grad_q, first_q, heads * TILE.D, length_q, grad_q_QD, TILE.Q, TILE)
        if CORRECT:
            far_Q -= sum_Q * far_weight_Q
            tl.store(terms.delta + at, delta_Q + sum_Q, mask=inside)
        if NEED_FAR:
            tl.store(far + at, far_Q, mask=inside)
