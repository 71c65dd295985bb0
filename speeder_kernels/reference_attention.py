"""The oracle for `spae_attention` in plain PyTorch: sequences are padded into dense batches and attended to.

The formula is this project's own reading of "relative and absolute position" (the paper's code was not at
hand):

    score[h,i,j] = scale * q_i.k_j + pair * (relative_bias[h, clamp(rank_q_i - rank_k_j, 0, R-1)]
                                              + absolute_bias[h, clamp(rank_k_j, 0, A-1)])

with `pair` one where both tokens are items and zero elsewhere. Sequences are taken in groups small enough for
a cache, so that a group's scores never become a large tensor; a long sequence is cut into blocks of queries.

Shape letters: B sequences of a block, S query rows, T key rows, Hq query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from speeder_kernels.reference import accumulate_dtype

SCORES_PER_BLOCK = 1 << 20  # elements of one block's score matrix


@dataclass(frozen=True)
class _Block:
    """Some sequences (or some query rows of one), and where their tokens lie in the padded batch."""

    queries: slice
    keys: slice
    q_at: tuple[Tensor, Tensor]  # (sequence, row) of each query token
    k_at: tuple[Tensor, Tensor]
    shape: tuple[int, int, int]  # B, S, T
    visible_BST: Tensor  # bool: real tokens, and the causal mask

    def pad_q(self, x: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        return _pad(x[self.queries], self.q_at, self.shape[0], self.shape[1], dtype, fill)

    def pad_k(self, x: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        return _pad(x[self.keys], self.k_at, self.shape[0], self.shape[2], dtype, fill)


def _pad(
    x: Tensor, at: tuple[Tensor, Tensor], batch: int, rows: int, dtype: torch.dtype, fill: float
) -> Tensor:
    out = x.new_full((batch, rows, *x.shape[1:]), fill, dtype=dtype)
    out[at] = x.to(dtype)
    return out


def _blocks(cu_q: Tensor, cu_k: Tensor, heads: int, causal: bool) -> Iterator[_Block]:
    """Cut the batch into blocks of at most SCORES_PER_BLOCK scores (or of one query row)."""
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    lengths_q = [b - a for a, b in pairwise(starts_q)]
    lengths_k = [b - a for a, b in pairwise(starts_k)]
    first = 0
    while first < len(lengths_q):
        last, longest_q, longest_k = first, 0, 1
        while last < len(lengths_q):
            more_q, more_k = max(longest_q, lengths_q[last]), max(longest_k, lengths_k[last])
            if last > first and (last + 1 - first) * heads * more_q * more_k > SCORES_PER_BLOCK:
                break
            last, longest_q, longest_k = last + 1, more_q, more_k
        rows = longest_q
        if last == first + 1:
            rows = max(1, min(rows, SCORES_PER_BLOCK // (heads * longest_k)))
        for row in range(0, longest_q, max(rows, 1)):
            yield _block(cu_q, cu_k, starts_q, starts_k, (first, last), (row, rows), longest_k, causal)
        first = last


def _block(
    cu_q: Tensor,
    cu_k: Tensor,
    starts_q: list[int],
    starts_k: list[int],
    sequences: tuple[int, int],
    rows: tuple[int, int],
    longest_k: int,
    causal: bool,
) -> _Block:
    (first, last), (row, count) = sequences, rows
    begin = starts_q[first] + row
    end = starts_q[last] if last > first + 1 else min(starts_q[last], begin + count)
    device = cu_q.device
    tokens_q = torch.arange(begin, end, device=device)
    tokens_k = torch.arange(starts_k[first], starts_k[last], device=device)
    sequence_q = torch.searchsorted(cu_q[first + 1 : last + 1], tokens_q, right=True)
    sequence_k = torch.searchsorted(cu_k[first + 1 : last + 1], tokens_k, right=True)
    length_q, length_k = cu_q.diff()[first:last], cu_k.diff()[first:last]
    i = torch.arange(row, row + count, device=device)[None, :, None]
    j = torch.arange(longest_k, device=device)[None, None, :]
    visible = (i < length_q[:, None, None]) & (j < length_k[:, None, None])
    if causal:
        visible &= j <= i + (length_k - length_q)[:, None, None]
    return _Block(
        queries=slice(begin, end),
        keys=slice(starts_k[first], starts_k[last]),
        q_at=(sequence_q, tokens_q - cu_q[first:last][sequence_q] - row),
        k_at=(sequence_k, tokens_k - cu_k[first:last][sequence_k]),
        shape=(last - first, count, longest_k),
        visible_BST=visible,
    )


def _bias_indices(
    block: _Block, rank_q: Tensor, rank_k: Tensor, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Columns `(B, S, T)` of the two bias tables; a pair that is not two items gets the column past the
    end."""
    rank_BS1 = block.pad_q(rank_q, torch.int64, -1)[:, :, None]
    rank_B1T = block.pad_k(rank_k, torch.int64, -1)[:, None, :]
    pair = (rank_BS1 >= 0) & (rank_B1T >= 0)
    relative = torch.where(pair, (rank_BS1 - rank_B1T).clamp(0, max(sizes[0] - 1, 0)), sizes[0])
    absolute = torch.where(pair, rank_B1T.clamp(0, max(sizes[1] - 1, 0)), sizes[1])
    return relative, absolute


def _look_up(table: Tensor, index_BST: Tensor, dtype: torch.dtype) -> Tensor:
    """`(Hq, R)` table -> `(B, Hq, S, T)`, with a column of zeros added for the pairs that have no bias."""
    padded = torch.nn.functional.pad(table.to(dtype), (0, 1))
    batch, rows, columns = index_BST.shape
    values = padded.gather(1, index_BST.reshape(1, -1).expand(padded.shape[0], -1))
    return values.view(-1, batch, rows, columns).transpose(0, 1)


def _sum_by_column(values_BHST: Tensor, index_BST: Tensor, size: int) -> Tensor:
    """The transpose of `_look_up`: `(Hq, size)`, summed in a fixed order on either device."""
    heads = values_BHST.shape[1]
    values = values_BHST.transpose(0, 1).reshape(heads, -1)
    index = index_BST.reshape(1, -1).expand_as(values)
    out = values.new_zeros(heads, size + 1)
    if values.is_cuda:
        head = torch.arange(heads, device=values.device)[:, None].expand_as(values)
        out.index_put_((head, index), values, accumulate=True)
    else:
        out.scatter_add_(1, index, values)
    return out[:, :size]


def _group(x_BSHD: Tensor, kv_heads: int) -> Tensor:
    """`(B, S, Hq, D)` -> `(B, K, Hq/K * S, D)`: the query heads of one key head become rows of one
    product."""
    batch, rows, heads, size = x_BSHD.shape
    return x_BSHD.transpose(1, 2).reshape(batch, kv_heads, heads // kv_heads * rows, size)


def _ungroup(x_BKGD: Tensor, heads: int) -> Tensor:
    batch, _, _, size = x_BKGD.shape
    return x_BKGD.reshape(batch, heads, -1, size).transpose(1, 2)


def _scores(
    block: _Block,
    q_BKGD: Tensor,
    k_BKTD: Tensor,
    heads: int,
    scale: float,
    biases: list[tuple[Tensor, Tensor]],
) -> Tensor:
    scores = (q_BKGD @ k_BKTD.transpose(-1, -2)).mul_(scale)
    scores_BHST = scores.view(block.shape[0], heads, block.shape[1], block.shape[2])
    for table, index in biases:
        scores_BHST += _look_up(table, index, scores_BHST.dtype)
    return scores_BHST.masked_fill_(~block.visible_BST[:, None], float("-inf"))


def _weights(scores_BHST: Tensor) -> Tensor:
    """The softmax of each row, 0 where all of it is masked. Not by the log-sum-exp, which beside large scores has no
    digits left for the number of keys."""
    masked = (scores_BHST == float("-inf")).all(dim=-1, keepdim=True)
    return scores_BHST.softmax(dim=-1).masked_fill_(masked, 0.0)


def spae_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rank_q: Tensor,
    rank_k: Tensor,
    relative_bias: Tensor | None,
    absolute_bias: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Output `(Tq, Hq, D)` and log-sum-exp `(Tq, Hq)`; +inf is the log-sum-exp of a fully masked row."""
    dtype = accumulate_dtype(q.dtype)
    heads, kv_heads = q.shape[1], k.shape[1]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full(q.shape[:2], float("inf"), dtype=dtype)
    for block in _blocks(cu_seqlens_q, cu_seqlens_k, heads, causal):
        biases = _biases(block, rank_q, rank_k, relative_bias, absolute_bias)
        q_BKGD = _group(block.pad_q(q, dtype), kv_heads)
        k_BKTD = block.pad_k(k, dtype).transpose(1, 2)
        v_BKTD = block.pad_k(v, dtype).transpose(1, 2)
        scores_BHST = _scores(block, q_BKGD, k_BKTD, heads, scale, [b for b in biases if b is not None])
        lse_BHS = scores_BHST.logsumexp(dim=-1)
        lse_BHS = torch.where(lse_BHS == float("inf"), torch.nan, lse_BHS)  # as a softmax of infinity is
        lse_BHS = torch.where(lse_BHS == float("-inf"), float("inf"), lse_BHS)
        weights = _weights(scores_BHST)
        out_BSHD = _ungroup(weights.view(*q_BKGD.shape[:3], -1) @ v_BKTD, heads)
        out[block.queries] = out_BSHD[block.q_at].to(out.dtype)
        lse[block.queries] = lse_BHS.transpose(1, 2)[block.q_at]
    return out, lse


def _biases(
    block: _Block, rank_q: Tensor, rank_k: Tensor, relative_bias: Tensor | None, absolute_bias: Tensor | None
) -> list[tuple[Tensor, Tensor] | None]:
    """For each of the two tables, the table and its columns, or None where there is no such bias."""
    tables = (relative_bias, absolute_bias)
    if all(table is None for table in tables):
        return [None, None]
    sizes = tuple(0 if table is None else table.shape[1] for table in tables)
    indices = _bias_indices(block, rank_q, rank_k, sizes)
    return [None if table is None else (table, index) for table, index in zip(tables, indices, strict=True)]


def spae_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rank_q: Tensor,
    rank_k: Tensor,
    relative_bias: Tensor | None,
    absolute_bias: Tensor | None,
    scale: float,
    causal: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, relative_bias and absolute_bias; empty where `needs` is false."""
    dtype = accumulate_dtype(q.dtype)
    heads, kv_heads = q.shape[1], k.shape[1]
    tables = (q, k, v, relative_bias, absolute_bias)
    grads = [q.new_zeros(t.shape if need else 0, dtype=dtype) for t, need in zip(tables, needs, strict=True)]
    need_scores = needs[0] or needs[1] or needs[3] or needs[4]
    for block in _blocks(cu_seqlens_q, cu_seqlens_k, heads, causal):
        biases = _biases(block, rank_q, rank_k, relative_bias, absolute_bias)
        q_BKGD = _group(block.pad_q(q, dtype), kv_heads)
        k_BKTD = block.pad_k(k, dtype).transpose(1, 2)
        grad_BKGD = _group(block.pad_q(grad, dtype), kv_heads)
        scores_BHST = _scores(block, q_BKGD, k_BKTD, heads, scale, [b for b in biases if b is not None])
        weights_BHST = _weights(scores_BHST)
        grouped = (*q_BKGD.shape[:3], -1)
        if needs[2]:
            grad_v = weights_BHST.view(grouped).transpose(-1, -2) @ grad_BKGD
            grads[2][block.keys] += grad_v.transpose(1, 2)[block.k_at]
        if not need_scores:
            continue
        v_BKTD = block.pad_k(v, dtype).transpose(1, 2)
        # d score = p * (dp - sum_j p dp). The sum is also grad . out, but `out` has been rounded.
        grad_weights = (grad_BKGD @ v_BKTD.transpose(-1, -2)).view_as(weights_BHST)
        delta_BHS1 = (grad_weights * weights_BHST).sum(dim=-1, keepdim=True)
        grad_scores = grad_weights.sub_(delta_BHS1).mul_(weights_BHST)
        if needs[0]:
            grad_q = _ungroup(grad_scores.view(grouped) @ k_BKTD, heads)
            grads[0][block.queries] = grad_q[block.q_at] * scale
        if needs[1]:
            grad_k = grad_scores.view(grouped).transpose(-1, -2) @ q_BKGD
            grads[1][block.keys] += grad_k.transpose(1, 2)[block.k_at] * scale
        for n, bias in enumerate(biases):
            if needs[3 + n]:
                table, index = bias
                grads[3 + n] += _sum_by_column(grad_scores, index, table.shape[1])
    return tuple(g if t is None else g.to(t.dtype) for g, t in zip(grads, tables, strict=True))
