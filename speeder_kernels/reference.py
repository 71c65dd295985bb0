"""The oracle: four of the five ops in plain PyTorch (`reference_attention.py` holds the fifth).

Every function works in float32 whatever the inputs' dtype (float64 for float64 inputs), sums in a fixed
order, and asks nothing of speed except that no `(N, I)` matrix is ever held. The backward passes are written
out by hand: they are what the compiled kernels are compared with, and `torch.autograd.gradcheck` compares
them with the forwards.

Shape letters: T tokens, V text vocabulary, U items in the batch, P position prompts, H hidden size, M
modalities, N rows to score, I items in the catalogue.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ITEMS_PER_CHUNK = 8192  # columns of logits alive at once in the two catalogue-wide ops

_LOW32 = 0xFFFFFFFF
_EXCLUDED = torch.iinfo(torch.int64).min


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: what every op sums in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_rows(values: Tensor, index: Tensor, size: int) -> Tensor:
    """`out[i] = sum of values[t] over t with index[t] == i`, `(T, H)` and `(T,)` -> `(size, H)`, in token
    order.

    Index `size` stands for "in no row". Chosen by device so that two runs agree to the last bit: on a CPU
    `index_put_` adds with atomics and `scatter_add_` does not; on a GPU it is the other way round (there
    `index_put_` sorts first).
    """
    out = values.new_zeros(size + 1, values.shape[1], dtype=accumulate_dtype(values.dtype))
    summands = values.to(out.dtype)
    if values.is_cuda:
        out.index_put_((index,), summands, accumulate=True)
    else:
        out.scatter_add_(0, index[:, None].expand_as(summands), summands)
    return out[:size].to(values.dtype)


# --- pack_tokens --------------------------------------------------------------------------------------------


def pack_tokens(
    input_ids: Tensor,
    text_embedding: Tensor,
    item_tokens: Tensor,
    item_rows: Tensor,
    ranks: Tensor,
    position_prompts: Tensor,
) -> Tensor:
    """`(T, H)`: a text token's embedding row, or an item's token plus the prompt of its rank."""
    dtype = text_embedding.dtype
    out = text_embedding.new_empty(input_ids.shape[0], text_embedding.shape[1])
    is_item = item_rows >= 0
    has_prompt = is_item & (ranks >= 0)
    out[~is_item] = text_embedding[input_ids[~is_item]]
    out[is_item] = item_tokens[item_rows[is_item]]
    prompts = position_prompts[ranks[has_prompt]].to(accumulate_dtype(dtype))
    out[has_prompt] = (out[has_prompt].to(prompts.dtype) + prompts).to(dtype)
    return out


def pack_tokens_backward(
    grad: Tensor,
    input_ids: Tensor,
    item_rows: Tensor,
    ranks: Tensor,
    sizes: list[int],
    needs: list[bool],
    sum_rows: Callable[[Tensor, Tensor, int], Tensor] = sum_rows,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of text_embedding `(V, H)`, item_tokens `(U, H)`, position_prompts `(P, H)`.

    `sizes` is `[V, U, P]`; where `needs` is false the gradient is an empty tensor of shape `(0, H)`.
    """
    is_item = item_rows >= 0
    wanted = ((input_ids, ~is_item), (item_rows, is_item), (ranks, is_item & (ranks >= 0)))
    return tuple(
        sum_rows(grad, torch.where(used, index, size), size) if need else grad.new_empty(0, grad.shape[1])
        for (index, used), size, need in zip(wanted, sizes, needs, strict=True)
    )


# --- compress_items -----------------------------------------------------------------------------------------


def compress_items(
    expert_outputs: Tensor, gate_logits: Tensor, present: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Tokens `(U, H)` and gates `(U, M)`: softmax over present modalities, weighted sum, RMSNorm."""
    experts, gates, _, normed = _compress(expert_outputs, gate_logits, present, eps)
    tokens = normed * norm_weight.to(experts.dtype)
    return tokens.to(expert_outputs.dtype), gates


def _compress(expert_outputs: Tensor, gate_logits: Tensor, present: Tensor, eps: float) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(expert_outputs.dtype)
    # `where` rather than a product: whatever lies in an absent modality's row, NaN too, must not leak.
    experts = torch.where(present[..., None], expert_outputs.to(dtype), 0.0)
    gates = torch.softmax(gate_logits.to(dtype).masked_fill(~present, float("-inf")), dim=-1)
    mixed = (gates[..., None] * experts).sum(dim=1)
    inverse_rms = torch.rsqrt(mixed.square().mean(dim=-1, keepdim=True) + eps)
    return experts, gates, inverse_rms, mixed * inverse_rms


def compress_items_backward(
    grad_tokens: Tensor,
    grad_gates: Tensor,
    expert_outputs: Tensor,
    gate_logits: Tensor,
    present: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of expert_outputs `(U, M, H)`, gate_logits `(U, M)` and norm_weight `(H,)`."""
    experts, gates, inverse_rms, normed = _compress(expert_outputs, gate_logits, present, eps)
    grad = grad_tokens.to(experts.dtype)
    grad_weight = (grad * normed).sum(dim=0)
    grad_normed = grad * norm_weight.to(experts.dtype)
    # RMSNorm: the part of the gradient along the normalised vector is removed.
    along = (grad_normed * normed).mean(dim=-1, keepdim=True)
    grad_mixed = inverse_rms * (grad_normed - normed * along)
    # An absent modality's gradients are zero, also where the item's own are not finite.
    grad_experts = torch.where(present[..., None], gates[..., None] * grad_mixed[:, None], 0.0)
    grad_gates = grad_gates.to(experts.dtype) + (experts * grad_mixed[:, None]).sum(dim=-1)
    grad_logits = gates * (grad_gates - (gates * grad_gates).sum(dim=-1, keepdim=True))
    grad_logits = torch.where(present, grad_logits, 0.0)
    return (
        grad_experts.to(expert_outputs.dtype),
        grad_logits.to(gate_logits.dtype),
        grad_weight.to(norm_weight.dtype),
    )


# --- item_cross_entropy -------------------------------------------------------------------------------------


def _chunk_logits(
    hidden: Tensor, item_table: Tensor, start: int, scale: float, log_q: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Logits `(N, C)` of items `start .. start + C`, and those items' rows `(C, H)` in hidden's dtype."""
    rows = item_table[start : start + ITEMS_PER_CHUNK].to(hidden.dtype)
    logits = (hidden @ rows.T).mul_(scale)
    if log_q is not None:
        logits -= log_q[start : start + ITEMS_PER_CHUNK].to(hidden.dtype)
    return logits, rows


def item_cross_entropy(
    hidden: Tensor, item_table: Tensor, targets: Tensor, scale: float, log_q: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss `(N,)` and the log-sum-exp of each row's logits `(N,)`, one chunk of items at a time."""
    hidden = hidden.to(accumulate_dtype(hidden.dtype))
    lse = hidden.new_full((hidden.shape[0],), float("-inf"))
    for start in range(0, item_table.shape[0], ITEMS_PER_CHUNK):
        logits, _ = _chunk_logits(hidden, item_table, start, scale, log_q)
        lse = torch.logaddexp(lse, logits.logsumexp(dim=-1))
    lse = torch.where(lse == float("inf"), torch.nan, lse)  # as a softmax of infinity is
    target_logits = (hidden * item_table[targets].to(hidden.dtype)).sum(dim=-1) * scale
    if log_q is not None:
        target_logits -= log_q[targets].to(hidden.dtype)
    return lse - target_logits, lse


def item_cross_entropy_backward(
    grad: Tensor,
    hidden: Tensor,
    item_table: Tensor,
    targets: Tensor,
    lse: Tensor,
    scale: float,
    log_q: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden `(N, H)` and item_table `(I, H)`; logits are computed again, chunk by chunk."""
    hidden_dtype = hidden.dtype
    hidden = hidden.to(accumulate_dtype(hidden_dtype))
    row_scale = (grad.to(hidden.dtype) * scale)[:, None]
    grad_hidden = torch.zeros_like(hidden) if needs[0] else hidden.new_empty(0, hidden.shape[1])
    grad_table = item_table.new_empty(item_table.shape if needs[1] else (0, item_table.shape[1]))
    for start in range(0, item_table.shape[0], ITEMS_PER_CHUNK):
        logits, rows = _chunk_logits(hidden, item_table, start, scale, log_q)
        grad_logits = logits.sub_(lse[:, None]).exp_()
        here = (targets >= start) & (targets < start + rows.shape[0])
        # The row's own target: probability minus one. Out of this chunk, `here` subtracts nothing.
        column = torch.where(here, targets - start, 0)[:, None]
        grad_logits.scatter_add_(1, column, -here[:, None].to(hidden.dtype))
        grad_logits *= row_scale
        if needs[0]:
            grad_hidden += grad_logits @ rows
        if needs[1]:
            grad_table[start : start + rows.shape[0]] = (grad_logits.T @ hidden).to(item_table.dtype)
    return grad_hidden.to(hidden_dtype), grad_table


# --- topk_items ---------------------------------------------------------------------------------------------


def topk_items(
    hidden: Tensor,
    item_table: Tensor,
    k: int,
    exclude_indptr: Tensor | None,
    exclude_items: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The k best scores `(N, k)` float32 and items `(N, k)` int64; -inf and -1 where a row has fewer than k.

    A score and its item travel as one int64 whose order is (score descending, item ascending), so ties fall
    to the lower item by themselves.
    """
    hidden = hidden.to(torch.float32)
    excluded_rows = None
    if exclude_indptr is not None:
        row = torch.arange(hidden.shape[0], device=hidden.device)
        counts = exclude_indptr.diff()
        excluded_rows = torch.repeat_interleave(row, counts, output_size=exclude_items.shape[0])
    best = hidden.new_empty(hidden.shape[0], 0, dtype=torch.int64)
    for start in range(0, item_table.shape[0], ITEMS_PER_CHUNK):
        scores, rows = _chunk_logits(hidden, item_table, start, 1.0, None)
        keys = _encode(scores, start)
        if excluded_rows is not None:
            here = (exclude_items >= start) & (exclude_items < start + rows.shape[0])
            keys[excluded_rows[here], exclude_items[here] - start] = _EXCLUDED
        keys = keys.topk(min(k, keys.shape[1]), dim=1).values
        best = torch.cat((best, keys), dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
    return _decode(best)


def _encode(scores: Tensor, start: int) -> Tensor:
    """Score and item as one sortable int64: the score's bits on top (made monotonic), the negated item
    below."""
    scores = torch.where(
        scores.isnan(), torch.nan, scores
    )  # of either sign, so that it comes first and is noticed
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0, which is equal to it
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    items = torch.arange(start, start + scores.shape[1], device=scores.device)
    return (ordered.to(torch.int64) << 32) | (_LOW32 - items)


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (keys >> 32).to(torch.int32)
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    items = _LOW32 - (keys & _LOW32)
    missing = keys == _EXCLUDED
    return scores.masked_fill(missing, float("-inf")), items.masked_fill(missing, -1)
