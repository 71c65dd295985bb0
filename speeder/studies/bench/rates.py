"""From measured repetitions to the figures of tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Row:
    """One system at one point, as figures. None: not measured."""

    targets: float | None  # a second
    prompts: float | None
    users: float | None
    p50: float | None  # seconds
    p99: float | None
    share: float | None  # of the GEMM peak


def row(measured: dict, peak: float) -> Row:
    """The figures of what `run.measure_point` returns for a system."""
    samples = measured["samples"]

    def rate(task: str, unit: str) -> float | None:
        if task not in samples:
            return None
        return float(np.median([sample[unit] / sample["seconds"] for sample in samples[task]]))

    waits = [sample["seconds"] for sample in samples.get("single", ())]
    flops = rate("train", "flops")
    return Row(
        rate("train", "targets"),
        rate("train", "prompts"),
        rate("batch", "users"),
        float(np.quantile(waits, 0.5)) if waits else None,
        float(np.quantile(waits, 0.99)) if waits else None,
        flops and flops / peak,
    )


def best_peak(results: dict) -> float:
    """The highest rate of matrix products of several measurements: disturbances only slow down."""
    return max(point["peak"] for point in results["points"].values())


def ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None


def points(results: dict) -> dict[str, dict]:
    """Points by name: users as they are, growing histories, growing texts."""

    def place(entry: tuple[str, dict]) -> tuple[int, int]:
        workload = entry[1]["workload"]
        return workload["text"] or 0, workload["history"] or 0

    return dict(sorted(results["points"].items(), key=place))
