"""Validated dataclasses from plain data, such as YAML: errors name unknown keys and wrong types."""

from __future__ import annotations

import dataclasses
from typing import Any

from speeder.errors import SpeederError


def build(cls: type, data: Any, where: str):
    """A dataclass from plain data, with checked keys and types; messages of `SpeederError` begin with `where`."""
    if not isinstance(data, dict):
        raise SpeederError(f"{where}: expected a mapping, got {type(data).__name__}")
    known = {entry.name: entry for entry in dataclasses.fields(cls)}
    unknown = sorted(map(str, set(data) - set(known)))
    if unknown:
        raise SpeederError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(known)}")
    values = {}
    for key, value in data.items():
        if known[key].type.startswith("float") and isinstance(value, str):  # YAML reads 1e-3 as a string
            try:
                value = float(value)
            except ValueError:
                raise SpeederError(f"{where}: {key}: expected a number, got {value!r}") from None
        values[key] = value
    _check_types(values, known, where)
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise SpeederError(f"{where}: {str(error).split('__init__() ')[-1]}") from error


_TYPES = {
    "str": str,
    "str | None": (str, type(None)),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "int": int,
    "int | None": (int, type(None)),
    "bool": bool,
    "list[str]": list,
    "list[Stage]": list,
    "dict[str, Any]": dict,
    "dict[str, Any] | None": (dict, type(None)),
}


def _check_types(values: dict[str, Any], known: dict, where: str) -> None:
    for key, value in values.items():
        wanted = known[key].type
        if not isinstance(value, _TYPES[wanted]) or (isinstance(value, bool) and wanted != "bool"):
            raise SpeederError(f"{where}: {key}: expected {wanted}, got {value!r}")
