"""The machine of a run or a measurement."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from speeder_kernels import _host

_TRIES, _SECONDS = 8, 0.2  # at most, of what `shortest` measures


def describe(threads: int) -> dict[str, object]:
    """Facts about this machine, for comparison with others."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "instruction set": _host.instruction_set(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def processor() -> str:
    """The processor's name, with family and model if the name is cut short (as on virtual machines)."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"


def shortest(work: Callable[[], object]) -> float:
    """The shortest time of at least two calls, in seconds: disturbances only slow down."""
    times, end = [], time.perf_counter() + _SECONDS
    while len(times) < 2 or (len(times) < _TRIES and time.perf_counter() < end):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
