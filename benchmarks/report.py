"""The rows of the tables, and how they are written."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.case import Benchmark, Inputs, dtype_name
from benchmarks.memory import Memory
from benchmarks.timing import Times, Timing

TIME, MEMORY, WORKSPACE = "time", "peak memory", "peak memory without results"
COMPUTE, BANDWIDTH = "GFLOP/s", "GB/s"
DISTURBED = "(disturbed)"
_AT_LEAST = (COMPUTE, BANDWIDTH)  # ours is to reach a share; elsewhere it is to stay below one


@dataclass(frozen=True)
class Row:
    """One comparison. `ratio` is ours / other; where it could not be measured, `missing` says why."""

    op: str
    what: str
    dtype: str
    kind: str  # TIME (seconds), MEMORY and WORKSPACE (bytes), COMPUTE, BANDWIDTH
    other_side: str
    ours: float | None
    other: float | None
    ratio: float | None
    target: float | None
    held: bool | None  # None where there is no target, or no ratio
    missing: str


@dataclass(frozen=True)
class Point:
    """What ours reaches on one benchmark, for the roofline."""

    op: str
    what: str
    label: str
    dtype: str
    seconds: float
    gflops: float  # GFLOP/s
    gigabytes: float  # GB/s
    intensity: float  # flop per byte
    share_of_peak: float
    share_of_bandwidth: float


@dataclass(frozen=True)
class Report:
    """What table.json holds."""

    machine: dict[str, object]
    limits: dict[str, float]
    rows: list[Row]
    points: list[Point]
    times: dict[str, Timing]  # by benchmark


def row(
    case: Benchmark,
    kind: str,
    other_side: str,
    ours: float | None,
    other: float | None,
    target: float | None,
    missing: str = "",
) -> Row:
    """A row with its ratio, and whether the target holds."""
    ratio = ours / other if ours is not None and other else None
    held = None
    if ratio is not None and target is not None:
        held = ratio >= target if kind in _AT_LEAST else ratio <= target
    what = (case.op, case.what, dtype_name(case.dtype))
    return Row(*what, kind, other_side, ours, other, ratio, target, held, missing)


def time_rows(case: Benchmark, inputs: Inputs, times: dict[str, Times]) -> list[Row]:
    """One row for each other side."""
    rows = []
    for name, target in case.against.items():
        other = times[name].median if name in times else None
        rows.append(row(case, TIME, name, times["ours"].median, other, target, inputs.missing.get(name, "")))
    return rows


def memory_rows(
    case: Benchmark, other_side: str, target: float, ours: Memory | str, other: Memory | str
) -> list[Row]:
    """Two rows: all that a run needs beyond its inputs, and the same without the results, which both hold."""
    failures = [side for side in (ours, other) if isinstance(side, str)]
    if failures:
        return [row(case, kind, other_side, None, None, target, failures[0]) for kind in (MEMORY, WORKSPACE)]
    without = (ours.peak - ours.results, other.peak - other.results)
    return [
        row(case, MEMORY, other_side, ours.peak, other.peak, target),
        row(case, WORKSPACE, other_side, *without, target),
    ]


def share_rows(case: Benchmark, point: Point, peak: float, bandwidth: float) -> list[Row]:
    """A row for each share of the machine's limits that is asked for."""
    rows = []
    if case.compute_share:
        rows.append(row(case, COMPUTE, "measured GEMM peak", point.gflops, peak, case.compute_share))
    if case.bandwidth_share:
        other_side = "measured copy bandwidth"
        rows.append(row(case, BANDWIDTH, other_side, point.gigabytes, bandwidth, case.bandwidth_share))
    return rows


def point(case: Benchmark, inputs: Inputs, seconds: float, peak: float, bandwidth: float) -> Point:
    """Ours beside the limits."""
    gflops, gigabytes = inputs.flops / seconds / 1e9, inputs.bytes / seconds / 1e9
    what = (case.op, case.what, case.label, dtype_name(case.dtype))
    intensity = inputs.flops / inputs.bytes
    return Point(*what, seconds, gflops, gigabytes, intensity, gflops / peak, gigabytes / bandwidth)


def markdown(report: Report) -> str:
    """All of it but the spread of the times."""
    judged = [one.held for one in report.rows if one.target is not None]
    lines = ["# Benchmarks", "", *(f"- {name}: {_plain(value)}" for name, value in report.machine.items())]
    lines += [f"- measured {name}: {value:.0f}" for name, value in report.limits.items()]
    lines += [
        "",
        f"{judged.count(True)} of {len(judged)} targets hold. Ratios are ours / other, of medians.",
        "",
    ]
    disturbed = {name for name, timing in report.times.items() if timing.disturbed}
    if disturbed:
        lines += [f"{DISTURBED}: other processes took cores meanwhile; not to be trusted.", ""]
    lines += ["| op | case | dtype | of | against | ours | other | ratio | target | holds |"]
    lines += ["|---|---|---|---|---|---:|---:|---:|---:|---|"]
    for one in report.rows:
        sign = "≥" if one.kind in _AT_LEAST else "≤"
        cells = [one.op, one.what, one.dtype, one.kind, one.other_side]
        cells += [_quantity(one.kind, one.ours), _quantity(one.kind, one.other)]
        cells += ["-" if one.ratio is None else f"{one.ratio:.3f}"]
        cells += ["" if one.target is None else f"{sign} {one.target:g}"]
        cells += [one.missing or {True: "yes", False: "**no**", None: ""}[one.held]]
        if one.kind not in (MEMORY, WORKSPACE) and f"{one.op}, {one.what}, {one.dtype}" in disturbed:
            cells[-1] = f"{cells[-1]} {DISTURBED}".strip()
        lines.append(_line(cells))
    lines += ["", "## Beside the machine's limits", "", "![roofline](roofline.png)", ""]
    lines += [
        "| op | case | dtype | time | GFLOP/s | of GEMM peak | GB/s | of copy bandwidth | flop / byte |"
    ]
    lines += ["|---|---|---|---:|---:|---:|---:|---:|---:|"]
    for one in report.points:
        cells = [one.op, one.what, one.dtype, _quantity(TIME, one.seconds), f"{one.gflops:.1f}"]
        cells += [f"{one.share_of_peak:.0%}", f"{one.gigabytes:.1f}", f"{one.share_of_bandwidth:.0%}"]
        lines.append(_line([*cells, f"{one.intensity:.3g}"]))
    return "\n".join(lines) + "\n"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} ({', '.join(items)})" for name, items in value.items())
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _quantity(kind: str, value: float | None) -> str:
    if value is None:
        return "-"
    if kind == TIME:
        return f"{value * 1e3:.2f} ms"
    return f"{value:.1f}" if kind in _AT_LEAST else f"{value / 1e6:.0f} MB"
