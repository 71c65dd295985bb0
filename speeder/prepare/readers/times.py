"""Times of raw rows, in nanoseconds (which fit 64 bits until 2262), so that rows are ordered before times are cut."""

import math
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import chain, islice

import pyarrow as pa

from speeder.prepare.readers.lines import BadLine
from speeder.prepare.readers.raw import Row

TIME_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}  # ticks a second
PER_SECOND = TIME_UNITS["ns"]
_UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_RECENT_SECOND = 631_152_000  # the year 1990: a time after it in another unit is most likely in that unit
_MAX_SHOWN = 60  # characters of a broken value in a message
_LAST_SECOND = 4_102_444_800  # the year 2100: a later time is in another unit, or nonsense
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ROWS_TOLD_BY = 100  # rows that decide whether a file's times are dates or numbers


class Nanoseconds(int):
    """A time since 1970 in nanoseconds, independent of the unit of a file's plain numbers."""


def nanoseconds(value: object, per_second: int, *, dates: bool = False) -> int:
    """Nanoseconds since 1970 of a finite number, digits, an ISO 8601 date (without a zone, in UTC), or `Nanoseconds`.

    Args:
        per_second: ticks per second of plain numbers.
        dates: whether eight digits are a date (`20200131`) and not a number.

    Raises `BadLine`, also for times before 1970 and after 2100.
    """
    given = value
    if dates and _is_eight_digits(value):
        value = _parsed(str(value).strip(), _date)
        if value is None:
            raise BadLine("timestamp is not a date", f"got {_shown(given)}; expected such as 20240314")
    elif isinstance(value, str):
        value = _parsed(value.strip(), int, float, _date)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or (isinstance(value, float) and not math.isfinite(value)):
        raise BadLine("timestamp is not a number", f"got {_shown(given)}; {_expected(per_second)}")
    if isinstance(value, Nanoseconds):
        per_second = PER_SECOND
    if not 0 <= value <= _LAST_SECOND * per_second:
        unit = _likely_unit(value)
        remedy = f"; looks like {_UNIT_NAMES[unit]}: add --time-unit {unit} (plain data)" if unit else ""
        raise BadLine("timestamp is before 1970 or after 2100", f"got {_shown(given)}{remedy}")
    whole, scale = int(value), PER_SECOND // per_second
    return whole * scale + int((value - whole) * scale)  # apart: a float does not hold the digits of both


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _expected(per_second: int) -> str:
    unit = next(_UNIT_NAMES[name] for name, ticks in TIME_UNITS.items() if ticks == per_second)
    return f"expected ISO 8601 such as 2024-03-14T09:10, or {unit} since 1970"


def _likely_unit(value: float) -> str | None:
    """The unit in which a number is a time of our days."""
    for name, ticks in TIME_UNITS.items():
        if _RECENT_SECOND * ticks <= value <= _LAST_SECOND * ticks:
            return name
    return None


def hold_dates(rows: Iterable[Row]) -> tuple[bool, Iterator[Row]]:
    """Whether most times of the first rows are dates rather than numbers; and all rows.

    Times of eight digits, which may be either, do not count.
    """
    rows = iter(rows)
    first = list(islice(rows, _ROWS_TOLD_BY))
    times = [row.time for row in first if not _is_eight_digits(row.time)]
    dates = [
        time
        for time in times
        if isinstance(time, str) and isinstance(_parsed(time.strip(), int, float, _date), Nanoseconds)
    ]
    return 2 * len(dates) > len(times), chain(first, rows)


def arrow_times(column: pa.Array) -> list[Nanoseconds | None]:
    """The times of a column of dates or timestamps of any unit; times beyond 64 bits do not wrap around."""
    if pa.types.is_date32(column.type):
        values, scale = column.cast(pa.int32()), 86_400 * PER_SECOND
    else:
        unit = "ms" if pa.types.is_date64(column.type) else column.type.unit
        values, scale = column.cast(pa.int64()), PER_SECOND // TIME_UNITS[unit]
    return [None if value is None else Nanoseconds(value * scale) for value in values.to_pylist()]


def _is_eight_digits(value: object) -> bool:
    if isinstance(value, str):
        value = value.strip()
        return len(value) == 8 and value.isdecimal()
    return isinstance(value, int) and 10_000_000 <= value < 100_000_000


def _parsed(text: str, *parsers: Callable[[str], int | float]) -> int | float | None:
    """The result of the first parser that accepts the text."""
    for parse in parsers:
        try:
            return parse(text)
        except (ValueError, OverflowError):
            pass
    return None


def _date(text: str) -> Nanoseconds:
    date = datetime.fromisoformat(text)
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return Nanoseconds((date - _EPOCH) // timedelta(microseconds=1) * 1000)
