"""The gradients of k and v, and the sums of the absolute table's: a program owns a tile of keys of one key head and
walks over the queries of all its query heads. `backward_rows.py` has the formulas.

Shape letters: Q queries of a tile, K keys of a tile, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from speeder_kernels.triton.attention.bias import add_absolute, biased_scores, load_absolute
from speeder_kernels.triton.attention.ranks import tile_ranks
from speeder_kernels.triton.attention.sequences import (
    find_sequence,
    first_tile,
    load_rows,
    of_head,
    of_sequence,
    rows_of,
    sequence_span,
    store_rows,
    with_tail,
)
from speeder_kernels.triton.attention.tuples import (
    HeadTables,
    Inputs,
    KeyGradients,
    KeyTile,
    Queries,
    Ranks,
    RowTerms,
    Scales,
    Tables,
    TileRanks,
    TileShape,
)


@triton.jit
def add_queries(
    sums, keys: KeyTile, queries: Queries, tables: HeadTables, begin, end, shift, scale,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, NEED_ABSOLUTE: tl.constexpr,
    CAUSAL: tl.constexpr, WIDE: tl.constexpr, TILE: TileShape,
):  # fmt: skip
    """Add what queries `begin` to `end` give to a tile of keys. `sums` are the gradients of k and v, the sums of ds
    over the queries, and any_wide. With CAUSAL, some queries may not see some of the keys.

    Tiles that are wide are left out and noted in `any_wide`; with WIDE, they alone are taken.
    """
    grad_k_KD, grad_v_KD, column_sums_K, any_wide = sums
    row_Q, row_K = tl.arange(0, TILE.Q), tl.arange(0, TILE.K)
    step_QK = row_Q[:, None] - row_K[None, :]
    for first_q in range(begin, end, TILE.Q):
        inside = first_q + row_Q < queries.length
        q_QD = load_rows(queries.q, first_q, queries.length, TILE.Q, TILE, False)
        products_QK = tl.dot(q_QD, tl.trans(keys.k_KD), input_precision="ieee")
        if tables.relative is not None or keys.bias_K is not None or NEED_ABSOLUTE:
            rank_q_Q = tl.load(queries.rank + first_q + row_Q, mask=inside, other=-1)
        if tables.relative is not None:
            ranks_q = tile_ranks(queries.summary, first_q // TILE.Q, TILE.Q)
            scores_QK, any_wide = biased_scores(
                products_QK, any_wide, scale, tables, ranks_q, keys.ranks, step_QK, rank_q_Q, keys.rank_K,
                WIDE, TILE,
            )  # fmt: skip
        else:
            scores_QK = products_QK * scale
        if keys.bias_K is not None:
            scores_QK = add_absolute(scores_QK, rank_q_Q, keys.bias_K)
        if CAUSAL:
            visible = (keys.first - shift + row_K)[None, :] <= (first_q + row_Q)[:, None]
            scores_QK = tl.where(visible, scores_QK, float("-inf"))
        # Past the last query, and where a query sees no key, lse is +inf and the weights are 0.
        lse2_Q = tl.load(queries.lse2 + first_q + row_Q, mask=inside, other=float("inf"))
        weights_QK = tl.math.exp2(scores_QK - lse2_Q[:, None])
        grad_QD = load_rows(queries.grad, first_q, queries.length, TILE.Q, TILE, False)
        if NEED_V:
            grad_v_KD = tl.dot(
                tl.trans(weights_QK.to(grad_QD.dtype)), grad_QD, grad_v_KD, input_precision="ieee"
            )
        if NEED_K or NEED_ABSOLUTE:
            delta_Q = tl.load(queries.delta + first_q + row_Q, mask=inside, other=0.0)
            grad_weights_QK = tl.dot(grad_QD, tl.trans(keys.v_KD), input_precision="ieee")
            grad_scores_QK = weights_QK * (grad_weights_QK - delta_Q[:, None])
            if NEED_K:
                grad_k_KD = tl.dot(
                    tl.trans(grad_scores_QK.to(q_QD.dtype)), q_QD, grad_k_KD, input_precision="ieee"
                )
            if NEED_ABSOLUTE:
                of_items_QK = tl.where((rank_q_Q >= 0)[:, None], grad_scores_QK, 0.0)
                column_sums_K += tl.sum(of_items_QK, axis=0)
    return grad_k_KD, grad_v_KD, column_sums_K, any_wide


@triton.jit(
    do_not_specialize=["tokens_q", "tokens_k", "key_heads", "group", "sequences", "buckets", "positions"]
)
def keys_kernel(
    grads: KeyGradients, x: Inputs, terms: RowTerms, ranks: Ranks, tables: Tables,
    tokens_q, tokens_k, key_heads, group, sequences, buckets, positions, scales: Scales,
    CAUSAL: tl.constexpr, TILE: TileShape,
):  # fmt: skip
    """What `grads` ask for: the gradients of k and v (Tk, Hkv, D), contiguous, and column_sums (Hq, Tk)."""
    NEED_K: tl.constexpr = grads.k is not None
    NEED_V: tl.constexpr = grads.v is not None
    NEED_ABSOLUTE: tl.constexpr = grads.column_sums is not None
    key_head = tl.program_id(0) % key_heads
    tile = tl.program_id(0) // key_heads
    sequence = find_sequence(ranks.cu_seqlens_k, tile, sequences, TILE.K)
    first_k = (tile - first_tile(ranks.cu_seqlens_k, sequence, TILE.K)) * TILE.K
    start_q, length_q = sequence_span(ranks.cu_seqlens_q, sequence, sequences)
    start_k, length_k = sequence_span(ranks.cu_seqlens_k, sequence, sequences)
    length_k = with_tail(start_k, length_k, sequence, sequences, tokens_k)
    if first_k < length_k:
        k = rows_of(x.k, start_k, key_head)
        v = rows_of(x.v, start_k, key_head)
        k_KD = load_rows(k, first_k, length_k, TILE.K, TILE, False)
        v_KD = k_KD
        if NEED_K or NEED_ABSOLUTE:
            v_KD = load_rows(v, first_k, length_k, TILE.K, TILE, False)
        row_K = first_k + tl.arange(0, TILE.K)
        rank_k_K = tl.load(ranks.rank_k + start_k + row_K, mask=row_K < length_k, other=-1)
        ranks_k = TileRanks(kind=0, low=0, high=0)
        summary_q = ranks.summary_q
        if tables.relative is not None:
            ranks_k = tile_ranks(ranks.summary_k, tile, TILE.K)
            summary_q += 2 * first_tile(ranks.cu_seqlens_q, sequence, TILE.Q)
        shift = length_k - length_q
        if CAUSAL:
            # The first of these keys is seen from query first_k - shift on, all of them TILE.K - 1 later.
            begin = tl.maximum(first_k - shift, 0) // TILE.Q * TILE.Q
            whole = tl.cdiv(tl.maximum(first_k + TILE.K - 1 - shift, 0), TILE.Q) * TILE.Q
        else:
            begin = 0
            whole = 0
        grad_k_KD = tl.zeros((TILE.K, TILE.BLOCK_D), tl.float32)
        grad_v_KD = tl.zeros((TILE.K, TILE.BLOCK_D), tl.float32)
        for member in range(0, group):
            head = key_head * group + member
            queries = Queries(
                q=of_head(of_sequence(x.q, start_q), head),
                grad=of_head(of_sequence(x.grad, start_q), head),
                lse2=terms.lse2 + head.to(tl.int64) * tokens_q + start_q,
                delta=terms.delta + head.to(tl.int64) * tokens_q + start_q,
                rank=ranks.rank_q + start_q,
                summary=summary_q,
                length=length_q,
            )
            relative, bias_K = tables.relative, tables.absolute
            if relative is not None:
                relative += head * buckets
            if bias_K is not None:
                bias_K = load_absolute(bias_K + head * positions, rank_k_K, positions)
            keys = KeyTile(k_KD=k_KD, v_KD=v_KD, rank_K=rank_k_K, bias_K=bias_K, ranks=ranks_k, first=first_k)
            biases = HeadTables(relative=relative, buckets=buckets, absolute=None, positions=positions)
            sums_K = tl.zeros((TILE.K,), tl.float32)
            any_wide = False
            if CAUSAL:
                grad_k_KD, grad_v_KD, sums_K, any_wide = add_queries(
                    (grad_k_KD, grad_v_KD, sums_K, any_wide), keys, queries, biases,
                    begin, tl.minimum(whole, length_q), shift, scales.base2,
                    NEED_K, NEED_V, NEED_ABSOLUTE, True, False, TILE,
                )  # fmt: skip
            grad_k_KD, grad_v_KD, sums_K, any_wide = add_queries(
                (grad_k_KD, grad_v_KD, sums_K, any_wide), keys, queries, biases, whole, length_q, shift, scales.base2,
                NEED_K, NEED_V, NEED_ABSOLUTE, False, False, TILE,
            )  # fmt: skip
            if tables.relative is not None:  # noqa: SIM102 - the one is decided when compiling
                if any_wide:
                    grad_k_KD, grad_v_KD, sums_K, any_wide = add_queries(
                        (grad_k_KD, grad_v_KD, sums_K, any_wide), keys, queries, biases,
                        begin, length_q, shift, scales.base2,
                        NEED_K, NEED_V, NEED_ABSOLUTE, CAUSAL, True, TILE,
                    )  # fmt: skip
            if NEED_ABSOLUTE:
                sums = grads.column_sums + head.to(tl.int64) * tokens_k + start_k
                tl.store(sums + row_K, sums_K, mask=row_K < length_k)
        offset = (start_k.to(tl.int64) * key_heads + key_head) * TILE.D
        stride = key_heads * TILE.D
        if NEED_K:
            grad_k_KD *= scales.natural
            store_rows(grads.k + offset, first_k, stride, length_k, grad_k_KD, TILE.K, TILE)
        if NEED_V:
            store_rows(grads.v + offset, first_k, stride, length_k, grad_v_KD, TILE.K, TILE)
