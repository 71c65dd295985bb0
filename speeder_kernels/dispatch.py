"""Which backend serves which op, device and dtype; loads the compiled libraries and says why one is
missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from speeder_kernels.validate import FLOATS, names

NAMES = ("triton", "cuda", "cpu", "reference")  # in order of preference
OPS = ("spae_attention", "pack_tokens", "compress_items", "item_cross_entropy", "topk_items")

# The ops that a compiled backend has a kernel for. The reference has them all, on any device.
KERNELS: dict[str, tuple[str, ...]] = {
    "triton": OPS,
    "cuda": ("spae_attention", "pack_tokens", "compress_items"),
    "cpu": OPS,
    "reference": OPS,
}


@dataclass(frozen=True)
class Backend:
    """One way to run the ops. `reason` says why it is not available, and is empty where it is."""

    name: str
    available: bool
    ops: tuple[str, ...]
    reason: str = ""


def library_path(name: str) -> Path:
    """Where the build puts a compiled library: beside this file."""
    return Path(__file__).with_name(name)


def _load(name: str) -> str:
    """Load one compiled library; returns why not, or an empty string."""
    path = library_path(name)
    if not path.exists():
        return f"{name} was not built (pip install --no-build-isolation . builds it)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{name} does not load: {str(error).splitlines()[0]}"
    return ""


def _load_cuda() -> str:
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) has no CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    return _load("_ops_cuda.so")


def interprets_triton() -> bool:
    """Whether Triton was told to run its kernels in Python, on any device; read as Triton itself reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _find_triton() -> str:
    """Why Triton cannot run here, or an empty string. The kernels are imported at the first call, not here."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not torch.cuda.is_available() and not interprets_triton():
        return "PyTorch finds no CUDA device, and TRITON_INTERPRET=1 is not set"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation must not take the other backends with it
        return f"triton does not import: {error}"
    return ""


def _backend(name: str, reason: str) -> Backend:
    return Backend(name, not reason, KERNELS[name], reason)


_BACKENDS: dict[str, Backend] = {
    "triton": _backend("triton", _find_triton()),
    "cuda": _backend("cuda", _load_cuda()),
    "cpu": _backend("cpu", _load("_ops.so")),
    "reference": _backend("reference", ""),
}


def backends() -> dict[str, Backend]:
    """The four backends by name, each with whether it is available, why not, and the ops it has.

    Example:
        >>> backends()["reference"].available
        True
    """
    return dict(_BACKENDS)


def _refusal(op: str, name: str, tensor: Tensor) -> str:
    """Why a backend cannot run this op on this tensor, or an empty string."""
    backend = _BACKENDS[name]
    if not backend.available:
        return backend.reason
    if op not in backend.ops:
        return f"it has no kernel for {op}"
    if name == "reference":
        return ""
    interpreted = name == "triton" and interprets_triton()
    devices = ("cuda", "cpu") if interpreted else ("cpu",) if name == "cpu" else ("cuda",)
    if tensor.device.type not in devices:
        return f"it runs on {' and '.join(devices)} tensors, got {tensor.device}"
    if tensor.dtype not in FLOATS:
        return f"it runs on {names(FLOATS)}, got {names((tensor.dtype,))}"
    if interpreted and tensor.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    return ""


def choose(op: str, backend: str | None, tensor: Tensor) -> str:
    """The backend to run `op` on `tensor`: the one asked for, or the first of NAMES that can.

    Triton's interpreter, which is there to find faults and takes seconds for what a kernel does in
    microseconds, runs only where it is asked for.

    Raises:
        ValueError: the backend asked for has no such name or cannot run this; the message says which can.
    """
    if backend is None:
        for name in NAMES:
            if (name != "triton" or not interprets_triton()) and not _refusal(op, name, tensor):
                return name
    if backend not in NAMES:
        raise ValueError(f"backend: expected None or one of {', '.join(NAMES)}, got {backend!r}")
    reason = _refusal(op, backend, tensor)
    if reason:
        usable = ", ".join(name for name in NAMES if not _refusal(op, name, tensor))
        raise ValueError(f"backend: {backend!r} cannot run {op} here: {reason}; available: {usable}")
    return backend
