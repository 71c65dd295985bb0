"""Independent versions of the ops to compare with: one sequence, head, row and item at a time, in plain
loops.

They share no code with speeder_kernels, take any dtype (float64 for the exact answer) and are differentiable.
`assert_accurate` is the rule by which an op's error is judged.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor


def spae_attention(
    q, k, v, cu_q, cu_k, rank_q, rank_k, relative_bias=None, absolute_bias=None, scale=None, causal=True
) -> Tensor:
    """`(Tq, Hq, D)`; the bias of each pair is looked up with Python integers."""
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    rows = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        for i in range(q0, q1):
            last = k0 + (i - q0) + (k1 - k0) - (q1 - q0) if causal else k1 - 1
            keys = range(k0, min(last, k1 - 1) + 1)
            for h in range(q.shape[1]):
                if not len(keys):
                    rows.append(q.new_zeros(q.shape[2]))
                    continue
                scores = [
                    _score(q, k, rank_q, rank_k, relative_bias, absolute_bias, scale, h, h // group, i, j)
                    for j in keys
                ]
                weights = torch.softmax(torch.stack(scores), dim=0)
                rows.append(sum(w * v[j, h // group] for w, j in zip(weights, keys, strict=True)))
    return torch.stack(rows).view(q.shape)


def _score(q, k, rank_q, rank_k, relative_bias, absolute_bias, scale, h, g, i, j) -> Tensor:
    score = scale * (q[i, h] * k[j, g]).sum()
    first, second = int(rank_k[j]), int(rank_q[i])
    if first >= 0 and second >= 0:
        if relative_bias is not None:
            score = score + relative_bias[h, min(max(second - first, 0), relative_bias.shape[1] - 1)]
        if absolute_bias is not None:
            score = score + absolute_bias[h, min(first, absolute_bias.shape[1] - 1)]
    return score


def torch_attention(q, k, v, cu_q, cu_k, rank_q, rank_k, relative_bias, absolute_bias, causal) -> Tensor:
    """What PyTorch ships, in q's dtype: its own attention a sequence, the bias as a dense mask."""
    out = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        blind = q1 - q0 if k0 == k1 else max(0, (q1 - q0) - (k1 - k0)) if causal else 0
        out.append(torch.zeros_like(q[q0 : q0 + blind]))
        if q0 + blind == q1:
            continue
        first, second = rank_k[k0:k1].long()[None, :], rank_q[q0 + blind : q1].long()[:, None]
        mask = q.new_zeros(q.shape[1], q1 - q0 - blind, k1 - k0)
        both = ((first >= 0) & (second >= 0)).to(q.dtype)
        if relative_bias is not None:
            distance = (second - first).clamp(0, relative_bias.shape[1] - 1)
            mask = mask + both * relative_bias[:, distance].to(q.dtype)
        if absolute_bias is not None:
            mask = mask + both * absolute_bias[:, first.clamp(0, absolute_bias.shape[1] - 1)].to(q.dtype)
        if causal:
            hidden = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).triu((k1 - k0) - (q1 - q0) + 1)
            mask = mask.masked_fill(hidden[blind:], float("-inf"))
        part = torch.nn.functional.scaled_dot_product_attention(
            q[q0 + blind : q1].transpose(0, 1)[None],
            k[k0:k1].transpose(0, 1)[None],
            v[k0:k1].transpose(0, 1)[None],
            attn_mask=mask[None],
            enable_gqa=True,
        )
        out.append(part[0].transpose(0, 1))
    return torch.cat(out)


def pack_tokens(input_ids, text_embedding, item_tokens, item_rows, ranks, position_prompts) -> Tensor:
    rows = []
    for token, row, rank in zip(input_ids.tolist(), item_rows.tolist(), ranks.tolist(), strict=True):
        if row < 0:
            rows.append(text_embedding[token])
        else:
            rows.append(item_tokens[row] + position_prompts[rank] if rank >= 0 else item_tokens[row])
    return torch.stack(rows)


def compress_items(expert_outputs, gate_logits, present, norm_weight, eps=1e-6) -> tuple[Tensor, Tensor]:
    tokens, gates = [], []
    for experts, logits, here in zip(expert_outputs, gate_logits, present.tolist(), strict=True):
        names = [m for m, is_here in enumerate(here) if is_here]
        powers = [torch.exp(logits[m] - logits[names].max().detach()) for m in names]
        weights = [power / sum(powers) for power in powers]
        mixed = sum(weight * experts[m] for weight, m in zip(weights, names, strict=True))
        tokens.append(mixed / torch.sqrt((mixed * mixed).mean() + eps) * norm_weight)
        row = dict(zip(names, weights, strict=True))
        gates.append(torch.stack([row.get(m, logits.new_zeros(())) for m in range(len(here))]))
    return torch.stack(tokens), torch.stack(gates)


def item_cross_entropy(hidden, item_table, targets, scale, log_q=None) -> Tensor:
    losses = []
    for row, target in zip(hidden, targets.tolist(), strict=True):
        logits = [scale * (row * item).sum() for item in item_table]
        if log_q is not None:
            logits = [logit - q for logit, q in zip(logits, log_q, strict=True)]
        losses.append(torch.logsumexp(torch.stack(logits), dim=0) - logits[target])
    return torch.stack(losses)


def topk_items(scores, k, excluded) -> list[list[int]]:
    """Items of each row by falling score, ties by rising index; `excluded` is a list of sets."""
    return [
        sorted((i for i in range(len(row)) if i not in out), key=lambda i: (-row[i], i))[:k]
        for row, out in zip(scores.tolist(), excluded, strict=True)
    ]


def assert_accurate(
    name: str, ours: Tensor, exact: Tensor, torchs: Tensor, magnitude: float | None = None
) -> None:
    """Our error against float64 is at most twice PyTorch's own in the same dtype.

    Inputs can be so small that PyTorch happens to hit the exact answer, so there is a floor: one rounding of
    the result to its dtype, and four float32 roundings of the largest number that is summed on the way
    (`magnitude`; by default the largest result).
    """
    assert ours.dtype == torchs.dtype, f"{name}: {ours.dtype} instead of {torchs.dtype}"
    assert ours.shape == exact.shape, f"{name}: {ours.shape} instead of {exact.shape}"
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    error = (ours.double() - exact).abs().max().item()
    allowed = 2 * (torchs.double() - exact).abs().max().item()
    largest = max(exact.abs().max().item(), torch.finfo(ours.dtype).tiny)
    floor = torch.finfo(ours.dtype).eps * largest
    floor += 4 * torch.finfo(torch.float32).eps * (magnitude or largest)
    assert error <= allowed + floor, f"{name}: error {error:.3g}, allowed {allowed:.3g} + {floor:.3g}"


def gradients(outputs, inputs, seed: int = 0) -> list[Tensor]:
    """Gradients of all inputs for random upstream gradients, the same numbers for every dtype."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(out.shape, generator=generator).to(torch.bfloat16) for out in outputs]
    upstream = [draw.to(out.dtype) for draw, out in zip(drawn, outputs, strict=True)]
    live = [(out, up) for out, up in zip(outputs, upstream, strict=True) if out.requires_grad]
    if not live:  # every row of the batch is masked, say
        return [torch.zeros_like(x) for x in inputs]
    outputs, upstream = zip(*live, strict=True)
    return list(torch.autograd.grad(outputs, inputs, upstream, allow_unused=True, materialize_grads=True))
