"""compress_items: U items of M modalities become tokens of hidden size H."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import REFERENCE, TRAINING, Benchmark, Inputs, Side, leaves, size_of, training
from speeder_kernels import compress_items

EAGER = "eager"
EAGER_BMM = "eager, the sum by bmm"


def _weighted_sum(gates_UM: Tensor, experts_UMH: Tensor) -> Tensor:
    return (gates_UM[..., None] * experts_UMH).sum(1)


def _by_bmm(gates_UM: Tensor, experts_UMH: Tensor) -> Tensor:
    return torch.bmm(gates_UM[:, None], experts_UMH)[:, 0]


def _build(dtype: torch.dtype, quick: bool, backend: str | None = None) -> Inputs:
    items, modalities, hidden = (64, 3, 64) if quick else (4096, 3, 576)
    experts, logits, weight = leaves(
        torch.randn(items, modalities, hidden).to(dtype), torch.randn(items, modalities), torch.ones(hidden)
    )
    present = torch.rand(items, modalities) < 0.8
    present[:, 0] = True
    grad = torch.randn(items, hidden).to(dtype)

    def ours(experts: Tensor, logits: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
        return compress_items(experts, logits, present, weight, backend=backend)[0]

    def eager(
        mix: Callable[[Tensor, Tensor], Tensor], experts: Tensor, logits: Tensor, weight: Tensor
    ) -> Tensor:
        gates = logits.masked_fill(~present, float("-inf")).softmax(-1).to(dtype)
        return F.rms_norm(mix(gates, experts), (hidden,), weight.to(dtype), 1e-6)

    def side(function: Callable[..., Tensor]) -> Side:
        return Side(training(function, [experts, logits, weight], grad))

    sides = {
        "ours": side(partial(ours, backend=backend)),
        EAGER: side(partial(eager, _weighted_sum)),
        EAGER_BMM: side(partial(eager, _by_bmm)),
        REFERENCE: side(partial(ours, backend="reference")),
    }
    # An element of the experts: mixed twice, its gradient, its share of the gate's. An element of the mix: its
    # square twice, and twice scaled; backward scaled, its share along, taken off, its share of the weight's.
    flops = items * hidden * (7 * modalities + 14)
    moved = size_of(experts, experts, experts, grad, grad, logits, logits, present)
    return Inputs(sides, flops, moved)


def benchmarks() -> list[Benchmark]:
    """All of this op."""
    against = {EAGER: 0.4, EAGER_BMM: 0.4, REFERENCE: None}
    return [
        Benchmark(
            "compress_items",
            f"4096 items of 3 modalities, {TRAINING}",
            "compress fwd+bwd",
            dtype,
            against,
            partial(_build, dtype),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
