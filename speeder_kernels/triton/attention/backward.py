"""The backward kernels of spae_attention. No atomics: each sum belongs to one program, which adds in a fixed order.

`row_terms_kernel` prepares two numbers a query. `keys_kernel`: a program owns BLOCK_K keys of one key head and walks
over the queries of all its query heads. `queries_kernel`: a program owns BLOCK_Q queries of one head and walks over
their keys. The gradients of the bias tables are in `tables.py`.

    p = exp2(score - lse),  dp = grad . v,  ds = p * (dp - delta),  delta = grad . out = sum of p dp over the keys
    grad_v = p^T grad,  grad_k = scale ds^T q,  grad_q = scale ds k;  the tables' gradients are sums of ds.

In half precision `out` has been rounded, and grad . out is off by a little: by the same for a whole row, which adds up
in the tables' gradients. But a row's ds sum to nothing, so what they do sum to is that error. Where a table takes a
gradient, `queries_kernel` comes first, with CORRECT: it sums them up, and leaves delta as exact as float32 has it.

Shape letters: Q queries of a tile, K keys of a tile, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from speeder_kernels.triton.attention.bias import (
    LOG2E,
    add_absolute,
    biased_scores,
    find_sequence,
    first_tile,
    is_far,
    load_absolute,
    load_rows,
    sequence_span,
    store_rows,
    tile_ranks,
    with_tail,
)


@triton.jit(do_not_specialize=["tokens", "heads"])
def row_terms_kernel(
    lse2,
    delta,
    grad,
    out,
    lse,
    grad_stride,
    grad_head_stride,
    tokens,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """lse2 and delta, both (Hq, Tq): the log-sum-exp in base 2, and grad . out."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    first = tl.program_id(0) // heads * BLOCK_Q
    row_Q = (first + tl.arange(0, BLOCK_Q)).to(tl.int64)
    inside = row_Q < tokens
    grad_QD = load_rows(
        grad + head * grad_head_stride, first, grad_stride, tokens, BLOCK_Q, D, BLOCK_D, False
    )
    out_QD = load_rows(out + head * D, first, heads * D, tokens, BLOCK_Q, D, BLOCK_D, False)
    delta_Q = tl.sum(grad_QD.to(tl.float32) * out_QD.to(tl.float32), axis=1)
    lse_Q = tl.load(lse + row_Q * heads + head, mask=inside, other=0.0)
    tl.store(delta + head * tokens + row_Q, delta_Q, mask=inside)
    tl.store(lse2 + head * tokens + row_Q, lse_Q * LOG2E, mask=inside)


@triton.jit
def add_queries(
    grad_k_KD,
    grad_v_KD,
    column_sums_K,
    any_wide,
    k_KD,
    v_KD,
    q,
    grad,
    lse2,
    delta,
    q_stride,
    grad_stride,
    rank_q,
    rank_k_K,
    bias_K,
    relative,
    summary_q,
    kind_k,
    low_k,
    high_k,
    first_k,
    begin,
    end,
    length_q,
    shift,
    buckets,
    scale,
    NEED_K: tl.constexpr,
    NEED_V: tl.constexpr,
    NEED_ABSOLUTE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add what queries `begin` to `end` give to a tile of keys. With CAUSAL, some may not see some of the keys.

    Tiles that are wide are left out and noted in `any_wide`; with WIDE, they alone are taken.
    """
    row_Q, row_K = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    step_QK = row_Q[:, None] - row_K[None, :]
    for first_q in range(begin, end, BLOCK_Q):
        inside = first_q + row_Q < length_q
        q_QD = load_rows(q, first_q, q_stride, length_q, BLOCK_Q, D, BLOCK_D, False)
        products_QK = tl.dot(q_QD, tl.trans(k_KD), input_precision="ieee")
        if relative is not None or bias_K is not None or NEED_ABSOLUTE:
            rank_q_Q = tl.load(rank_q + first_q + row_Q, mask=inside, other=-1)
        if relative is not None:
            kind_q, low_q, high_q = tile_ranks(summary_q, first_q // BLOCK_Q, BLOCK_Q)
            scores_QK, any_wide = biased_scores(
                products_QK, any_wide, scale, relative, buckets, kind_q, low_q, high_q, kind_k, low_k, high_k,
                step_QK, rank_q_Q, rank_k_K, WIDE, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
        else:
            scores_QK = products_QK * scale
        if bias_K is not None:
            scores_QK = add_absolute(scores_QK, rank_q_Q, bias_K)
        if CAUSAL:
            visible = (first_k - shift + row_K)[None, :] <= (first_q + row_Q)[:, None]
            scores_QK = tl.where(visible, scores_QK, float("-inf"))
        # Past the last query, and where a query sees no key, lse is +inf and the weights are 0.
        lse2_Q = tl.load(lse2 + first_q + row_Q, mask=inside, other=float("inf"))
        weights_QK = tl.math.exp2(scores_QK - lse2_Q[:, None])
        grad_QD = load_rows(grad, first_q, grad_stride, length_q, BLOCK_Q, D, BLOCK_D, False)
        if NEED_V:
            grad_v_KD = tl.dot(
                tl.trans(weights_QK.to(grad_QD.dtype)), grad_QD, grad_v_KD, input_precision="ieee"
            )
        if NEED_K or NEED_ABSOLUTE:
            delta_Q = tl.load(delta + first_q + row_Q, mask=inside, other=0.0)
            grad_weights_QK = tl.dot(grad_QD, tl.trans(v_KD), input_precision="ieee")
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
    grad,
    grad_k,
    grad_v,
    column_sums,
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
    grad_stride,
    grad_head_stride,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    tokens_q,
    tokens_k,
    key_heads,
    group,
    sequences,
    buckets,
    positions,
    softmax_scale,
    scale,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad_k and grad_v (Tk, Hkv, D), and column_sums (Hq, Tk): ds summed over a key's item queries.

    None stands for what nobody needs.
    """
    NEED_K: tl.constexpr = grad_k is not None
    NEED_V: tl.constexpr = grad_v is not None
    NEED_ABSOLUTE: tl.constexpr = column_sums is not None
    key_head = tl.program_id(0) % key_heads
    tile = tl.program_id(0) // key_heads
    sequence = find_sequence(cu_seqlens_k, tile, sequences, BLOCK_K)
    first_k = (tile - first_tile(cu_seqlens_k, sequence, BLOCK_K)) * BLOCK_K
    start_q, length_q = sequence_span(cu_seqlens_q, sequence, sequences)
    start_k, length_k = sequence_span(cu_seqlens_k, sequence, sequences)
    length_k = with_tail(start_k, length_k, sequence, sequences, tokens_k)
    if first_k < length_k:
        wide_head = key_head.to(tl.int64)
        k += start_k.to(tl.int64) * k_stride + wide_head * k_head_stride
        v += start_k.to(tl.int64) * v_stride + wide_head * v_head_stride
        k_KD = load_rows(k, first_k, k_stride, length_k, BLOCK_K, D, BLOCK_D, False)
        v_KD = k_KD
        if NEED_K or NEED_ABSOLUTE:
            v_KD = load_rows(v, first_k, v_stride, length_k, BLOCK_K, D, BLOCK_D, False)
        row_K = first_k + tl.arange(0, BLOCK_K)
        rank_k_K = tl.load(rank_k + start_k + row_K, mask=row_K < length_k, other=-1)
        kind_k, low_k, high_k = 0, 0, 0
        if relative is not None:
            kind_k, low_k, high_k = tile_ranks(summary_k, tile, BLOCK_K)
            summary_q += 2 * first_tile(cu_seqlens_q, sequence, BLOCK_Q)
        shift = length_k - length_q
        if CAUSAL:
            # The first of these keys is seen from query first_k - shift on, all of them BLOCK_K - 1 later.
            begin = tl.maximum(first_k - shift, 0) // BLOCK_Q * BLOCK_Q
            whole = tl.cdiv(tl.maximum(first_k + BLOCK_K - 1 - shift, 0), BLOCK_Q) * BLOCK_Q
        else:
            begin = 0
            whole = 0
        grad_k_KD = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        grad_v_KD = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for member in range(0, group):
            head = key_head * group + member
            wide_head = head.to(tl.int64)
            q_head = q + start_q.to(tl.int64) * q_stride + wide_head * q_head_stride
            grad_head = grad + start_q.to(tl.int64) * grad_stride + wide_head * grad_head_stride
            lse2_head = lse2 + wide_head * tokens_q + start_q
            delta_head = delta + wide_head * tokens_q + start_q
            relative_head = relative
            if relative is not None:
                relative_head = relative + head * buckets
            bias_K = absolute
            if absolute is not None:
                bias_K = load_absolute(absolute + head * positions, rank_k_K, positions)
            sums_K = tl.zeros((BLOCK_K,), tl.float32)
            any_wide = False
            if CAUSAL:
                grad_k_KD, grad_v_KD, sums_K, any_wide = add_queries(
                    grad_k_KD, grad_v_KD, sums_K, any_wide, k_KD, v_KD, q_head, grad_head, lse2_head,
                    delta_head,
                    q_stride, grad_stride, rank_q + start_q, rank_k_K, bias_K, relative_head, summary_q,
                    kind_k,
                    low_k, high_k, first_k, begin, tl.minimum(whole, length_q), length_q, shift, buckets,
                    scale,
                    NEED_K, NEED_V, NEED_ABSOLUTE, True, False, D, BLOCK_D, BLOCK_Q, BLOCK_K,
                )  # fmt: skip
            grad_k_KD, grad_v_KD, sums_K, any_wide = add_queries(
                grad_k_KD, grad_v_KD, sums_K, any_wide, k_KD, v_KD, q_head, grad_head, lse2_head, delta_head,
                q_stride, grad_stride, rank_q + start_q, rank_k_K, bias_K, relative_head, summary_q, kind_k,
                low_k, high_k, first_k, whole, length_q, length_q, shift, buckets, scale,
                NEED_K, NEED_V, NEED_ABSOLUTE, False, False, D, BLOCK_D, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
            if relative is not None:  # noqa: SIM102 - the one is decided when compiling
                if any_wide:
                    grad_k_KD, grad_v_KD, sums_K, any_wide = add_queries(
                        grad_k_KD, grad_v_KD, sums_K, any_wide, k_KD, v_KD, q_head, grad_head, lse2_head,
                        delta_head,
                        q_stride, grad_stride, rank_q + start_q, rank_k_K, bias_K, relative_head,
                        summary_q, kind_k,
                        low_k, high_k, first_k, begin, length_q, length_q, shift, buckets, scale,
                        NEED_K, NEED_V, NEED_ABSOLUTE, CAUSAL, True, D, BLOCK_D, BLOCK_Q, BLOCK_K,
                    )  # fmt: skip
            if NEED_ABSOLUTE:
                sums = column_sums + wide_head * tokens_k + start_k
                tl.store(sums + row_K, sums_K, mask=row_K < length_k)
        offset = (start_k.to(tl.int64) * key_heads + key_head) * D
        if NEED_K:
            grad_k_KD *= softmax_scale
            store_rows(grad_k + offset, first_k, key_heads * D, length_k, grad_k_KD, BLOCK_K, D, BLOCK_D)
        if NEED_V:
            store_rows(grad_v + offset, first_k, key_heads * D, length_k, grad_v_KD, BLOCK_K, D, BLOCK_D)


@triton.jit
def add_keys(
    grad_q_QD,
    sum_Q,
    far_Q,
    far_weight_Q,
    any_wide,
    q_QD,
    grad_QD,
    lse2_Q,
    delta_Q,
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
    NEED_Q: tl.constexpr,
    NEED_FAR: tl.constexpr,
    CORRECT: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add what keys `begin` to `end` give to a tile of queries, to the sums of ds over all keys (with CORRECT) and over
    those that are far, and to the weight of these.

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
        weights_QK = tl.math.exp2(scores_QK - lse2_Q[:, None])
        v_KD = load_rows(v, first_k, v_stride, length_k, BLOCK_K, D, BLOCK_D, not MASKED)
        grad_weights_QK = tl.dot(grad_QD, tl.trans(v_KD), input_precision="ieee")
        grad_scores_QK = weights_QK * (grad_weights_QK - delta_Q[:, None])
        if NEED_Q:
            grad_q_QD = tl.dot(grad_scores_QK.to(k_KD.dtype), k_KD, grad_q_QD, input_precision="ieee")
        if CORRECT:
            new_Q = tl.sum(grad_scores_QK, axis=1)
            sum_Q += new_Q
        if NEED_FAR:
            far = is_far(kind_q, low_q, kind_k, low_k, buckets, BLOCK_K)
            if CORRECT:
                far_Q += tl.where(far, new_Q, 0.0)
                far_weight_Q += tl.where(far, tl.sum(weights_QK, axis=1), 0.0)
            elif far:
                far_Q += tl.sum(grad_scores_QK, axis=1)
    return grad_q_QD, sum_Q, far_Q, far_weight_Q, any_wide


@triton.jit(do_not_specialize=["tokens_q", "heads", "group", "sequences", "buckets", "positions"])
def queries_kernel(
    grad,
    grad_q,
    far,
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
    softmax_scale,
    scale,
    CORRECT: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """grad_q (Tq, Hq, D), and far (Hq, Tq): ds summed over the keys that are so far that they share the last bucket,
    in tiles where all are. None stands for what nobody needs. With CORRECT, delta is replaced by the exact one.
    """
    NEED_Q: tl.constexpr = grad_q is not None
    NEED_FAR: tl.constexpr = far is not None
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    sequence = find_sequence(cu_seqlens_q, tile, sequences, BLOCK_Q)
    first = first_tile(cu_seqlens_q, sequence, BLOCK_Q)
    start_q, length_q = sequence_span(cu_seqlens_q, sequence, sequences)
    start_k, length_k = sequence_span(cu_seqlens_k, sequence, sequences)
    length_q = with_tail(start_q, length_q, sequence, sequences, tokens_q)
    number = tl.cdiv(length_q, BLOCK_Q) - 1 - (tile - first)  # the long ones first, as in forward
    first_q = number * BLOCK_Q
    if number >= 0:
        wide_head, key_head = head.to(tl.int64), (head // group).to(tl.int64)
        q += start_q.to(tl.int64) * q_stride + wide_head * q_head_stride
        grad += start_q.to(tl.int64) * grad_stride + wide_head * grad_head_stride
        k += start_k.to(tl.int64) * k_stride + key_head * k_head_stride
        v += start_k.to(tl.int64) * v_stride + key_head * v_head_stride
        q_QD = load_rows(q, first_q, q_stride, length_q, BLOCK_Q, D, BLOCK_D, False)
        grad_QD = load_rows(grad, first_q, grad_stride, length_q, BLOCK_Q, D, BLOCK_D, False)
        row_Q = first_q + tl.arange(0, BLOCK_Q)
        inside = row_Q < length_q
        at = wide_head * tokens_q + start_q + row_Q
        lse2_Q = tl.load(lse2 + at, mask=inside, other=float("inf"))
        delta_Q = tl.load(delta + at, mask=inside, other=0.0)
        rank_q_Q = row_Q
        kind_q, low_q, high_q = 0, 0, 0
        if relative is not None or absolute is not None:
            rank_q_Q = tl.load(rank_q + start_q + row_Q, mask=inside, other=-1)
        if relative is not None:
            relative += head * buckets
            kind_q, low_q, high_q = tile_ranks(summary_q, first + number, BLOCK_Q)
            summary_k += 2 * first_tile(cu_seqlens_k, sequence, BLOCK_K)
        if absolute is not None:
            absolute += head * positions
        rank_k += start_k
        shift = length_k - length_q
        if CAUSAL:
            seen_by_all = tl.minimum(tl.maximum(first_q + shift + 1, 0), length_k)
            end = tl.minimum(tl.maximum(tl.minimum(first_q + BLOCK_Q, length_q) + shift, 0), length_k)
        else:
            seen_by_all = length_k
            end = length_k
        whole = seen_by_all // BLOCK_K * BLOCK_K
        grad_q_QD = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        sum_Q = tl.zeros((BLOCK_Q,), tl.float32)
        far_Q = tl.zeros((BLOCK_Q,), tl.float32)
        far_weight_Q = tl.zeros((BLOCK_Q,), tl.float32)
        any_wide = False
        grad_q_QD, sum_Q, far_Q, far_weight_Q, any_wide = add_keys(
            grad_q_QD, sum_Q, far_Q, far_weight_Q, any_wide, q_QD, grad_QD, lse2_Q, delta_Q, k, v,
            k_stride, v_stride, rank_q_Q, rank_k,
            relative, absolute, summary_k, kind_q, low_q, high_q, first_q, 0, whole, length_k, shift,
            buckets, positions, scale, NEED_Q, NEED_FAR, CORRECT, CAUSAL, False, False, D, BLOCK_D, BLOCK_Q,
            BLOCK_K,
        )  # fmt: skip
        grad_q_QD, sum_Q, far_Q, far_weight_Q, any_wide = add_keys(
            grad_q_QD, sum_Q, far_Q, far_weight_Q, any_wide, q_QD, grad_QD, lse2_Q, delta_Q, k, v,
            k_stride, v_stride, rank_q_Q, rank_k,
            relative, absolute, summary_k, kind_q, low_q, high_q, first_q, whole, end, length_k, shift,
            buckets, positions, scale, NEED_Q, NEED_FAR, CORRECT, CAUSAL, True, False, D, BLOCK_D, BLOCK_Q,
            BLOCK_K,
        )  # fmt: skip
        if relative is not None:  # noqa: SIM102 - the one is decided when compiling
            if any_wide:  # such a tile is not far
                grad_q_QD, sum_Q, far_Q, far_weight_Q, any_wide = add_keys(
                    grad_q_QD, sum_Q, far_Q, far_weight_Q, any_wide, q_QD, grad_QD, lse2_Q, delta_Q, k, v,
                    k_stride, v_stride, rank_q_Q, rank_k,
                    relative, absolute, summary_k, kind_q, low_q, high_q, first_q, 0, end, length_k, shift,
                    buckets, positions, scale, NEED_Q, False, CORRECT, CAUSAL, True, True, D, BLOCK_D,
                    BLOCK_Q, BLOCK_K,
                )  # fmt: skip
        if NEED_Q:
            grad_q += (start_q.to(tl.int64) * heads + head) * D
            grad_q_QD *= softmax_scale
            store_rows(grad_q, first_q, heads * D, length_q, grad_q_QD, BLOCK_Q, D, BLOCK_D)
        if CORRECT:
            far_Q -= sum_Q * far_weight_Q
            tl.store(delta + at, delta_Q + sum_Q, mask=inside)
        if NEED_FAR:
            tl.store(far + at, far_Q, mask=inside)
