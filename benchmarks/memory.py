"""The peak memory of one side, measured in a process of its own.

`python -m benchmarks.memory NAME SIDE` prints it as JSON. Linux only: the kernel's high-water mark of resident
memory is set back once the inputs are there, so what the run adds is seen alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.case import size_of
from benchmarks.suite import BENCHMARKS

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Memory:
    """Bytes that a run needs beyond its inputs, and how many of them are its results."""

    peak: int
    results: int


def peak_memory(name: str, side: str, quick: bool, threads: int) -> Memory | str:
    """What a child process measures, or why it could not."""
    command = [sys.executable, "-m", "benchmarks.memory", name, side, f"--threads={threads}"]
    child = subprocess.run(
        command + ["--quick"] * quick, capture_output=True, text=True, cwd=ROOT, check=False
    )
    if child.returncode:
        return (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
    return Memory(**json.loads(child.stdout))


def _resident(field: str) -> int:
    """VmRSS (resident now) or VmHWM (the most so far) in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) * 1024


def _measure(name: str, side: str, quick: bool) -> Memory:
    build = BENCHMARKS[name].build
    build(True).sides[side].run()  # on small tensors: code pages, thread pools
    run = build(quick).sides[side].run
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # memory freed while the inputs were made must not serve the run
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    before = _resident("VmRSS")
    results = run()
    return Memory(_resident("VmHWM") - before, size_of(*results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME")
    parser.add_argument("side", metavar="SIDE")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(vars(_measure(args.name, args.side, args.quick))))


if __name__ == "__main__":
    main()
