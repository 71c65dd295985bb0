"""`python -m benchmarks.table`: every op beside what it is compared with, and beside the machine's limits.

Writes table.md, table.json and roofline.png. Both sides of a ratio are measured in turns in this one run.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import machine, report, roofline
from benchmarks.case import Benchmark, Inputs, dtype_name
from benchmarks.memory import peak_memory
from benchmarks.peak import GemmPeak, copy_bandwidth
from benchmarks.suite import BENCHMARKS
from benchmarks.timing import Limits, Timing, timed
from speeder.io.memory import keep_freed_memory

LIMITS = Limits(seconds=6.0, least=5, most=1000)
QUICK_LIMITS = Limits(seconds=0.1, least=2, most=5)
REPEAT_UNTIL = 270.0  # seconds from the start: as long as that, what others disturbed is measured again


def measure(cases: list[Benchmark], threads: int, quick: bool) -> report.Report:
    """Time every benchmark, and the machine's limits before and after: a shared machine may be busy once."""
    deadline = time.perf_counter() + (0 if quick else REPEAT_UNTIL)
    about = machine.describe(threads, keep_freed_memory())
    if quick:
        about["tiny shapes"] = "a check that the benchmarks run: none of the numbers below mean anything"
    gemm = GemmPeak(about["instruction_set"])
    limits = [_limits(gemm, threads, quick)]
    measured, times = {}, {}
    for case in cases:
        measured[case.name], times[case.name] = _timed(case, quick)
    again = [case for case in cases if times[case.name].disturbed]
    while again and time.perf_counter() < deadline:
        case = again.pop(0)
        _, timing = _timed(case, quick)
        if timing.busy_elsewhere < times[case.name].busy_elsewhere:
            times[case.name] = timing
        if timing.disturbed:
            again.append(case)
    limits.append(_limits(gemm, threads, quick))
    best = {name: max(run[name] for run in limits) for name in limits[0]}

    rows, points = [], []
    for case in cases:
        # A dtype without products of its own is computed as float32.
        peak = best.get(_gemm(dtype_name(case.dtype)), best[_gemm("float32")])
        inputs, sides = measured[case.name], times[case.name].sides
        points.append(report.point(case, inputs, sides["ours"].median, peak, best[_COPY]))
        rows += report.time_rows(case, inputs, sides)
        for side, target in case.memory_against.items():
            both = (peak_memory(case.name, name, quick, threads) for name in ("ours", side))
            rows += report.memory_rows(case, side, target, *both)
        rows += report.share_rows(case, points[-1], peak, best[_COPY])
    return report.Report(about, best, rows, points, times)


def _timed(case: Benchmark, quick: bool) -> tuple[Inputs, Timing]:
    """The times, and the inputs without their tensors, whose memory the next benchmark needs."""
    start = time.perf_counter()
    torch.manual_seed(0)
    inputs = case.build(quick)
    timing = timed(case, inputs, QUICK_LIMITS if quick else LIMITS)
    sides = ", ".join(f"{name} {side.median * 1e3:.2f} ms" for name, side in timing.sides.items())
    rounds, seconds = timing.sides["ours"].runs, time.perf_counter() - start
    note = ", disturbed by other processes" if timing.disturbed else ""
    print(f"{case.name}: {sides} ({rounds} rounds, {seconds:.0f} s{note})", flush=True)
    return replace(inputs, sides={}), timing


_COPY = "copy bandwidth, GB/s"


def _gemm(dtype: str) -> str:
    return f"GEMM peak in {dtype}, GFLOP/s"


def _limits(gemm: GemmPeak, threads: int, quick: bool) -> dict[str, float]:
    peaks = gemm.measure(threads, seconds=0.1 if quick else 2.0)
    return {_COPY: copy_bandwidth(threads, quick), **{_gemm(dtype): peak for dtype, peak in peaks.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder to write to (default: bench)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--only", default="", help="benchmarks whose name contains this")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a check, not a measurement")
    args = parser.parse_args()
    cases = [case for name, case in BENCHMARKS.items() if args.only in name]
    if not cases:
        parser.error(f"--only: no benchmark's name contains {args.only!r}; there are {', '.join(BENCHMARKS)}")
    torch.set_num_threads(args.threads)
    result = measure(cases, args.threads, args.quick)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    (args.out / "table.md").write_text(report.markdown(result))
    roofline.draw(result, args.out / "roofline.png")
    print(f"wrote {args.out}/table.md, table.json and roofline.png")


if __name__ == "__main__":
    main()
