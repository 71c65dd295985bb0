"""What was built, which instruction set the compiled CPU kernels use, and their sequence-packing planner.

Plain C functions of `_ops.so`, called by ctypes. Without that library the answers are "none".
"""

from __future__ import annotations

import ctypes
import functools
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch  # noqa: F401  (the library needs torch's own, which this loads)

_int64_p = np.ctypeslib.ndpointer(np.int64, flags="C_CONTIGUOUS")


def build_info() -> dict[str, str]:
    """What setup.py has written down: compiler, torch, cuda (its release), cuda_archs, and why kernels were left out
    (cpu_missing, cuda_missing). Empty where nothing was built."""
    try:
        from speeder_kernels._build_info import BUILD_INFO
    except ImportError:
        return {}
    return BUILD_INFO


@functools.cache
def _library() -> ctypes.CDLL | None:
    path = Path(__file__).with_name("_ops.so")
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # it was not built, or does not load: `backends()` says which
        return None
    library.speeder_instruction_set.restype = library.speeder_best_instruction_set.restype = ctypes.c_char_p
    library.speeder_plan_packing.argtypes = [_int64_p, ctypes.c_int64, ctypes.c_int64, _int64_p, _int64_p]
    library.speeder_plan_packing.restype = ctypes.c_int64
    return library


def instruction_set() -> str:
    """The one that the CPU kernels use: portable, avx2, avx512, avx512_bf16 or avx512_amx; none without kernels.

    Raises:
        ValueError: SPEEDER_CPU_ISA names none of them, or one that cannot be used here.
    """
    library, error = _library(), ctypes.c_char_p()
    if library is None:
        return "none"
    name = library.speeder_instruction_set(ctypes.byref(error))
    if name is None:
        raise ValueError(error.value.decode())
    return name.decode()


def best_instruction_set() -> str:
    """The last of them that can be used here, which need not be the fastest."""
    library = _library()
    return "none" if library is None else library.speeder_best_instruction_set().decode()


def plan_packing(lengths: np.ndarray, max_tokens: int) -> list[list[int]] | None:
    """`speeder_kernels.plan_packing`, which has checked the arguments; None where it was not compiled."""
    library = _library()
    if library is None:
        return None
    order, starts = np.empty(len(lengths), np.int64), np.empty(len(lengths) + 1, np.int64)
    bins = library.speeder_plan_packing(lengths, len(lengths), max_tokens, order, starts)
    indices = order.tolist()
    return [indices[start:end] for start, end in pairwise(starts[: bins + 1].tolist())]
