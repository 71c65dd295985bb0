"""The machine and the settings that a run's numbers belong to."""

from __future__ import annotations

import ctypes
import platform
import sys

import torch

from speeder.io.machine import processor
from speeder_kernels import _host, backends

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep what is freed, as jemalloc and tcmalloc do; returns whether it does.

    As it comes it gives back every block above 32 MB, and what is timed is then the kernel clearing fresh
    pages, on all sides.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))


def describe(threads: int, keeps_memory: bool) -> dict[str, object]:
    """What a reader must know to compare with another machine."""
    return {
        "processor": processor(),
        "instruction_set": _host.instruction_set(),
        "threads": threads,
        "torch": torch.__version__,
        "compiler": _host.build_info().get("compiler", "none"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "freed memory is kept": keeps_memory,
        "backends": {name: list(backend.ops) for name, backend in backends().items() if backend.available},
    }
