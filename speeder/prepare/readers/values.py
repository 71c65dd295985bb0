"""Checks of raw values: identifiers, ratings, JSON objects and Python literals. Times are in `times.py`."""

import ast
import json
import math
import warnings
from collections.abc import Callable

from speeder.prepare.readers.lines import BadLine

MAX_ID_LENGTH = 256
_MAX_LITERAL_LENGTH = 1 << 20  # parsing a Python literal takes some hundred times its length in memory


def identifier(value: object, kind: str) -> str:
    """A user's or an item's id as text: a short string of printable characters, or a whole number.

    `kind` is `"user"` or `"item"`. Raises `BadLine`.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        # beyond 64 bits it is no id, and Python may refuse to write it out
        value = str(value) if value.bit_length() <= 64 else None
    if value is None or value == "":
        raise BadLine(f"no {kind} id")
    if not isinstance(value, str):
        raise BadLine(f"{kind} id is not a string")
    value = value.strip()
    # isprintable also refuses line ends, NUL and lone surrogates, which no file format could hold
    if not value or len(value) > MAX_ID_LENGTH or not value.isprintable():
        raise BadLine(f"{kind} id is not short, printable text")
    return value


def rating(value: object) -> float:
    """A finite number, also as text. Raises `BadLine`."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):  # OverflowError: an integer of 400 digits
            number = math.nan
        if math.isfinite(number):
            return number
    raise BadLine("rating is not a number")


def json_object(line: str) -> dict:
    """A JSON object. Raises `BadLine`."""
    return _object(json.loads, line, "JSON", "expected one JSON object a line")


def literal_object(line: str) -> dict:
    """A Python dict literal, which is parsed and never evaluated. Raises `BadLine`."""
    if len(line) > _MAX_LITERAL_LENGTH:
        raise BadLine(f"Python literal longer than {_MAX_LITERAL_LENGTH >> 20} MiB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # titles hold backslashes that are no escape sequence
        return _object(ast.literal_eval, line, "a Python literal")


def _object(parse: Callable[[str], object], line: str, form: str, remedy: str = "") -> dict:
    try:
        value = parse(line)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        # the parsers report too deep nesting as RecursionError or MemoryError
        raise BadLine(f"not {form}", remedy) from None
    if not isinstance(value, dict):
        raise BadLine("not an object with named fields")
    return value
