"""topk_items: the k best of I items for N positions of hidden size H."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.case import REFERENCE, Benchmark, Inputs, Results, Side, size_of
from speeder_kernels import topk_items

MATMUL = "matmul + topk"


def _scores(results: Results) -> Results:
    """Items whose scores are nearly equal may change places."""
    return results[:1]


def _build(
    dtype: torch.dtype, shape: tuple[int, int, int, int], quick: bool, backend: str | None = None
) -> Inputs:
    positions, items, hidden, k = (min(shape[0], 8), 2000, 64, 10) if quick else shape
    hidden_NH, table_IH = torch.randn(positions, hidden).to(dtype), torch.randn(items, hidden).to(dtype)
    sides = {
        "ours": Side(lambda: topk_items(hidden_NH, table_IH, k, backend=backend), _scores),
        MATMUL: Side(lambda: (hidden_NH @ table_IH.T).topk(k), _scores),
        REFERENCE: Side(lambda: topk_items(hidden_NH, table_IH, k, backend="reference"), _scores),
    }
    results = positions * k * (4 + 8)
    return Inputs(sides, 2 * positions * items * hidden, size_of(hidden_NH, table_IH) + results)


def benchmarks() -> list[Benchmark]:
    """All of this op."""
    many, one = (256, 1_000_000, 64, 100), (1, 12_101, 576, 10)  # positions, items, hidden size, k
    return [
        Benchmark(
            "topk_items",
            workload,
            label,
            dtype,
            {MATMUL: target, REFERENCE: None},
            partial(_build, dtype, shape),
        )
        for workload, label, shape, target in (
            ("100 of 1,000,000 items, 256 positions", "top-k", many, 0.5),
            ("10 of 12,101 items, 1 position", "top-k, one", one, None),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
