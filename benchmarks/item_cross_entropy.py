"""item_cross_entropy: N positions against I items of hidden size H, with both gradients."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import REFERENCE, TRAINING, Benchmark, Inputs, Side, leaves, size_of, training
from speeder_kernels import item_cross_entropy

FULL = "full logits + F.cross_entropy"


def _build(dtype: torch.dtype, quick: bool) -> Inputs:
    positions, items, hidden = (32, 1000, 64) if quick else (1024, 100_000, 576)
    inputs = leaves(torch.randn(positions, hidden).to(dtype), torch.randn(items, hidden).to(dtype))
    targets = torch.randint(items, (positions,))
    grad = torch.full((positions,), 1 / positions)
    scale = hidden**-0.5

    def ours(hidden_NH: Tensor, table_IH: Tensor, backend: str | None = None) -> Tensor:
        return item_cross_entropy(hidden_NH, table_IH, targets, scale=scale, backend=backend)

    def full(hidden_NH: Tensor, table_IH: Tensor) -> Tensor:
        # The fastest way to write it: the scale on the smaller matrix, and the loss in the logits' dtype.
        return F.cross_entropy((hidden_NH * scale) @ table_IH.T, targets, reduction="none")

    sides = {
        "ours": Side(training(ours, inputs, grad)),
        FULL: Side(training(full, inputs, grad.to(dtype))),
        REFERENCE: Side(training(partial(ours, backend="reference"), inputs, grad)),
    }
    # Logits, logits again since they are not held, and two gradients.
    flops = 4 * 2 * positions * items * hidden
    return Inputs(sides, flops, 3 * size_of(*inputs))


def benchmarks() -> list[Benchmark]:
    """All of this op."""
    return [
        Benchmark(
            "item_cross_entropy",
            f"1024 positions, 100,000 items, {TRAINING}",
            "cross-entropy fwd+bwd",
            dtype,
            {FULL: 0.8, REFERENCE: None},
            partial(_build, dtype),
            memory_against={FULL: 0.1},
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
