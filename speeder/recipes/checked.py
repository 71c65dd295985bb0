"""Checked dataclasses, by pydantic: a wrong value is an error of one line that names its key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from speeder.errors import SpeederError

Made = TypeVar("Made")
# strict: True is no number, "2" is none, 2.5 is no whole number; but 2 is also 2.0
SETTINGS = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

_MOST = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=_MOST)]
CountOrZero = Annotated[int, Field(ge=0, le=_MOST)]
Size = Annotated[int, Field(ge=1, le=2**16)]  # of a part of a model
Seed = Annotated[int, Field(ge=0, le=_MOST)]  # numpy takes 32 bits, and each stage adds its number
Epochs = Annotated[float, Field(gt=0, le=1e6)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


def all_finite(value: Any, place: str = "") -> Any:
    """A plain value, after a check that no number in it is NaN or infinite, and that keys are text."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}expected a finite number, got {value!r}")
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{place}expected names as keys, got {key!r}")
            all_finite(entry, f"{place}{_shown(key)}: ")
    elif isinstance(value, list | tuple):
        for entry in value:
            all_finite(entry, place)
    return value


def _shown(key: Any) -> str:
    """A key in a message of one line."""
    text = str(key) if str(key).isprintable() else repr(key)
    return text if len(text) <= 80 else text[:79] + "…"


Arguments = Annotated[
    dict[str, Any], AfterValidator(all_finite)
]  # of a library's class, which checks the rest


@dataclass_transform()
def checked(
    error: type[Exception] = SpeederError, frozen: bool = False
) -> Callable[[type[Made]], type[Made]]:
    """A dataclass whose values are checked by their annotations.

    Args:
        error: raised for a wrong value, with one line that names its key.
    """

    def decorate(cls: type[Made]) -> type[Made]:
        made = pydantic_dataclass(cls, config=SETTINGS, frozen=frozen)
        init = made.__init__

        @wraps(init)
        def checked_init(self, *args: Any, **kwargs: Any) -> None:
            try:
                init(self, *args, **kwargs)
            except ValidationError as refused:
                raise error(_line(refused)) from None

        made.__init__ = checked_init
        return made

    return decorate


def build(cls: type[Made], data: Any, where: str) -> Made:
    """A checked dataclass from plain data, such as YAML; messages of `SpeederError` begin with `where`."""
    if not isinstance(data, dict):
        raise SpeederError(f"{where}: expected a mapping, got {type(data).__name__}")
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(map(repr, set(data) - set(known)))
    if unknown:
        raise SpeederError(f"{where}: unknown key {unknown[0]}; known: {', '.join(known)}")
    kinds = get_type_hints(cls)
    values = {
        key: _number(value) if float in (kinds[key], *get_args(kinds[key])) else value
        for key, value in data.items()
    }
    try:
        return cls(**values)
    except (SpeederError, TypeError, ValueError) as error:
        raise SpeederError(f"{where}: {error}") from error


def _number(value: Any) -> Any:
    """YAML reads 1e-3, which has no dot, as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _line(refused: ValidationError) -> str:
    """The first mistake of a pydantic error: key, what was expected, what came."""
    entry = refused.errors(include_url=False)[0]
    key = ".".join(map(_shown, entry["loc"]))
    if entry["type"] in ("missing", "missing_argument"):
        return f"{key}: expected a value, got none"
    if entry["type"] == "unexpected_keyword_argument":
        return f"unknown key {key!r}"
    if entry["type"] == "value_error":  # one of our own; without a key if it is about several
        message = entry["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    expected = _expected(entry["type"], entry.get("ctx", {}), entry["msg"])
    got = repr(entry["input"])
    return f"{key}: expected {expected}, got {got if len(got) <= 80 else got[:79] + '…'}"


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "dict": "a mapping",
    "finite": "a finite number",
}
_BOUNDS = {
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "at most {le}",
    "string_too_short": "a text that is not empty",
    "string_too_long": "a text of at most {max_length} characters",
    "too_short": "a list with at least one entry",
    "literal_error": "one of {expected}",
}


def _expected(kind: str, facts: Mapping[str, Any], message: str) -> str:
    if kind in _BOUNDS:
        facts = {
            name: f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else value
            for name, value in facts.items()
        }
        return _BOUNDS[kind].format(**facts).replace("'", "").replace(" or ", ", ")
    return _KINDS.get(kind.partition("_")[0], message)
