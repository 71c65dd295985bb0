"""What was built, which instruction set the compiled CPU kernels use, and their sequence-packing planner.

The last two are in the pybind11 module `_native`. Without a compiler it was not built, and the answers are "none".
"""

from __future__ import annotations

import numpy as np

try:
    from speeder_kernels import _native
except ImportError:  # it was not built, or does not load
    _native = None


def build_info() -> dict[str, str]:
    """What setup.py has written down: compiler, torch, cuda (its release), cuda_archs, and why kernels were left out
    (cpu_missing, cuda_missing). Empty where nothing was built."""
    try:
        from speeder_kernels._build_info import BUILD_INFO
    except ImportError:
        return {}
    return BUILD_INFO


def instruction_set() -> str:
    """The one that the CPU kernels use: portable, avx2, avx512, avx512_bf16 or avx512_amx; none without kernels.

    Raises:
        ValueError: SPEEDER_CPU_ISA names none of them, or one that cannot be used here.
    """
    return "none" if _native is None else _native.instruction_set()


def best_instruction_set() -> str:
    """The last of them that can be used here, which need not be the fastest."""
    return "none" if _native is None else _native.best_instruction_set()


def plan_packing(lengths: np.ndarray, max_tokens: int) -> list[list[int]] | None:
    """`speeder_kernels.plan_packing`, which has checked the arguments; None where it was not compiled."""
    return None if _native is None else _native.plan_packing(lengths, max_tokens)
