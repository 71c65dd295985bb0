"""What a computed value depends on: the content of modules, compared before the value is used again.

Versions and addresses of tensors do not tell enough: a write to `.data`, a fused optimizer or a switched adapter
changes a module and leaves both as they are. So the content itself is read: the bytes of every weight and buffer, and
the settings that modules hold as plain attributes (an adapter's scale, whether it is active).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import xxhash
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

Value = TypeVar("Value")

_CHUNK = 1 << 20  # numbers of a tensor on an accelerator that are multiplied and summed at once
_OWN = frozenset(vars(nn.Module()))  # attributes of every module; those that matter are read on their own
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# hooks that only look on: transformers adds them to layers when hidden states are first asked for
_ONLOOKERS = ("transformers.utils.output_capturing",)

_read: ContextVar[dict[tuple[int, ...], tuple | None] | None] = ContextVar("contents", default=None)


@contextmanager
def read_once() -> Iterator[None]:
    """In this context each content is read once. Nothing may change a module in it, so never yield to a caller."""
    token = _read.set({}) if _read.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _read.reset(token)


class Kept(Generic[Value]):
    """One computed value, used again as long as the content that it was computed from is the same."""

    def __init__(self) -> None:
        self.clear()

    def get(self, content: tuple | None, compute: Callable[[], Value]) -> Value:
        """The kept value, if it was computed from this content; else a new one. Without a content none is kept."""
        if content is None or content != self._content:
            self.clear()  # before the new value needs memory of its own
            value = compute()
            if content is None:
                return value
            self._value, self._content = value, content
        return self._value

    def clear(self) -> None:
        """Drop the value."""
        self._content: tuple | None = None
        self._value: Any = None

    def __deepcopy__(self, memo: dict) -> Kept[Value]:
        return Kept()  # a copy of a model keeps nothing of the other one's memory

    def __reduce__(self) -> tuple:
        return Kept, ()


def content_of(*parts: nn.Module | PreTrainedConfig, without: nn.Module | None = None) -> tuple | None:
    """The content of modules, with all inside them, and of configurations: what is equal computes the same.

    Args:
        without: a module inside them that is not read.

    Returns:
        None where the content is not known: a module in training mode (it may draw at random), one with hooks or a
        replaced `forward` (they may do anything), weights that are not in memory, or that several processes share.
    """
    known, key = _read.get(), tuple(map(id, (*parts, without)))
    if known is not None and key in known:
        return known[key]
    reader = _Reader(without)
    try:
        content = (*[reader.plain(part) for part in parts], reader.digest())
    except _Unknown:
        content = None
    if known is not None:
        known[key] = content
    return content


class _Unknown(Exception):
    """Some of the content cannot be read."""


class _Reader:
    """Reads modules, configurations and tensors, each once."""

    def __init__(self, without: nn.Module | None) -> None:
        self._without = without
        self._hash = xxhash.xxh3_128()
        self._places: dict[int, int] = {}  # what was read, by its id -> in which order

    def digest(self) -> bytes:
        """The hash of all tensors' bytes."""
        return self._hash.digest()

    def plain(self, value: Any) -> Any:
        """What compares as the content of a value does. Of an unknown kind it is the object itself."""
        if isinstance(value, str | int | float) or value is None:  # most are; no need to try the others
            return value
        if isinstance(value, Mapping):
            return tuple((key, self.plain(part)) for key, part in value.items())
        if isinstance(value, list | tuple):
            return tuple(map(self.plain, value))
        if isinstance(value, set):
            return frozenset(value)
        for kind, read in (
            (torch.Tensor, self._tensor),
            (np.ndarray, self._array),
            (nn.Module, self._module),
            (PreTrainedConfig, lambda config: self.plain(vars(config))),
        ):
            if isinstance(value, kind):
                if id(value) in self._places:
                    return self._places[id(value)]
                self._places[id(value)] = len(self._places)
                return read(value)
        return value

    def _module(self, module: nn.Module) -> tuple:
        if module is self._without:
            return ()
        attributes = vars(module)
        hooks = [hook for name in _HOOKS for hook in attributes[name].values()]
        if module.training or "forward" in attributes or any(h.__module__ not in _ONLOOKERS for h in hooks):
            raise _Unknown
        parts = [attributes[name] for name in ("_parameters", "_buffers", "_modules")]
        others = [(name, self.plain(value)) for name, value in attributes.items() if name not in _OWN]
        return type(module), *map(self.plain, parts), others

    def _array(self, array: np.ndarray) -> tuple:
        self._hash.update(np.ascontiguousarray(array).view(np.uint8))
        return array.dtype, array.shape

    def _tensor(self, tensor: torch.Tensor) -> tuple:
        if isinstance(tensor, DTensor) or tensor.is_meta:
            raise _Unknown
        if hasattr(tensor, "__tensor_flatten__"):  # a subclass, such as a quantized weight
            names, context = tensor.__tensor_flatten__()
            return type(tensor), [self.plain(getattr(tensor, name)) for name in names], self.plain(context)
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        self._hash.update(raw.numpy() if raw.device.type == "cpu" else checksums(raw).cpu().numpy())
        return tensor.dtype, tuple(tensor.shape), tensor.device


def checksums(raw: torch.Tensor) -> torch.Tensor:
    """`(N,)` uint8 on an accelerator to sums that tell its content, `(ceil(N / 4 / 2^20),)` int64, computed there.

    Each four bytes, as a number, are multiplied by a random number of their place, modulo 2^64. Two different contents
    have the same sums with a chance of at most 2^-32 (multilinear hashing).
    """
    numbers = nn.functional.pad(raw, (0, -len(raw) % 4)).view(torch.int32)
    factors = _factors(raw.device)
    sums = [(chunk.long() * factors[: len(chunk)]).sum() for chunk in numbers.split(_CHUNK)]
    return torch.stack(sums)


@cache
def _factors(device: torch.device) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(-(1 << 63), (1 << 63) - 1, (_CHUNK,), generator=random).to(device)
