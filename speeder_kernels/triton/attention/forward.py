"""The forward kernel of spae_attention: a program owns BLOCK_Q queries of one head and walks over their keys.

Shape letters: Q queries of a tile, K keys of a tile, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from speeder_kernels.triton.attention.bias import (
    LN2,
    add_absolute,
    biased_scores,
    find_sequence,
    first_tile,
    load_absolute,
    load_rows,
    sequence_span,
    store_rows,
    tile_ranks,
    with_tail,
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
    acc_QD,
    top_Q,
    total_Q,
    any_wide,
    q_QD,
    k,
    v,
    k_stride,
    v_stride,
    rank_q_Q,
    rank_k,
    relative,
    absolute,
    summary_k,
    kind_q,
    low_q,
    high_q,
    first_q,
    begin,
    end,
    length_k,
    shift,
    buckets,
    positions,
    scale,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Attend to keys `begin` to `end`. Without MASKED, every query sees all of them.

    Tiles that are wide are left out and noted in `any_wide`; with WIDE, they alone are taken.
    """
    row_Q, row_K = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    step_QK = row_Q[:, None] - row_K[None, :]
    # What does not change in the loop is computed again rather than held: registers are short.
    for first_k in tl.range(begin, end, BLOCK_K, disable_licm=True):
        k_KD = load_rows(k, first_k, k_stride, length_k, BLOCK_K, D, BLOCK_D, not MASKED)
        products_QK = tl.dot(q_QD, tl.trans(k_KD), input_precision="ieee")
        if relative is not None or absolute is not None:
            rank_k_K = tl.load(rank_k + first_k + row_K, mask=first_k + row_K < length_k, other=-1)
        if relative is not None:
            kind_k, low_k, high_k = tile_ranks(summary_k, first_k // BLOCK_K, BLOCK_K)
            scores_QK, any_wide = biased_scores(
                products_QK, any_wide, scale, relative, buckets, kind_q, low_q, high_q, kind_k, low_k, high_k,
                step_QK, rank_q_Q, rank_k_K, WIDE, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
        else:
            scores_QK = products_QK * scale
        if absolute is not None:
            scores_QK = add_absolute(scores_QK, rank_q_Q, load_absolute(absolute, rank_k_K, positions))
        if MASKED:
            visible = (first_k + row_K < length_k)[None, :]
            if CAUSAL:
                visible = visible & ((first_k + row_K)[None, :] <= (first_q + shift + row_Q)[:, None])
            scores_QK = tl.where(visible, scores_QK, float("-inf"))
        v_KD = load_rows(v, first_k, v_stride, length_k, BLOCK_K, D, BLOCK_D, not MASKED)
        acc_QD, top_Q, total_Q = softmax_step(acc_QD, top_Q, total_Q, scores_QK, v_KD)
    return acc_QD, top_Q, total_Q, any_wide


@triton.jit(do_not_specialize=["tokens_q", "heads", "group", "sequences", "buckets", "positions"])
def forward_kernel(
    out,
    lse,
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    rank_q,
    rank_k,
    relative,
    absolute,
    summary_q,
    summary_k,
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
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out (Tq, Hq, D) and lse (Tq, Hq), contiguous; `group` query heads share a key head.

    `relative` comes with the summaries of `describe_kernel`; None, like `absolute`,
    where there is no such bias.
    """
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    sequence = find_sequence(cu_seqlens_q, tile, sequences, BLOCK_Q)
    first = first_tile(cu_seqlens_q, sequence, BLOCK_Q)
    start_q, length_q = sequence_span(cu_seqlens_q, sequence, sequences)
    start_k, length_k = sequence_span(cu_seqlens_k, sequence, sequences)
    length_q = with_tail(start_q, length_q, sequence, sequences, tokens_q)
    # A sequence's last queries see the most keys: they begin first, so that no long program is left for the end.
    number = tl.cdiv(length_q, BLOCK_Q) - 1 - (tile - first)
    first_q = number * BLOCK_Q
    if number >= 0:
        wide_head, key_head = head.to(tl.int64), (head // group).to(tl.int64)
        q += start_q.to(tl.int64) * q_stride + wide_head * q_head_stride
        k += start_k.to(tl.int64) * k_stride + key_head * k_head_stride
        v += start_k.to(tl.int64) * v_stride + key_head * v_head_stride
        q_QD = load_rows(q, first_q, q_stride, length_q, BLOCK_Q, D, BLOCK_D, False)
        row_Q = first_q + tl.arange(0, BLOCK_Q)
        rank_q_Q = row_Q
        kind_q, low_q, high_q = 0, 0, 0
        if relative is not None or absolute is not None:
            rank_q_Q = tl.load(rank_q + start_q + row_Q, mask=row_Q < length_q, other=-1)
        if relative is not None:
            relative += head * buckets
            kind_q, low_q, high_q = tile_ranks(summary_q, first + number, BLOCK_Q)
            summary_k += 2 * first_tile(cu_seqlens_k, sequence, BLOCK_K)
        if absolute is not None:
            absolute += head * positions
        rank_k += start_k
        acc_QD = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        top_Q = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        total_Q = tl.zeros((BLOCK_Q,), tl.float32)
        shift = length_k - length_q
        if CAUSAL:
            # The first query sees keys up to first_q + shift, and the last one the most.
            seen_by_all = tl.minimum(tl.maximum(first_q + shift + 1, 0), length_k)
            end = tl.minimum(tl.maximum(tl.minimum(first_q + BLOCK_Q, length_q) + shift, 0), length_k)
        else:
            seen_by_all = length_k
            end = length_k
        whole = seen_by_all // BLOCK_K * BLOCK_K
        any_wide = False
        acc_QD, top_Q, total_Q, any_wide = attend(
            acc_QD, top_Q, total_Q, any_wide, q_QD, k, v, k_stride, v_stride, rank_q_Q, rank_k, relative,
            absolute,
            summary_k, kind_q, low_q, high_q, first_q, 0, whole, length_k, shift, buckets, positions, scale,
            CAUSAL, False, False, D, BLOCK_D, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        acc_QD, top_Q, total_Q, any_wide = attend(
            acc_QD, top_Q, total_Q, any_wide, q_QD, k, v, k_stride, v_stride, rank_q_Q, rank_k, relative,
            absolute,
            summary_k, kind_q, low_q, high_q, first_q, whole, end, length_k, shift, buckets, positions, scale,
            CAUSAL, True, False, D, BLOCK_D, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        if relative is not None:  # noqa: SIM102 - the one is decided when compiling
            if any_wide:
                acc_QD, top_Q, total_Q, any_wide = attend(
                    acc_QD, top_Q, total_Q, any_wide, q_QD, k, v, k_stride, v_stride, rank_q_Q, rank_k,
                    relative, absolute,
                    summary_k, kind_q, low_q, high_q, first_q, 0, end, length_k, shift, buckets,
                    positions, scale,
                    CAUSAL, True, True, D, BLOCK_D, BLOCK_Q, BLOCK_K,
                )  # fmt: skip
        is_blind_Q = total_Q == 0.0
        out_QD = acc_QD / tl.where(is_blind_Q, 1.0, total_Q)[:, None]
        out += (start_q.to(tl.int64) * heads + head) * D
        store_rows(out, first_q, heads * D, length_q, out_QD, BLOCK_Q, D, BLOCK_D)
        lse_Q = tl.where(is_blind_Q, float("inf"), (top_Q + tl.math.log2(total_Q)) * LN2)
        tl.store(lse + (start_q + row_Q).to(tl.int64) * heads + head, lse_Q, mask=row_Q < length_q)
