"""Every Triton kernel as it can be launched, compiled for each architecture with no GPU at hand: no register is
spilled, and shared memory stays within what the architecture has.

An op is compiled where gpu_resources.json has another hash of it, or with SPEEDER_COMPILE_ALL=1. Else these tests are
skipped: what they ask was asked when the file was written, of the same code. The end of the test run says which it was.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import compile_facts, gpu_resources, triton_aot
from tests.kernels.compile_summary import PROPERTY

SCRIPT = Path(triton_aot.__file__)


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env={**kept, **environ}, cwd=SCRIPT.parents[2], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def changed() -> list[str]:
    return gpu_resources.changed("triton")


@pytest.fixture(scope="module")
def compiled(changed) -> list[dict]:
    return gpu_resources.compile_triton(changed, jobs=2) if changed else []


@pytest.fixture
def table(changed, compiled, record_property) -> list[dict]:
    """The rows of what changed; skips where that is nothing."""
    record_property(PROPERTY, gpu_resources.summary("triton", changed))
    if not changed:
        pytest.skip("nothing changed since gpu_resources.json was written, when this was checked")
    assert {row["op"] for row in compiled} == set(changed)
    return compiled


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fact", compile_facts.TRITON_FACTS, ids=lambda fact: fact.__name__)
def test_kernels(table, fact):
    problems = fact(table)
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_takes_more_than_agreed(table, changed):
    problems = [
        problem
        for op in changed
        for problem in gpu_resources.worse("triton", [row for row in table if row["op"] == op], f"{op} ")
    ]
    assert not problems, "\n".join(problems)


def test_every_kernel_and_row_of_tiles_is_used():
    """By the calls that are compiled; nothing is compiled for it, so that it is always asked."""
    result = run(str(SCRIPT), "--dry")
    assert result.returncode == 0, result.stderr
    forgets = "from tests.kernels import triton_aot; del triton_aot.CASES['topk_items']; triton_aot.main()"
    result = run("-c", forgets, "--dry")
    assert result.returncode != 0 and "no case launches ['candidate_keys_kernel'," in result.stderr
    assert "('topk_items', 2)" in result.stderr


def test_interpreted_kernels_are_refused(tmp_path):
    result = run(str(SCRIPT), "--out", str(tmp_path / "table.json"), TRITON_INTERPRET="1")
    assert result.returncode != 0 and "TRITON_INTERPRET is set" in result.stderr


def test_occupancy():
    """By registers (64 a thread: half), by shared memory (100 KiB: two blocks), by warps of a block."""
    assert triton_aot.occupancy(registers=32, shared=0, warps=4, arch=90) == 1.0
    assert triton_aot.occupancy(registers=64, shared=0, warps=4, arch=90) == 0.5
    assert triton_aot.occupancy(registers=32, shared=100 << 10, warps=8, arch=90) == 0.25
    assert triton_aot.occupancy(registers=32, shared=100 << 10, warps=8, arch=80) == 0.125
    assert triton_aot.occupancy(registers=255, shared=0, warps=8, arch=90) == 0.125
