"""The benchmarks run, compare the same results, and write their report. Nothing here judges a time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_roofline, report
from benchmarks.case import REFERENCE, TRAINING, Inputs
from benchmarks.gpu_loops import Instruction, main_loop
from benchmarks.suite import BENCHMARKS
from benchmarks.timing import Times, Timing

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", BENCHMARKS)
def test_sides_compute_the_same(name: str) -> None:
    case = BENCHMARKS[name]
    inputs = case.build(True)
    assert set(inputs.sides) | set(inputs.missing) == set(case.sides)
    assert inputs.flops > 0 and inputs.bytes > 0
    comparable = {side: it for side, it in inputs.sides.items() if it.to_ours is not None}
    results = {side: it.to_ours(it.run()) for side, it in comparable.items()}
    assert {"ours", REFERENCE} < set(results)
    share = 1e-4 if case.dtype == torch.float32 else 4e-2  # of the largest number: layouts, not accuracy
    for side in results:
        for ours, other in zip(results["ours"], results[side], strict=True):
            assert ours.shape == other.shape
            error = (ours.float() - other.float()).abs().max()
            assert error <= share * ours.float().abs().max(), (side, ours.shape)


def test_table_marks_what_others_disturbed() -> None:
    case = next(iter(BENCHMARKS.values()))
    times = {side: Times(1.0, 2.0, 3.0, 4) for side in case.sides}
    rows = report.time_rows(case, Inputs({}, 1.0, 1.0), times)
    for disturbed in (False, True):
        measured = {case.name: Timing(times, 1.0, disturbed)}
        text = report.markdown(report.Report({}, {}, rows, [], measured))
        marked = [line.endswith(f"{report.DISTURBED} |") for line in text.splitlines() if case.what in line]
        assert marked == [disturbed] * len(rows)


def test_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.table", "--quick", "--threads=1", f"--out={tmp_path}"]
    run = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    written = json.loads((tmp_path / "table.json").read_text())
    assert {row["op"] for row in written["rows"]} == {case.op for case in BENCHMARKS.values()}
    for row in written["rows"]:
        if row["other_side"].startswith("FlexAttention"):
            assert row["missing"]  # a quick run does not compile it, and says so
        elif row["kind"].startswith("peak memory"):  # tiny shapes may need no page more
            assert row["ours"] is not None and row["other"] is not None, row
        else:
            assert row["ours"] > 0 and row["other"] > 0 and row["ratio"] > 0, row
        measured = row["target"] is not None and row["ratio"] is not None
        assert (row["held"] is not None) == measured
    for name, case in BENCHMARKS.items():
        times = written["times"][name]["sides"]
        for side in set(case.sides) & set(times):
            assert 0 < times[side]["lower_quartile"] <= times[side]["median"] <= times[side]["upper_quartile"]
    assert all(limit > 0 for limit in written["limits"].values())
    text = (tmp_path / "table.md").read_text()
    assert all(case.what in text for case in BENCHMARKS.values())
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def code(*lines: str) -> list[Instruction]:
    """Instructions, 16 bytes each; a branch is "BRA n", or "BRA? n" where it may be passed by."""
    out = []
    for i, line in enumerate(lines):
        name, _, target = line.partition(" ")
        out.append(Instruction(16 * i, name.strip("?"), "?" in line, 16 * int(target) if target else None))
    return out


def test_the_main_loop_of_a_gpu_kernel() -> None:
    """Both ways through its branch, and not the loop with a mask, nor code behind the end that jumps back."""
    product = "HMMA.16816.F32.BF16"  # 2048 products
    body = [product, product, "BRA? 5", "FADD", "FADD", "MUFU.EX2", "BRA? 0"]
    masked = [product, *["ISETP"] * 20, "BRA? 7"]
    kernel = code(*body, *masked, "EXIT", product, "BRA 1")
    loop = main_loop(kernel, "80")
    assert (loop.matrix, loop.special, loop.fewest, loop.most, loop.instructions) == (16, 8, 5, 7, "HMMA")
    assert loop.share(loop.most) == 1 and loop.share(32) == 0.5
    assert main_loop(kernel, "90").share(1) == pytest.approx(0.625)
    assert main_loop(code("HGMMA.64x64x16.F32.BF16", "BRA? 0"), "90").matrix == 32
    assert main_loop(code(product, "EXIT"), "80") is None


def test_the_gpu_roofline_is_of_todays_shapes() -> None:
    """Its first table, which needs no compiler; `python -m benchmarks.gpu_roofline` rewrites the file."""
    assert "\n".join(gpu_roofline.bounds_table()) in gpu_roofline.OUT.read_text()


def test_the_gpu_roofline_and_the_gpu_benchmarks_share_their_shapes() -> None:
    """By the numbers that a benchmark's name tells."""
    works = [work for case in gpu_roofline.CASES for work in case.works()] + [*gpu_roofline.bandwidth_bound()]
    bounded = {(work.op, *re.findall(r"\d+(?:,\d{3})*", work.shape)) for work in works}
    for case in gpu.CASES:
        numbers = set(re.findall(r"\d+(?:,\d{3})*", case.what))
        assert any(case.op == op and numbers <= set(shape) for op, *shape in bounded), case.what
    for op, *shape in bounded:
        names = [set(re.findall(r"\d+(?:,\d{3})*", case.what)) for case in gpu.CASES if case.op == op]
        assert any(numbers <= set(shape) for numbers in names), (op, shape)


def test_the_gpu_waits_while_a_side_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the time of the host would be measured."""
    order = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 1.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"), raising=False)
    assert gpu.by_events(lambda: order.append("launch")) == 1.5
    assert order == ["synchronize", "sleep", "event", "launch", "event", "synchronize"]


@pytest.mark.parametrize("case", gpu.CASES, ids=lambda case: f"{case.op}-{case.what}")
def test_gpu_cases_compute_the_same(case: gpu.Case) -> None:
    """The cases of the GPU benchmarks with tiny tensors on the CPU: what needs no GPU runs, what does says why not."""
    torch.manual_seed(0)
    ours = ("cpu", "reference")
    inputs = case.build(torch.device("cpu"), ours, True)
    may_fail = GPU_ONLY | ({"FlexAttention, same bias"} if case.what.endswith(TRAINING) else set())
    assert set(inputs.missing) <= may_fail, inputs.missing
    results = {name: it.to_ours(it.run()) for name, it in inputs.sides.items() if it.to_ours is not None}
    assert set(ours) < set(results)
    for name in results:
        for expected, result in zip(results["reference"], results[name], strict=True):
            error = (expected.float() - result.float()).abs().max()
            assert error <= 4e-2 * expected.float().abs().max(), name
    times = gpu.medians(inputs.sides, lambda run: float(len(run())), rounds=2)
    text = gpu.rows(case, inputs, times)
    assert len(text) == len(inputs.sides) + len(inputs.missing)


# FlexAttention has no backward on a CPU.
GPU_ONLY = {"flash-attn, no bias", "flash-attn, ALiBi", "Liger"}


def test_gpu_benchmarks_without_a_gpu() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environ)
    assert run.returncode == 1
    assert run.stderr == "benchmarks.gpu: PyTorch finds no CUDA device, so there is nothing to measure\n"
