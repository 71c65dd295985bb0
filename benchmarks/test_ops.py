"""`pytest benchmarks --benchmark-only`: each side of each benchmark by pytest-benchmark, a group a benchmark.

It measures one side after the other; the ratios that the targets judge come from `benchmarks.table`, which
measures them in turns.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from benchmarks.case import Inputs
from benchmarks.suite import BENCHMARKS


@lru_cache(maxsize=1)  # the sides of one benchmark follow one another
def _inputs(name: str, quick: bool) -> Inputs:
    torch.manual_seed(0)
    return BENCHMARKS[name].build(quick)


@pytest.mark.parametrize(
    ("name", "side"), [(name, side) for name, case in BENCHMARKS.items() for side in case.sides]
)
def test_op(benchmark, request: pytest.FixtureRequest, name: str, side: str) -> None:
    inputs = _inputs(name, request.config.getoption("--quick"))
    if side in inputs.missing:
        pytest.skip(inputs.missing[side])
    benchmark.group = name
    benchmark.name = side
    run = inputs.sides[side].run
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
