"""What a computed value depends on: the content of modules, compared before the value is used again.

Versions and addresses of tensors do not tell enough: a write to `.data`, a fused optimizer or a switched adapter
changes a module and leaves both as they are. So the content itself is read: the bytes of every weight and buffer, and
the settings that modules hold as plain attributes (an adapter's scale, whether it is active).
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from functools import cache, partial, wraps
from types import FunctionType, MappingProxyType, SimpleNamespace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import xxhash
from torch import nn
from torch._C import _functorch
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as every_module
from torch.nn.utils import parametrize

from speeder.data.catalogue import ItemCatalogue

Value = TypeVar("Value")
Function = TypeVar("Function", bound=Callable)

_CHUNK = 1 << 20  # numbers of a tensor on an accelerator that are multiplied and summed at once
# attributes of every module; those that matter are read on their own
_OWN = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Hooks that change no value: transformers' of layers, when hidden states are first asked for, and of the text
# embedding, for gradient checkpointing; torch's that count flops by module.
_ONLOOKERS = (
    "transformers.utils.output_capturing.",
    "transformers.modeling_utils.PreTrainedModel.enable_input_require_grads.",
    "torch.utils.module_tracker.ModuleTracker.",
)
_FIXED = (type, Enum, range, slice, torch.dtype, torch.device, torch.layout, torch.memory_format)
_ATOMS = (int, float, complex, str, bytes)
_MAPPINGS = (OrderedDict, defaultdict, dict, MappingProxyType)  # special ones first
_SETS = (set, frozenset)
# Python's types whose content can be read, with the size of an instance that has attributes too. What is larger, such
# as `random.Random`, holds something in slots or in C.
_SIZES = {
    base: base.__basicsize__ if base is MappingProxyType else type("", (base,), {}).__basicsize__
    for base in (*_ATOMS, *_MAPPINGS, *_SETS, tuple, list, deque, SimpleNamespace, object)
}

_read: ContextVar[dict[tuple[int, ...], tuple] | None] = ContextVar("contents", default=None)


@contextmanager
def read_once(model: nn.Module) -> Iterator[None]:
    """In this context each content is read once. Nothing may change a module in it: no caller's code may run inside. So
    it does nothing for a model with hooks.

    What is computed from an unknown content may be used again in it, and not after it.
    """
    alone = not _global_hooks() and not any(map(_hooks, model.modules()))
    known = _read.get()
    token = _read.set(None if not alone else {} if known is None else known)
    try:
        yield
    finally:
        _read.reset(token)


def reading_once(model_of: Callable[[Any], nn.Module]) -> Callable[[Function], Function]:
    """A function that runs in `read_once` of the model that its first argument leads to."""

    def decorate(function: Function) -> Function:
        @wraps(function)
        def run(first: Any, *args: Any, **kwargs: Any) -> Any:
            with read_once(model_of(first)):
                return function(first, *args, **kwargs)

        return run

    return decorate


def _global_hooks() -> bool:
    """Whether there are hooks for all modules that may do anything."""
    hooks = (every_module._global_forward_hooks, every_module._global_forward_pre_hooks)
    return any(not _only_looks_on(hook) for some in hooks for hook in some.values())


def _hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that may do anything."""
    attributes = vars(module)
    return any(not _only_looks_on(hook) for name in _HOOKS for hook in attributes.get(name, {}).values())


def _only_looks_on(hook: Callable) -> bool:
    return f"{hook.__module__}.{getattr(hook, '__qualname__', '')}".startswith(_ONLOOKERS)


@contextmanager
def for_later(device: str) -> Iterator[None]:
    """What is computed in this context may be kept: no tensor of inference mode, and nothing of the casts that autocast
    keeps of weights until its region ends, also where a weight has changed."""
    enabled = torch.is_autocast_enabled(device)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device, torch.get_autocast_dtype(device), enabled=enabled, cache_enabled=False),
    ):
        yield


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast computes in now, None without autocast."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class Kept(Generic[Value]):
    """One computed value, used again as long as the content that it was computed from is the same."""

    def __init__(self) -> None:
        self.clear()

    def get(self, content: tuple | None, compute: Callable[[], Value]) -> Value:
        """The kept value, if it was computed from this content; else a new one. Without a content none is kept."""
        kept = self._kept  # read once: another thread may write it
        if content is None or kept is None or kept[0] != content:
            kept = None
            self.clear()  # before the new value needs memory of its own
            kept = content, compute()
            self._kept = None if content is None else kept
        return kept[1]

    def clear(self) -> None:
        """Drop the value."""
        self._kept: tuple[tuple, Value] | None = None

    def __deepcopy__(self, memo: dict) -> Kept[Value]:
        return Kept()  # a copy of a model keeps nothing of the other one's memory

    def __reduce__(self) -> tuple:
        return Kept, ()


@torch.compiler.disable
def content_of(*modules: nn.Module, without: nn.Module | None = None) -> tuple | None:
    """The content of modules, with all inside them: what is equal computes the same.

    Args:
        without: a module inside them whose own weights are not read.

    Returns:
        None where the content is not known: a module in training mode (it may draw at random), one with hooks or a
        replaced `forward` (they may do anything), weights that are not in memory, or that several processes share, and
        attributes that cannot be compared. In a context of `read_once` something that is equal in this context only.
    """
    known, key = _read.get(), tuple(map(id, (*modules, without)))
    if known is not None and key in known:
        return known[key]
    reader = _Reader(without)
    try:
        if _global_hooks() or parametrize._cache_enabled:  # which keeps weights that may have changed
            raise _Unknown
        content = (*[reader.plain(module) for module in modules], reader.digest())
    except (_Unknown, RecursionError):
        content = None if known is None else (object(),)
    if known is not None:
        known[key] = content
    return content


@torch.compiler.disable
def hash_of(*tensors: torch.Tensor) -> bytes | None:
    """The hash of tensors' bytes, None where they cannot be read; in a context of `read_once` they are read once."""
    known, key = _read.get(), tuple(map(id, tensors))
    if known is not None and key in known:
        return known[key][0]
    reader = _Reader(None)
    try:
        for tensor in tensors:
            reader.plain(tensor)
        digest = reader.digest()
    except _Unknown:
        digest = None
    if known is not None:
        known[key] = (digest, tensors)  # held, so that no id is given to another tensor
    return digest


def is_known(content: tuple | None) -> bool:
    """Whether a content can be compared with that of a later call."""
    return content is not None and type(content[0]) is not object


class _Unknown(Exception):
    """Some of the content cannot be read."""


class _Reader:
    """Reads modules, objects and tensors, each once."""

    def __init__(self, without: nn.Module | None) -> None:
        self._without = without
        self._hash = xxhash.xxh3_128()
        self._codes: dict[type, tuple] = {}
        self._places: dict[int, int] = {}  # what was read, by its id -> in which order
        self._held: list[Any] = []  # so that no id is given to another object meanwhile

    def digest(self) -> bytes:
        """The hash of all tensors' bytes."""
        return self._hash.digest()

    def plain(self, value: Any) -> Any:
        """What compares as the content of a value does."""
        kind = type(value)
        if kind is str or value is None:  # most are: try nothing else
            return value
        if kind in _ATOMS or kind is bool:
            return kind, repr(value)  # 1, 1.0 and True are equal
        if isinstance(value, _FIXED):
            return value
        if kind is tuple:
            return tuple, tuple(map(self.plain, value))
        if id(value) in self._places:
            return self._places[id(value)]
        self._places[id(value)] = len(self._places)
        self._held.append(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray | np.generic):
            return self._array(np.asarray(value))
        if isinstance(value, partial):
            return self.plain(value.func), self.plain(value.args), self.plain(value.keywords)
        if inspect.isroutine(value):
            return self._function(value)
        if isinstance(value, ItemCatalogue):  # read-only; features may be memory-mapped and large
            return value, tuple(
                None if each.is_inference() else each._version for each in value.features.values()
            )
        return self._object(value)

    def _object(self, value: Any) -> tuple:
        """An object of any other class: what its base of Python's holds, and its attributes."""
        kind = type(value)
        base = next(base for base in _SIZES if issubclass(kind, base))
        slots = any(vars(each).get("__slots__") for each in kind.__mro__)
        if slots or kind.__basicsize__ > _SIZES[base] or kind is object:
            raise _Unknown
        if base in _ATOMS:
            held = base.__repr__(value)
        elif base in _MAPPINGS:
            held = tuple((self.plain(key), self.plain(part)) for key, part in base.items(value))
        elif base in _SETS:
            held = frozenset(map(self.plain, base.__iter__(value)))
        else:
            held = tuple(map(self.plain, base.__iter__(value))) if base in (tuple, list, deque) else ()
        further = [self.plain(getattr(value, name, None)) for name in ("default_factory", "maxlen")]
        return kind, held, *further, self.plain(vars(value)) if hasattr(value, "__dict__") else None

    def _module(self, module: nn.Module) -> tuple:
        attributes = vars(module)
        strange = isinstance(module, torch.jit.ScriptModule) or "forward" in attributes
        if strange or module.training or _hooks(module):
            raise _Unknown
        names = (
            ("_buffers", "_modules") if module is self._without else ("_parameters", "_buffers", "_modules")
        )
        parts = [self.plain(attributes[name]) for name in names]
        others = tuple((name, self.plain(value)) for name, value in attributes.items() if name not in _OWN)
        kind = type(module)
        if kind not in self._codes:
            self._codes[kind] = _code(kind)
        return self._codes[kind], *parts, others

    def _function(self, function: Any) -> tuple:
        """A function with what it has bound: the object of a method, and variables of the function around it."""
        cells = getattr(function, "__closure__", None) or ()
        try:
            bound = [cell.cell_contents for cell in cells]
        except ValueError:  # not bound yet
            raise _Unknown from None
        owner = getattr(function, "__self__", None)
        if inspect.isbuiltin(function) or inspect.ismodule(owner):
            owner = None
        code = getattr(function, "__func__", function)
        defaults = [getattr(function, name, None) for name in ("__defaults__", "__kwdefaults__")]
        return code, getattr(function, "__code__", None), *map(self.plain, (owner, bound, defaults))

    def _array(self, array: np.ndarray) -> tuple:
        if array.dtype.hasobject:
            raise _Unknown
        self._hash.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return str(array.dtype), array.shape

    def _tensor(self, tensor: torch.Tensor) -> tuple:
        if isinstance(tensor, DTensor) or tensor.is_meta or tensor.is_nested or tensor.is_quantized:
            raise _Unknown
        if _functorch.is_functorch_wrapped_tensor(tensor):
            raise _Unknown
        beside = (
            self.plain(vars(tensor)) if hasattr(tensor, "__dict__") else ()
        )  # such as a quantized weight's scales
        if hasattr(tensor, "__tensor_flatten__"):
            names, context = tensor.__tensor_flatten__()
            parts = [self.plain(getattr(tensor, name)) for name in names]
            return type(tensor), parts, self.plain(context), beside
        if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
            raise _Unknown
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        self._hash.update(raw.numpy() if raw.device.type == "cpu" else checksums(raw).cpu().numpy())
        return type(tensor), tensor.dtype, tuple(tensor.shape), tensor.device, beside


def _code(kind: type) -> tuple:
    """A module's class, with what a patch of the class changes, or an editor that reloads its file: the functions, and
    their code, and plain values."""
    found: list[Any] = [kind]
    for each in kind.__mro__:
        if each is nn.Module:
            break
        for name, value in vars(each).items():
            if isinstance(value, FunctionType):
                found += [name, value, value.__code__]
            elif type(value) in (bool, int, float):
                found += [name, repr(value)]
    return tuple(found)


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
