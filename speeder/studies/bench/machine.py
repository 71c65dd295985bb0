"""The machine's peak rate of matrix products, and the memory and time of a process."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import torch

from speeder.io.machine import shortest
from speeder_kernels import item_cross_entropy

_SIZES = ((1024, 1024, 1024), (2048, 2048, 2048), (8192, 576, 1536))  # m, n, k


@torch.no_grad()
def gemm_peak(dtype: torch.dtype) -> float:
    """Flops a second of the fastest available product in `dtype`: torch's, in several sizes and both layouts, or the
    one inside the item cross-entropy. The best of several tries, since disturbances only slow down."""
    best = 0.0
    for m, n, k in _SIZES:
        left, right = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        for other in (right, right.T.contiguous().T):
            best = max(best, 2 * m * n * k / shortest(lambda a=left, b=other: a @ b))
    states, table = torch.randn(1024, 576).to(dtype), torch.randn(8192, 576).to(dtype)
    targets = torch.zeros(1024, dtype=torch.long)
    seconds = shortest(lambda: item_cross_entropy(states, table, targets, scale=1.0))
    return max(best, 2 * states.numel() * len(table) / seconds)


def reset_peak_memory() -> None:
    """Reset the peak that `peak_memory` returns; without the kernel's permission it covers the whole process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Peak resident bytes of this process; None if the system does not report them."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found.group(1)) * 1024 if found else None


def busy_seconds() -> float | None:
    """Busy seconds of all cores since the machine started, for all programs; None if unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """Processor seconds of this process."""
    times = os.times()
    return times.user + times.system
