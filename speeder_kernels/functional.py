"""The five public ops: what they compute, what they take, and the static checks of their arguments.

All take packed sequences: `T` tokens of `B` sequences end to end, no padding. All run in float32, bfloat16
and float16 with sums in float32 (and in float64 on the reference backend), give gradients that are
bit-identical from run to run on one machine with one number of threads, and work under `torch.compile`.
A batch of nothing (no tokens, no items, no rows) gives an empty result.

First derivatives in reverse mode only: a second one, forward mode and `torch.func.grad` and its like raise
NotImplementedError. Numbers (scales, eps, k, lengths) take no gradient, and a tensor that requires one is refused.

The numbers in integer tensors are checked on a CPU; on a GPU that would wait for the device, so there they are
checked only where the environment variable SPEEDER_CHECK is 1, and by the reference backend. What numbers out of
range give otherwise is in docs/kernels.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from speeder_kernels.derivatives import refuse_transforms
from speeder_kernels.validate import (
    FLOATS,
    FLOATS_AND_DOUBLE,
    HALVES,
    INTEGERS,
    check_bool,
    check_constant,
    check_count,
    check_not_empty,
    check_number,
    check_positive,
    check_tensor,
)

_OPS = torch.ops.speeder


def _float_device(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> torch.device:
    """Check the argument that sets dtype and device for the others, and return its device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    check_tensor(name, tensor, tuple("x" for _ in tensor.shape), dtypes, tensor.device)
    return tensor.device


def spae_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    rank_q: Tensor,
    rank_k: Tensor,
    relative_bias: Tensor | None = None,
    absolute_bias: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Attention over packed sequences with a learned bias between items: Sequential Position Awareness.

        score[h,i,j] = softmax_scale * q_i.k_j + pair * (relative_bias[h, clamp(rank_q_i - rank_k_j, 0, R-1)]
                                                         + absolute_bias[h, clamp(rank_k_j, 0, A-1)])

    where `pair` is 1 if both tokens are items (rank >= 0) and 0 otherwise. The formula is this project's
    reading of the paper's abstract. The causal mask is aligned to the bottom right, as in flash-attn: with 2
    queries and 4 keys the visible keys (x) are

        x x x .
        x x x x

    A query that sees no key gives zeros and gets zero gradients. Where a bias needs no gradient, none is
    computed.

    Args:
        q: `(Tq, Hq, D)`, float32, bfloat16, float16 (or float64). Any strides. "triton" and "cuda" take D up
            to 256.
        k: `(Tk, Hkv, D)`, Hq a multiple of Hkv; dtype of q.
        v: `(Tk, Hkv, D)`, dtype of q.
        cu_seqlens_q: `(B+1,)` int32 or int64, where each sequence starts among the queries; the last is Tq.
        cu_seqlens_k: `(B+1,)` int32 or int64, the same for the keys; a sequence may be empty.
        max_seqlen_q: the longest sequence's queries (or more).
        max_seqlen_k: the longest sequence's keys (or more).
        rank_q: `(Tq,)` int32 or int64, the item's place in its user's history; -1 for a token that is not an item.
            At most 2^31 - 1, in int64 too; the kernels compute in int32.
        rank_k: `(Tk,)` int32 or int64, the same for the keys.
        relative_bias: `(Hq, R)` float32, bfloat16 or float16 (also float64 beside a float64 q), or None. Its gradient
            has its dtype, and is summed in float32 (float64 beside a float64 q).
        absolute_bias: `(Hq, A)`, the same.
        softmax_scale: a number, default `1 / sqrt(D)`. A learned temperature belongs into q: multiply q by it.
        causal: whether a query sees only the keys up to its own place.
        backend: None picks; "reference", "cpu", "triton", "cuda" force.

    Returns:
        `(Tq, Hq, D)`, dtype of q.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device, wrong cu_seqlens or max_seqlen, a softmax_scale that is not finite or
            requires a gradient, a backend that cannot.
        IndexError: a rank that does not fit int32, with its position (on a GPU without SPEEDER_CHECK=1, every pair
            of items of that batch has a score of NaN).
        NotImplementedError: a second derivative, forward mode, or `torch.func.grad` and its like.
    """
    refuse_transforms("spae_attention", q, k, v, relative_bias, absolute_bias)
    device = _float_device("q", q, FLOATS_AND_DOUBLE)
    check_tensor("q", q, ("Tq", "Hq", "D"), FLOATS_AND_DOUBLE, device)
    check_not_empty("q", q, 1)
    check_not_empty("q", q, 2)
    _, heads, size = q.shape
    check_tensor("k", k, ("Tk", "Hkv", size), (q.dtype,), device)
    check_not_empty("k", k, 1)
    check_tensor("v", v, tuple(k.shape), (q.dtype,), device)
    if heads % k.shape[1]:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {k.shape[1]}")
    check_tensor("cu_seqlens_q", cu_seqlens_q, ("B+1",), INTEGERS, device)
    check_not_empty("cu_seqlens_q", cu_seqlens_q)
    if cu_seqlens_q.shape[0] == 1 and q.shape[0] + k.shape[0] > 0:
        raise ValueError("cu_seqlens_q: expected at least 2 elements (B+1) where there are tokens, got 1")
    check_tensor("cu_seqlens_k", cu_seqlens_k, (cu_seqlens_q.shape[0],), INTEGERS, device)
    check_tensor("rank_q", rank_q, (q.shape[0],), INTEGERS, device)
    check_tensor("rank_k", rank_k, (k.shape[0],), INTEGERS, device)
    wide, narrower = (
        (torch.float64, FLOATS_AND_DOUBLE) if q.dtype == torch.float64 else (torch.float32, FLOATS)
    )
    for name, table in (("relative_bias", relative_bias), ("absolute_bias", absolute_bias)):
        if table is not None:
            check_tensor(name, table, (heads, "R" if name[0] == "r" else "A"), narrower, device)
            check_not_empty(name, table, 1)
    check_count("max_seqlen_q", max_seqlen_q, least=0)
    check_count("max_seqlen_k", max_seqlen_k, least=0)
    check_bool("causal", causal)
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(size)
    out, _ = _OPS.spae_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        rank_q,
        rank_k,
        # Widened here, so that a table's gradient is summed in float32 and then rounded once.
        None if relative_bias is None else relative_bias.to(wide),
        None if absolute_bias is None else absolute_bias.to(wide),
        check_number("softmax_scale", softmax_scale, "multiply q by it"),
        causal,
        backend,
    )
    return out


def pack_tokens(
    input_ids: Tensor,
    text_embedding: Tensor,
    item_tokens: Tensor,
    item_rows: Tensor,
    ranks: Tensor,
    position_prompts: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """The language model's input in one pass: text embeddings, and item tokens plus their position prompts.

        out[t] = item_tokens[item_rows[t]] + position_prompts[ranks[t]]   where item_rows[t] >= 0
                 (no prompt where ranks[t] is -1)
        out[t] = text_embedding[input_ids[t]]                             elsewhere

    Args:
        input_ids: `(T,)` integers; read only where `item_rows` is -1.
        text_embedding: `(V, H)`, float32, bfloat16, float16 (or float64).
        item_tokens: `(U, H)`, dtype of text_embedding (or bfloat16 or float16, which is widened to it: the gradient is
            summed in float32 and has the table's dtype); U may be 0 where there is no item.
        item_rows: `(T,)` integers: a row of item_tokens, or -1 for a text token.
        ranks: `(T,)` integers: a row of position_prompts, or -1; read only where `item_rows` is not -1.
        position_prompts: `(P, H)`, dtype as of item_tokens; P may be 0 where there is no rank.
        backend: None picks; "reference", "cpu", "triton", "cuda" force.

    Returns:
        `(T, H)`, dtype of text_embedding.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device, a backend that cannot.
        IndexError: an id, row or rank out of range, with its position.
        NotImplementedError: a second derivative, forward mode, or `torch.func.grad` and its like.
    """
    refuse_transforms("pack_tokens", text_embedding, item_tokens, position_prompts)
    device = _float_device("text_embedding", text_embedding, FLOATS_AND_DOUBLE)
    check_tensor("text_embedding", text_embedding, ("V", "H"), FLOATS_AND_DOUBLE, device)
    check_not_empty("text_embedding", text_embedding, 1)
    check_tensor("input_ids", input_ids, ("T",), INTEGERS, device)
    dtype, hidden = text_embedding.dtype, text_embedding.shape[1]
    narrower = (dtype,) if dtype in HALVES else (dtype, *HALVES)
    check_tensor("item_tokens", item_tokens, ("U", hidden), narrower, device)
    check_tensor("item_rows", item_rows, (input_ids.shape[0],), INTEGERS, device)
    check_tensor("ranks", ranks, (input_ids.shape[0],), INTEGERS, device)
    check_tensor("position_prompts", position_prompts, ("P", hidden), narrower, device)
    return _OPS.pack_tokens(
        input_ids.to(torch.int64),
        text_embedding,
        item_tokens.to(dtype),
        item_rows.to(torch.int64),
        ranks.to(torch.int64),
        position_prompts.to(dtype),
        backend,
    )


def compress_items(
    expert_outputs: Tensor,
    gate_logits: Tensor,
    present: Tensor,
    norm_weight: Tensor,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """An item's modalities become one token: Multimodal Representation Compression's last step.

        gates = softmax of gate_logits over the modalities that are present (0 for the others)
        token = RMSNorm(sum over m of gates[m] * expert_outputs[m]) * norm_weight

    What stands in an absent modality's row is never read. Gradients flow through both results.

    Args:
        expert_outputs: `(U, M, H)`, float32, bfloat16, float16 (or float64).
        gate_logits: `(U, M)`, float32, bfloat16, float16 or the dtype of expert_outputs; its gradient has its dtype.
        present: `(U, M)` bool; an item needs at least one modality.
        norm_weight: `(H,)`, dtypes as of gate_logits.
        eps: a number, added to the mean square.
        backend: None picks; "reference", "cpu", "triton", "cuda" force.

    Returns:
        Tokens `(U, H)` in the dtype of expert_outputs, and gates `(U, M)` in float32 (float64 for float64).

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device, an item with no modality, an eps that is not above 0 or requires a
            gradient, a backend that cannot.
        NotImplementedError: a second derivative, forward mode, or `torch.func.grad` and its like.
    """
    refuse_transforms("compress_items", expert_outputs, gate_logits, norm_weight)
    device = _float_device("expert_outputs", expert_outputs, FLOATS_AND_DOUBLE)
    check_tensor("expert_outputs", expert_outputs, ("U", "M", "H"), FLOATS_AND_DOUBLE, device)
    check_not_empty("expert_outputs", expert_outputs, 1)
    check_not_empty("expert_outputs", expert_outputs, 2)
    items, modalities, hidden = expert_outputs.shape
    any_float = tuple(dict.fromkeys((expert_outputs.dtype, *FLOATS)))
    check_tensor("gate_logits", gate_logits, (items, modalities), any_float, device)
    check_tensor("present", present, (items, modalities), (torch.bool,), device)
    check_tensor("norm_weight", norm_weight, (hidden,), any_float, device)
    eps = check_number("eps", eps, "it is a constant")
    check_positive("eps", eps)
    return _OPS.compress_items(expert_outputs, gate_logits, present, norm_weight, eps, backend)


def item_cross_entropy(
    hidden: Tensor,
    item_table: Tensor,
    targets: Tensor,
    *,
    scale: float,
    log_q: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy over the whole catalogue, with no `(N, I)` matrix ever held, forward or backward.

        logit[n,i] = scale * hidden[n].item_table[i] - log_q[i]
        loss[n]    = logsumexp_i(logit[n,i]) - logit[n, targets[n]]

    Args:
        hidden: `(N, H)`, float32, bfloat16, float16 (or float64).
        item_table: `(I, H)`, dtype of hidden.
        targets: `(N,)` integers in `0 .. I-1`; no value is special.
        scale: a number that multiplies the dot products; above 0. A learned temperature belongs into hidden: multiply
            hidden by it.
        log_q: `(I,)` float32, bfloat16, float16 (or the dtype of hidden), the log of how often an item is drawn as a
            negative (Yi et al. 2019); a constant that takes no gradient. Finite: an item that is never drawn has no
            such log (-inf would make every row's loss infinite or NaN), so count it as drawn at least once.
        backend: None picks; "reference", "cpu", "triton", "cuda" force.

    Returns:
        `(N,)` float32 (float64 for float64), one loss a row.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device, no items, a scale that is not above 0 or requires a gradient, a log_q
            that requires one or is not finite (without SPEEDER_CHECK=1 a GPU gives a loss that is infinite or NaN),
            a backend that cannot.
        IndexError: a target out of range, with its position.
        NotImplementedError: a second derivative, forward mode, or `torch.func.grad` and its like.
    """
    refuse_transforms("item_cross_entropy", hidden, item_table, log_q)
    device = _float_device("hidden", hidden, FLOATS_AND_DOUBLE)
    check_tensor("hidden", hidden, ("N", "H"), FLOATS_AND_DOUBLE, device)
    check_not_empty("hidden", hidden, 1)
    check_tensor("item_table", item_table, ("I", hidden.shape[1]), (hidden.dtype,), device)
    check_not_empty("item_table", item_table)
    check_tensor("targets", targets, (hidden.shape[0],), INTEGERS, device)
    scale = check_number("scale", scale, "multiply hidden by it")
    check_positive("scale", scale)
    if log_q is not None:
        any_float = tuple(dict.fromkeys((hidden.dtype, *FLOATS)))
        check_tensor("log_q", log_q, (item_table.shape[0],), any_float, device)
        check_constant("log_q", log_q)
    targets = targets.to(torch.int64)
    loss, _ = _OPS.item_cross_entropy(hidden, item_table, targets, scale, log_q, backend)
    return loss


def topk_items(
    hidden: Tensor,
    item_table: Tensor,
    k: int,
    *,
    exclude_indptr: Tensor | None = None,
    exclude_items: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k items with the highest dot product in each row, with no `(N, I)` matrix ever held.

    Items that score the same come in the order of their index. The results are constants to autograd, as `detach()`
    makes them; where you need a gradient, gather the items' rows and multiply.

    Args:
        hidden: `(N, H)`, float32, bfloat16 or float16.
        item_table: `(I, H)`, dtype of hidden.
        k: how many; at most the number of items a row may be given.
        exclude_indptr: `(N+1,)` integers: row n never gets
            `exclude_items[exclude_indptr[n]:exclude_indptr[n+1]]`.
        exclude_items: `(nnz,)` integers in `0 .. I-1`; duplicates do no harm.
        backend: None picks; "reference", "cpu", "triton", "cuda" force.

    Returns:
        Scores `(N, k)` float32, falling, and items `(N, k)` int64.

    Raises:
        TypeError: a wrong dtype, one of the two exclusion tensors without the other.
        ValueError: a wrong shape or device, no items, a k that some row cannot fill (the message names
            the row; on a GPU without SPEEDER_CHECK=1 such places hold -inf and -1), a score that is NaN, a
            backend that cannot.
        IndexError: an excluded item out of range, with its position.
        NotImplementedError: forward mode, or `torch.func.grad` and its like.
    """
    refuse_transforms("topk_items", hidden, item_table)
    device = _float_device("hidden", hidden, FLOATS)
    check_tensor("hidden", hidden, ("N", "H"), FLOATS, device)
    check_not_empty("hidden", hidden, 1)
    check_tensor("item_table", item_table, ("I", hidden.shape[1]), (hidden.dtype,), device)
    check_not_empty("item_table", item_table)
    check_count("k", k)
    if k > item_table.shape[0]:
        raise ValueError(f"k: expected at most {item_table.shape[0]}, the items in item_table, got {k}")
    if (exclude_indptr is None) != (exclude_items is None):
        missing = "exclude_indptr" if exclude_indptr is None else "exclude_items"
        raise TypeError(f"{missing}: expected a tensor, since the other exclusion tensor was given, got None")
    if exclude_indptr is not None:
        check_tensor("exclude_indptr", exclude_indptr, (hidden.shape[0] + 1,), INTEGERS, device)
        check_tensor("exclude_items", exclude_items, ("nnz",), INTEGERS, device)
        exclude_indptr, exclude_items = exclude_indptr.to(torch.int64), exclude_items.to(torch.int64)
    return _OPS.topk_items(hidden.detach(), item_table.detach(), k, exclude_indptr, exclude_items, backend)
