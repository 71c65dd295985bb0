"""The machine and the settings that a run's numbers belong to."""

from __future__ import annotations

import platform

import torch

from speeder.io.machine import processor
from speeder_kernels import _host, backends


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
