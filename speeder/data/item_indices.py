"""Item indices from lists, arrays and tensors, without silent conversion: 1.9, True and b"1" are no indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from numbers import Number
from operator import index
from typing import Any

import numpy as np
import torch


def item_indices(name: str, entries: Sequence[int] | np.ndarray | torch.Tensor) -> list[int]:
    """Item indices as Python integers.

    Args:
        name: the argument's name, for errors.
        entries: integers of Python, numpy or torch; or a one-dimensional array or tensor of an integer dtype.

    Raises:
        TypeError: an entry is not an integer (a boolean is none), or `entries` is not in an order.
        ValueError: an entry is negative.
    """
    rows = _integers(name, entries)
    if rows and min(rows) < 0:
        raise ValueError(f"{name}: expected item indices of at least 0, got {min(rows)}")
    return rows


def item_array(name: str, entries: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
    """As `item_indices`, but `(n,)` int64, with no copy of such an array, and of any sign: the caller checks the
    range."""
    if isinstance(entries, np.ndarray) and entries.dtype == np.int64 and entries.ndim == 1:
        return entries
    return np.array(_integers(name, entries), dtype=np.int64)


def check_ordered(name: str, entries: Any) -> None:
    """Raise `TypeError` for what looks like a list of items and is none: text, bytes, a mapping, a set, one number."""
    if isinstance(entries, str | bytes | bytearray | memoryview | Mapping | Set) or not hasattr(
        entries, "__iter__"
    ):
        raise TypeError(f"{name}: expected a list of items, got {entries!r}")


def is_single(value: Any) -> bool:
    """Whether a value is one item, an index or an id, where a list of items belongs."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.ndim == 0
    return isinstance(value, str | bytes | bytearray | Number | np.generic)


def as_index(name: str, entry: Any) -> int:
    """One item index as a Python integer; raises `TypeError` for anything but an integer of Python, numpy or torch."""
    if type(entry) is int:
        return entry
    if not (isinstance(entry, bool) or (isinstance(entry, torch.Tensor) and entry.dtype == torch.bool)):
        try:
            return index(entry)
        except TypeError:
            pass
    raise TypeError(f"{name}: expected item indices as integers, got {entry!r}")


def _integers(name: str, entries: Any) -> list[int]:
    if isinstance(entries, np.ndarray | torch.Tensor):
        if entries.ndim != 1:
            raise TypeError(f"{name}: expected one dimension, got shape {tuple(entries.shape)}")
        if len(entries) == 0 or _holds_integers(entries):
            return entries.tolist()
        if entries.dtype != object:
            raise TypeError(f"{name}: expected item indices as integers, got {entries.dtype}")
    check_ordered(name, entries)
    entries = list(entries)
    if set(map(type, entries)) <= {int}:  # the usual case, at the speed of C
        return entries
    return [as_index(name, entry) for entry in entries]


def _holds_integers(entries: np.ndarray | torch.Tensor) -> bool:
    if isinstance(entries, np.ndarray):
        return entries.dtype.kind in "iu"
    return not (entries.dtype.is_floating_point or entries.dtype.is_complex or entries.dtype == torch.bool)
