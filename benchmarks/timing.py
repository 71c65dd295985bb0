"""Times the sides of a benchmark in turns, so that a change of the machine's speed meets all of them."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.case import Benchmark, Inputs, Results

EVERY = 4  # rounds between two runs of a side without a target


@dataclass(frozen=True)
class Times:
    """Seconds of one side's runs."""

    lower_quartile: float
    median: float
    upper_quartile: float
    runs: int


@dataclass(frozen=True)
class Timing:
    """One benchmark's times, by side."""

    sides: dict[str, Times]
    busy_elsewhere: float | None  # cores that other processes used meanwhile; None where it cannot be known


@dataclass(frozen=True)
class Limits:
    """How long one benchmark is measured: until `seconds` are over, within these numbers of rounds."""

    seconds: float
    least: int
    most: int


def timed(benchmark: Benchmark, inputs: Inputs, limits: Limits) -> Timing:
    """Time each side.

    A round runs ours and each side that has a target once; the order moves on by one every round, so that none
    always finds the cache as the same other left it. A side without a target has a turn every EVERY rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in inputs.sides}
    untargeted = {name for name, most in benchmark.against.items() if most is None}
    for side in inputs.sides.values():  # not measured: libraries, thread pools and memory get ready
        side.run()
    collects = gc.isenabled()
    gc.disable()
    began, others_before = time.perf_counter(), _others()
    end = began + limits.seconds
    names = list(inputs.sides)
    for turn in range(limits.most):
        if turn >= limits.least and time.perf_counter() > end:
            break
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            if name in untargeted and turn % EVERY:
                continue
            seconds[name].append(_seconds(inputs.sides[name].run))
    if collects:
        gc.enable()
    others = None
    if others_before is not None:
        others = max(0.0, _others() - others_before) / (time.perf_counter() - began)
    return Timing({name: _summary(values) for name, values in seconds.items()}, others)


def _others() -> float | None:
    """Seconds that all cores have spent on other processes, or were withheld from this virtual machine."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    ours = os.times()
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - ours.user - ours.system


def _seconds(run: Callable[[], Results]) -> float:
    start = time.perf_counter()
    results = run()
    end = time.perf_counter()
    del results  # outside the measured time: the caller would keep them
    return end - start


def _summary(values: list[float]) -> Times:
    lower, median, upper = (float(x) for x in np.quantile(values, [0.25, 0.5, 0.75]))
    return Times(lower, median, upper, len(values))
