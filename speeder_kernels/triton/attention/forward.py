"""The forward kernel: a program owns a tile of queries of one head and walks over their keys.

Shape letters: Q queries of a tile, K keys of a tile, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from speeder_kernels.triton.attention.bias import LN2, add_absolute, biased_scores, load_absolute
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
    QueryTile,
    Ranks,
    Tables,
    TileRanks,
    TileShape,
)


@triton.jit
def softmax_step(acc_QD, top_Q, total_Q, scores_QK, v_KD):
    """Take one more block of keys into the running maximum, sum and output."""
    new_top_Q = tl.maximum(top_Q, tl.max(scores_QK, axis=1))
    base_Q = tl.where(new_top_Q == float("-inf"), 0.0, new_top_Q)  # of a row that has seen no key
    weights_QK = tl.math.exp2(scores_QK - base_Q[:, None])
    shrink_Q = tl.math.exp2(top_Q - base_Q)
    total_Q = total_Q * shrink_Q + tl.sum(weights_QK, axis=1)
    acc_QD = tl.dot(weights_QK.to(v_KD.dtype), v_KD, acc_QD * shrink_Q[:, None], input_precision="ieee")
    return acc_QD, new_top_Q, total_Q


@triton.jit
def attend(
    sums, queries: QueryTile, keys: Keys, tables: HeadTables, begin, end, shift, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, TILE: TileShape,
):  # fmt: skip
    """Attend to keys `begin` to `end`: `sums` are acc_QD, top_Q, total_Q and any_wide. Without MASKED, every query
    sees all of these keys.

    Tiles that are wide are left out and noted in `any_wide`; with WIDE, they alone are taken.
    """
    acc_QD, top_Q, total_Q, any_wide = sums
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
        v_KD = load_rows(keys.v, first_k, keys.length, TILE.K, TILE, not MASKED)
        acc_QD, top_Q, total_Q = softmax_step(acc_QD, top_Q, total_Q, scores_QK, v_KD)
    return acc_QD, top_Q, total_Q, any_wide


@triton.jit(do_not_specialize=["tokens_q", "heads", "group", "sequences", "buckets", "positions"])
def forward_kernel(
    out, lse, x: Inputs, ranks: Ranks, tables: Tables, tokens_q, heads, group, sequences, buckets, positions, scale,
    CAUSAL: tl.constexpr, TILE: TileShape,
):  # fmt: skip
    """out (Tq, Hq, D) and lse (Tq, Hq), contiguous; `group` query heads share a key head."""
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    sequence = find_sequence(ranks.cu_seqlens_q, tile, sequences, TILE.Q)
    first = first_tile(ranks.cu_seqlens_q, sequence, TILE.Q)
    start_q, length_q = sequence_span(ranks.cu_seqlens_q, sequence, sequences)
    start_k, length_k = sequence_span(ranks.cu_seqlens_k, sequence, sequences)
    length_q = with_tail(start_q, length_q, sequence, sequences, tokens_q)
    # A sequence's last queries see the most keys: they begin first, so that no long program is left for the end.
    number = tl.cdiv(length_q, TILE.Q) - 1 - (tile - first)
    first_q = number * TILE.Q
    if number >= 0:
        query_head, key_head = head.to(tl.int64), (head // group).to(tl.int64)
        q = rows_of(x.q, start_q, query_head)
        k = rows_of(x.k, start_k, key_head)
        v = rows_of(x.v, start_k, key_head)
        q_QD = load_rows(q, first_q, length_q, TILE.Q, TILE, False)
        row_Q = first_q + tl.arange(0, TILE.Q)
        rank_q_Q = row_Q
        ranks_q = TileRanks(kind=0, low=0, high=0)
        relative, absolute, summary_k = tables.relative, tables.absolute, ranks.summary_k
        if relative is not None or absolute is not None:
            rank_q_Q = tl.load(ranks.rank_q + start_q + row_Q, mask=row_Q < length_q, other=-1)
        if relative is not None:
            relative += head * buckets
            ranks_q = tile_ranks(ranks.summary_q, first + number, TILE.Q)
            summary_k += 2 * first_tile(ranks.cu_seqlens_k, sequence, TILE.K)
        if absolute is not None:
            absolute += head * positions
        queries = QueryTile(q_QD=q_QD, rank_Q=rank_q_Q, ranks=ranks_q, first=first_q)
        keys = Keys(k=k, v=v, rank=ranks.rank_k + start_k, summary=summary_k, length=length_k)
        biases = HeadTables(relative=relative, buckets=buckets, absolute=absolute, positions=positions)
        acc_QD = tl.zeros((TILE.Q, TILE.BLOCK_D), tl.float32)
        top_Q = tl.full((TILE.Q,), float("-inf"), tl.float32)
        total_Q = tl.zeros((TILE.Q,), tl.float32)
        any_wide = False
        shift = length_k - length_q
        whole, end = seen_keys(first_q, length_q, length_k, CAUSAL, TILE)
        acc_QD, top_Q, total_Q, any_wide = attend(
            (acc_QD, top_Q, total_Q, any_wide), queries, keys, biases, 0, whole, shift, scale,
            CAUSAL, False, False, TILE,
        )  # fmt: skip
        acc_QD, top_Q, total_Q, any_wide = attend(
            (acc_QD, top_Q, total_Q, any_wide), queries, keys, biases, whole, end, shift, scale,
            CAUSAL, True, False, TILE,
        )  # fmt: skip
        if relative is not None:  # noqa: SIM102 - the one is decided when compiling
            if any_wide:
                acc_QD, top_Q, total_Q, any_wide = attend(
                    (acc_QD, top_Q, total_Q, any_wide), queries, keys, biases, 0, end, shift, scale,
                    CAUSAL, True, True, TILE,
                )  # fmt: skip
        is_blind_Q = total_Q == 0.0
        out_QD = acc_QD / tl.where(is_blind_Q, 1.0, total_Q)[:, None]
        out += (start_q.to(tl.int64) * heads + head) * TILE.D
        store_rows(out, first_q, heads * TILE.D, length_q, out_QD, TILE.Q, TILE)
        lse_Q = tl.where(is_blind_Q, float("inf"), (top_Q + tl.math.log2(total_Q)) * LN2)
        tl.store(lse + (start_q + row_Q).to(tl.int64) * heads + head, lse_Q, mask=row_Q < length_q)
