"""spae_attention: long sequences with and without training, many short ones, and decoding.

Shape letters: B sequences, S tokens of each (padded where they differ), T tokens in all, Hq and Hkv heads, D
head size, R buckets, A positions. Every token is an item, ranked by its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import (
    FORWARD,
    REFERENCE,
    TRAINING,
    Benchmark,
    Inputs,
    Results,
    Side,
    leaves,
    size_of,
    training,
)
from speeder_kernels import spae_attention

HEADS, KV_HEADS, HEAD_SIZE = 9, 3, 64  # SmolLM2-135M
BUCKETS, POSITIONS = 64, 256

NO_BIAS = "SDPA causal, no bias"
DENSE = "SDPA, dense bias"
LEARNED = "SDPA, dense learned bias"
FLEX = "FlexAttention, compiled"
PADDED = "SDPA padded, bias as mask"
MASKED = "SDPA, bias as mask"

_sdpa = partial(F.scaled_dot_product_attention, enable_gqa=True)


@dataclass(frozen=True)
class _Packed:
    """Sequences end to end, and what ours takes beside q, k and v."""

    q: Tensor  # (Tq, Hq, D): the last queries of each sequence
    k: Tensor  # (Tk, Hkv, D)
    v: Tensor  # (Tk, Hkv, D)
    relative: Tensor  # (Hq, R)
    absolute: Tensor  # (Hq, A)
    layout: tuple[Tensor, Tensor, int, int, Tensor, Tensor]  # cu_seqlens, longest, ranks

    def attend(self, backend: str | None, *tensors: Tensor) -> Tensor:
        """Attention with both tables of `tensors`: q, k, v, relative, absolute."""
        q, k, v, relative, absolute = tensors
        return spae_attention(q, k, v, *self.layout, relative, absolute, backend=backend)

    def side(self, backend: str | None) -> Side:
        tensors = (self.q, self.k, self.v, self.relative, self.absolute)
        return Side(lambda: (self.attend(backend, *tensors),))

    def bytes(self) -> int:
        """Read and written by a forward pass."""
        return size_of(self.q, self.q, self.k, self.v, self.relative, self.absolute)


def _packed(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> _Packed:
    """Random tensors for sequences of these many queries and keys, `(B,)` each."""
    q = torch.randn(int(queries.sum()), HEADS, HEAD_SIZE).to(dtype)
    k, v = torch.randn(2, int(keys.sum()), KV_HEADS, HEAD_SIZE).to(dtype)
    rank_q = torch.cat([torch.arange(n - m, n) for m, n in zip(queries, keys, strict=True)])
    rank_k = torch.cat([torch.arange(n) for n in keys])
    starts = [F.pad(lengths.cumsum(0), (1, 0)).int() for lengths in (queries, keys)]
    layout = (*starts, int(queries.max()), int(keys.max()), rank_q.int(), rank_k.int())
    return _Packed(q, k, v, torch.randn(HEADS, BUCKETS), torch.randn(HEADS, POSITIONS), layout)


def _flops(queries: Tensor, keys: Tensor) -> float:
    """Two products a pair that the mask leaves, a forward pass."""
    pairs = queries.double() * keys - queries.double() * (queries - 1) / 2
    return 4 * HEADS * HEAD_SIZE * float(pairs.sum())


def dense_bias(relative: Tensor, absolute: Tensor, queries: int, keys: int) -> Tensor:
    """Bias and causal mask of one sequence, `(Hq, queries, keys)`; gradients flow to the tables.

    `gather` and `index_select`: of what PyTorch offers, their backward is the fastest on a CPU.
    """
    heads, device = relative.shape[0], relative.device
    i, j = torch.arange(keys - queries, keys, device=device)[:, None], torch.arange(keys, device=device)
    bucket = (i - j).clamp(0, BUCKETS - 1).flatten().expand(heads, -1)
    by_distance = relative.gather(1, bucket).view(heads, queries, keys)
    by_key = absolute.index_select(1, j.clamp(max=POSITIONS - 1))[:, None]
    return (by_distance + by_key).masked_fill(i < j, float("-inf"))


def _batched(x: Tensor, batch: int) -> Tensor:
    """`(T, H, D)` of sequences of one length to contiguous `(B, H, S, D)`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()


def unbatched(results: Results) -> Results:
    """The inverse, of all results but the gradients of the tables."""
    return tuple(x.transpose(1, 2).flatten(0, 1) if x.ndim == 4 else x for x in results)


def _long_shape(quick: bool) -> tuple[int, Tensor]:
    batch, length = (2, 96) if quick else (4, 1024)
    return batch, torch.full((batch,), length)


def _flex(packed: _Packed, dense: list[Tensor], quick: bool) -> tuple[Side | None, str]:
    """FlexAttention with the bias as score_mod, or why it cannot run here."""
    if quick:
        return None, "left out of a quick run: compiling it takes longer than all the rest"
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        length = dense[0].shape[2]

        def add_bias(score: Tensor, _b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            relative = packed.relative[h, (i - j).clamp(0, BUCKETS - 1)]
            return score + relative + packed.absolute[h, j.clamp(max=POSITIONS - 1)]

        causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")
        compiled = torch.compile(flex_attention)
        run = partial(compiled, *dense, score_mod=add_bias, block_mask=causal, enable_gqa=True)
        run()
    except Exception as error:  # whatever stands in the way of a compiler that is not ours
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return Side(lambda: (run(),), unbatched), ""


def _long_forward(dtype: torch.dtype, quick: bool) -> Inputs:
    batch, lengths = _long_shape(quick)
    packed = _packed(lengths, lengths, dtype)
    dense = [_batched(x, batch) for x in (packed.q, packed.k, packed.v)]
    length = int(lengths[0])
    bias = dense_bias(packed.relative, packed.absolute, length, length).to(dtype)
    sides = {
        "ours": packed.side(None),
        REFERENCE: packed.side("reference"),
        NO_BIAS: Side(lambda: (_sdpa(*dense, is_causal=True),), None),
        DENSE: Side(lambda: (_sdpa(*dense, attn_mask=bias),), unbatched),
    }
    flex, reason = _flex(packed, dense, quick)
    if flex:
        sides[FLEX] = flex
    missing = {} if flex else {FLEX: reason}
    return Inputs(sides, _flops(lengths, lengths), packed.bytes(), missing)


def _long_training(dtype: torch.dtype, quick: bool) -> Inputs:
    batch, lengths = _long_shape(quick)
    packed = _packed(lengths, lengths, dtype)
    length = int(lengths[0])
    inputs = leaves(packed.q, packed.k, packed.v, packed.relative, packed.absolute)
    dense = leaves(*(_batched(x, batch) for x in (packed.q, packed.k, packed.v)))
    tables = leaves(packed.relative, packed.absolute)
    grad = torch.randn_like(packed.q)
    dense_grad = _batched(grad, batch)

    def without_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _sdpa(q, k, v, is_causal=True)

    def with_bias(q: Tensor, k: Tensor, v: Tensor, relative: Tensor, absolute: Tensor) -> Tensor:
        return _sdpa(q, k, v, attn_mask=dense_bias(relative, absolute, length, length).to(dtype))

    sides = {
        "ours": Side(training(partial(packed.attend, None), inputs, grad)),
        REFERENCE: Side(training(partial(packed.attend, "reference"), inputs, grad)),
        NO_BIAS: Side(training(without_bias, dense, dense_grad), None),
        LEARNED: Side(training(with_bias, dense + tables, dense_grad), unbatched),
    }
    # Backward: scores again, and four gradients' products. It reads q, k, v, the result and its gradient, and
    # writes three gradients.
    flops = 3.5 * _flops(lengths, lengths)
    return Inputs(sides, flops, packed.bytes() + size_of(*inputs, *inputs, grad, grad))


def _short(dtype: torch.dtype, quick: bool) -> Inputs:
    """Lengths that are log-normal with a mean of 40 and a most of 200."""
    lengths = torch.randn(8 if quick else 256, generator=torch.Generator().manual_seed(0)).exp()
    lengths = (lengths * 40 / lengths.mean()).round().clamp(1, 200).long()
    packed = _packed(lengths, lengths, dtype)
    longest = int(lengths.max())
    real = torch.arange(longest) < lengths[:, None]  # (B, S)

    def padded(x: Tensor) -> Tensor:
        out = x.new_zeros(len(lengths), longest, *x.shape[1:])
        out[real] = x
        return out.transpose(1, 2).contiguous()

    dense = [padded(x) for x in (packed.q, packed.k, packed.v)]
    bias = dense_bias(packed.relative, packed.absolute, longest, longest)
    # A mask for each sequence: where prompts differ, so do the ranks. Keys that are padding lie behind the
    # causal mask of all real queries.
    mask = bias.to(dtype).expand(len(lengths), -1, -1, -1).contiguous()
    sides = {
        "ours": packed.side(None),
        REFERENCE: packed.side("reference"),
        PADDED: Side(
            lambda: (_sdpa(*dense, attn_mask=mask),), lambda results: (results[0].transpose(1, 2)[real],)
        ),
    }
    return Inputs(sides, _flops(lengths, lengths), packed.bytes())


def _decode(dtype: torch.dtype, quick: bool) -> Inputs:
    batch, length = (4, 64) if quick else (64, 512)
    one, cached = torch.ones(batch, dtype=torch.int64), torch.full((batch,), length)
    packed = _packed(one, cached, dtype)
    dense = [_batched(x, batch) for x in (packed.q, packed.k, packed.v)]
    bias = dense_bias(packed.relative, packed.absolute, 1, length)
    mask = bias.to(dtype).expand(batch, -1, -1, -1).contiguous()
    sides = {
        "ours": packed.side(None),
        REFERENCE: packed.side("reference"),
        MASKED: Side(lambda: (_sdpa(*dense, attn_mask=mask),), unbatched),
    }
    return Inputs(sides, _flops(one, cached), packed.bytes())


def _benchmark(
    what: str,
    label: str,
    build: Callable[[torch.dtype, bool], Inputs],
    dtype: torch.dtype,
    against: dict[str, float | None],
    compute_share: float | None = None,
) -> Benchmark:
    against = {**against, REFERENCE: None}
    return Benchmark(
        "spae_attention", what, label, dtype, against, partial(build, dtype), compute_share=compute_share
    )


def benchmarks() -> list[Benchmark]:
    """All of this op."""
    out = []
    for dtype in (torch.float32, torch.bfloat16):
        full = dtype == torch.float32
        forward = {NO_BIAS: 0.5, DENSE: None, FLEX: None}
        learned = {NO_BIAS: 0.6, LEARNED: 0.2 if full else None}
        long = f"4 x 1024 tokens, {FORWARD}"
        out += [
            _benchmark(long, "spae long fwd", _long_forward, dtype, forward, 0.7 if full else None),
            _benchmark(f"4 x 1024 tokens, {TRAINING}", "spae long fwd+bwd", _long_training, dtype, learned),
            _benchmark(f"256 short sequences, {FORWARD}", "spae short fwd", _short, dtype, {PADDED: 0.15}),
            _benchmark("1 new token of 64 users, cache 512", "spae decode", _decode, dtype, {MASKED: 0.5}),
        ]
    return out
