"""Which backend serves which op, device and dtype; loads the compiled libraries and says why one is
missing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from speeder_kernels.validate import FLOATS, names

NAMES = ("cuda", "triton", "cpu", "reference")  # in order of preference
OPS = ("spae_attention", "pack_tokens", "compress_items", "item_cross_entropy", "topk_items")

# The ops that a compiled backend has a kernel for. The reference has them all, on any device.
KERNELS: dict[str, tuple[str, ...]] = {
    "cuda": ("pack_tokens",),
    "triton": (),
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


def _backend(name: str, reason: str) -> Backend:
    if not reason and not KERNELS[name]:
        reason = "no op has a kernel for it yet"
    return Backend(name, not reason, KERNELS[name], reason)


_BACKENDS: dict[str, Backend] = {
    "cuda": _backend("cuda", _load_cuda()),
    "triton": _backend("triton", ""),
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
    device = "cpu" if name == "cpu" else "cuda"
    if tensor.device.type != device:
        return f"it runs on {device} tensors, got {tensor.device}"
    if tensor.dtype not in FLOATS:
        return f"it runs on {names(FLOATS)}, got {names((tensor.dtype,))}"
    return ""


def choose(op: str, backend: str | None, tensor: Tensor) -> str:
    """The backend to run `op` on `tensor`: the one asked for, or the first of NAMES that can.

    Raises:
        ValueError: the backend asked for has no such name or cannot run this; the message says which can.
    """
    if backend is None:
        for name in NAMES:
            if not _refusal(op, name, tensor):
                return name
    if backend not in NAMES:
        raise ValueError(f"backend: expected None or one of {', '.join(NAMES)}, got {backend!r}")
    reason = _refusal(op, backend, tensor)
    if reason:
        usable = ", ".join(name for name in NAMES if not _refusal(op, name, tensor))
        raise ValueError(f"backend: {backend!r} cannot run {op} here: {reason}; available: {usable}")
    return backend
