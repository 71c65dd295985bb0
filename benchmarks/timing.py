"""Times the sides of a benchmark in turns, so that a change of the machine's speed meets all of them."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.case import Benchmark, Inputs, Results

EVERY = 4  # rounds between two runs of a side without a target
SHORT = 0.05  # seconds: a side that takes less runs once unmeasured at the start of each of its turns
SLOW = 1.0  # seconds: a side without a target that takes longer runs once, the first run
DISTURBANCE = 0.1  # cores short of what our threads need


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
    disturbed: bool  # those processes left too few cores for our threads: the times are not to be trusted


@dataclass(frozen=True)
class Limits:
    """How long one benchmark is measured: until `seconds` are over, within these numbers of rounds."""

    seconds: float
    least: int
    most: int


def timed(benchmark: Benchmark, inputs: Inputs, limits: Limits) -> Timing:
    """Time each side.

    A round runs ours and each side that has a target once; the order moves on by one every round. A side without a
    target has a turn every EVERY rounds. A SHORT side's turn begins with a run that is not measured, because it pays
    for the others': what they wrote must leave the cache first.
    """
    collects = gc.isenabled()
    gc.disable()
    began, others_before = time.perf_counter(), _others()
    # A first run is not measured: libraries, thread pools and memory get ready. Where it is SLOW, that is little.
    first = {name: _seconds(side.run) for name, side in inputs.sides.items()}
    untargeted = {name for name, most in benchmark.against.items() if most is None and name in first}
    slow = {name for name in untargeted if first[name] > SLOW}
    seconds = {name: [first[name]] if name in slow else [] for name in first}
    end = time.perf_counter() + limits.seconds
    names = [name for name in first if name not in slow]
    for turn in range(limits.most):
        if turn >= limits.least and time.perf_counter() > end:
            break
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            if name in untargeted and turn % EVERY:
                continue
            if first[name] < SHORT:
                _seconds(inputs.sides[name].run)
            seconds[name].append(_seconds(inputs.sides[name].run))
    if collects:
        gc.enable()
    others, disturbed = None, False
    if others_before is not None:
        others = max(0.0, _others() - others_before) / (time.perf_counter() - began)
        disturbed = torch.get_num_threads() + others > os.cpu_count() + DISTURBANCE
    return Timing({name: _summary(values) for name, values in seconds.items()}, others, disturbed)


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
