"""Which backend serves which op, device and dtype; loads the compiled libraries and says why one is
missing.

Nothing is looked for at import: a program may import this package and start its worker processes before CUDA is
touched. What a backend needs is found out when it is first asked for, and CUDA and Triton are left alone as long
as all tensors are on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from speeder_kernels import _host
from speeder_kernels.validate import FLOATS, HALVES, names

NAMES = ("triton", "cuda", "cpu", "reference")  # in order of preference
OPS = ("spae_attention", "pack_tokens", "compress_items", "item_cross_entropy", "topk_items")

# The ops that a compiled backend has a kernel for. The reference has them all, on any device.
KERNELS: dict[str, tuple[str, ...]] = {
    "triton": OPS,
    "cuda": ("spae_attention", "pack_tokens", "compress_items"),
    "cpu": OPS,
    "reference": OPS,
}
DEVICES = {"triton": "cuda", "cuda": "cuda", "cpu": "cpu"}  # the reference runs anywhere


# What torch 2.10, the oldest that we take, asks for; 2.12 asks for 3.7, 2.14 for 3.8. With 3.6.0 every kernel
# compiles for sm_90 (six of spae_attention's configurations spill, as they do not with 3.9.0, for which tiles
# were chosen); tests of all ops pass in the interpreters of 3.6.0 (with a NumPy below 2.4, which it needs),
# 3.7.1, 3.8.0 and 3.9.0.
OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)  # compute capability: older ones have neither bfloat16 products nor asynchronous copies
LARGEST_HEAD = 256  # of spae_attention on a GPU: the tiles of wider heads do not fit into a processor
LARGEST_AMD_HEAD = 128  # the backward of wider ones takes more shared memory than CDNA3's 64 KiB
HOW_TO_BUILD = "pip install --no-build-isolation . builds it"


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
        kind = "cuda" if name == "_ops_cuda.so" else "cpu"
        return f"{name} was not built ({_host.build_info().get(f'{kind}_missing') or HOW_TO_BUILD})"
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
    return _load("_ops_cuda.so") or _old_driver(*_cuda_versions())


def _cuda_versions() -> tuple[int, int]:
    """Of the CUDA runtime within our library, and the newest that the driver knows: 1000 * major + 10 * minor."""
    runtime, driver = ctypes.c_int(), ctypes.c_int()
    library = ctypes.CDLL(str(library_path("_ops_cuda.so")))
    library.speeder_cuda_versions(ctypes.byref(runtime), ctypes.byref(driver))
    return runtime.value, driver.value


def _old_driver(runtime: int, driver: int) -> str:
    """Why this driver does not run our kernels, or an empty string.

    A driver serves every runtime of its own major version and of older ones.
    """
    if driver // 1000 >= runtime // 1000:
        return ""
    built, has = (f"CUDA {number // 1000}.{number % 1000 // 10}" for number in (runtime, driver))
    return (
        f"_ops_cuda.so was built with {built}, and the driver has {has if driver else 'no CUDA'}: update it"
    )


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
        version = str(importlib.import_module("triton").__version__)
    except Exception as error:  # a broken installation must not take the other backends with it
        return f"triton does not import: {error}"
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TRITON:
        return f"it needs triton {'.'.join(map(str, OLDEST_TRITON))} or newer, got {version}"
    return ""


_FINDERS: dict[str, Callable[[], str]] = {
    "triton": _find_triton,
    "cuda": _load_cuda,
    "cpu": lambda: _load("_ops.so"),
    "reference": lambda: "",
}


@functools.cache
def missing(name: str) -> str:
    """Why a backend is not available, or an empty string. The first question loads what it needs."""
    return _FINDERS[name]()


def backends() -> dict[str, Backend]:
    """The four backends by name, each with whether it is available, why not, and the ops it has.

    Asks for CUDA and, where there is a GPU, imports Triton. A backend that is available may still refuse a tensor:
    by its device, its dtype, an attention head that is too wide, or a GPU that is too old.

    Example:
        >>> backends()["reference"].available
        True
    """
    return {name: Backend(name, not missing(name), KERNELS[name], missing(name)) for name in NAMES}


def too_old(device: torch.device) -> str:
    """Why our kernels do not run on this GPU, or an empty string."""
    if torch.version.hip is not None:  # AMD's numbers mean something else
        return ""
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_GPU:
        return ""
    needed, got = (".".join(map(str, numbers)) for numbers in (OLDEST_GPU, capability))
    return f"it needs a GPU of compute capability {needed} or newer, got {got}"


def not_built_for(device: torch.device) -> str:
    """Why `_ops_cuda.so` has no code for this GPU, or an empty string.

    sm_80's code runs on 8.0 and on what follows it within 8; the PTX of the newest architecture on all that follow.
    """
    archs = [(int(arch[3:-1]), int(arch[-1])) for arch in _built_archs()]
    capability = torch.cuda.get_device_capability(device)
    runs = any(major == capability[0] and (major, minor) <= capability for major, minor in archs)
    if not archs or runs or max(archs) <= capability:
        return ""
    built, got = (", ".join(f"{major}.{minor}" for major, minor in each) for each in (archs, [capability]))
    return f"it was built for GPUs of compute capability {built} (SPEEDER_CUDA_ARCHS), got {got}"


@functools.cache
def _built_archs() -> list[str]:
    return _host.build_info().get("cuda_archs", "").split()


def dtypes(op: str, name: str) -> tuple[torch.dtype, ...]:
    """The element types that a backend other than the reference takes for an op.

    CUDA's attention has no float32, which is nobody's choice on a GPU and took longest to compile; Triton's has.
    """
    return HALVES if (op, name) == ("spae_attention", "cuda") else FLOATS


def _refusal(op: str, name: str, tensor: Tensor) -> str:
    """Why a backend cannot run this op on this tensor, or an empty string."""
    if missing(name):
        return missing(name)
    if op not in KERNELS[name]:
        return f"it has no kernel for {op}"
    if name == "reference":
        return ""
    interpreted = name == "triton" and interprets_triton()
    devices = ("cuda", "cpu") if interpreted else (DEVICES[name],)
    if tensor.device.type not in devices:
        return f"it runs on {' and '.join(devices)} tensors, got {tensor.device}"
    if tensor.dtype not in dtypes(op, name):
        return f"it runs on {names(dtypes(op, name))}, got {names((tensor.dtype,))}"
    if interpreted and tensor.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    if name != "cpu" and op == "spae_attention" and tensor.shape[-1] > LARGEST_HEAD:
        return f"it takes heads of at most {LARGEST_HEAD} elements, got {tensor.shape[-1]}"
    on_amd = name == "triton" and torch.version.hip is not None and not interpreted
    if on_amd and op == "spae_attention" and tensor.shape[-1] > LARGEST_AMD_HEAD:
        return f"on AMD GPUs it takes heads of at most {LARGEST_AMD_HEAD} elements, got {tensor.shape[-1]}"
    if tensor.device.type == "cuda" and not interpreted:
        return too_old(tensor.device) or (not_built_for(tensor.device) if name == "cuda" else "")
    return ""


@functools.cache
def _warn_of_the_reference(reason: str) -> None:
    """Once in a process: all works without the compiled kernels, but nobody should wonder why it is slow."""
    warnings.warn(
        f"speeder_kernels has no compiled CPU kernels, and runs on its slower reference: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def choose(op: str, backend: str | None, tensor: Tensor) -> str:
    """The backend to run `op` on `tensor`: the one asked for, or the first of NAMES that can.

    `tensor` is the argument that sets dtype and device for the others (and has the size of a head last).
    Triton's interpreter, which is there to find faults and takes seconds for what a kernel does in
    microseconds, runs only where it is asked for.

    Raises:
        ValueError: the backend asked for has no such name or cannot run this; the message says which can.
    """
    if backend is None:
        device = tensor.device.type
        for name in NAMES:
            if DEVICES.get(name, device) != device:
                continue  # before asking whether it is missing: a CPU tensor makes nobody look for CUDA
            if not (name == "triton" and interprets_triton()) and not _refusal(op, name, tensor):
                if name == "reference" and device == "cpu" and missing("cpu"):
                    _warn_of_the_reference(missing("cpu"))
                return name
    if backend not in NAMES:
        raise ValueError(f"backend: expected None or one of {', '.join(NAMES)}, got {backend!r}")
    reason = _refusal(op, backend, tensor)
    if reason:
        usable = ", ".join(name for name in NAMES if not _refusal(op, name, tensor))
        raise ValueError(f"backend: {backend!r} cannot run {op} here: {reason}; available: {usable}")
    return backend
