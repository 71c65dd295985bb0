"""Tables: separated text, Parquet, and JSON lines, row by row, in little memory."""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from speeder.errors import SpeederError
from speeder.prepare.readers.lines import BLANK, NOT_UTF8, SAVE_AS_UTF8, BadLine, LineCount, read_lines
from speeder.prepare.readers.times import arrow_times
from speeder.prepare.readers.values import json_object

_RECORD_LINES = 200  # lines and characters over which a row with quoted cells may run on
_RECORD_SIZE = 1 << 20
_PARQUET_ROWS = 1 << 16
_QUOTES = "quotes that do not match"
_MOST_NAMES = 1000  # of keys in JSON lines that are remembered: they may be data rather than names

Columns = Sequence[Sequence[str]]  # each column's possible names, in lower case


def split_rows(
    path: Path, count: LineCount, separator: str, width: int, *, encoding: str = "utf-8", quoted: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """Rows of a file without a header, `width` fields each; other lines are dropped and counted.

    `quoted` fields follow the rules of CSV, and each row is one line.
    """
    for number, line in read_lines(path, count, encoding=encoding):
        try:
            fields = _one_line(line, separator) if quoted and '"' in line else line.split(separator)
            if fields is None:
                raise BadLine(_QUOTES)
            _of_width(fields, width)
        except BadLine as error:
            count.drop(number, error)
            continue
        yield number, fields


def csv_rows(
    path: Path, count: LineCount, columns: Columns, required: int, *, separator: str | None = None
) -> Iterator[tuple[int, list[str | None]]]:
    """Rows of a CSV or TSV file with a header: the wanted columns' fields, None for a missing column.

    They are what Python's `csv.reader` gives: a quote inside a cell that does not start with one is a character like
    any other. A quoted cell may have line ends; its row is counted by its first line only. There the quotes must
    match strictly, else only the first line is dropped, so that a stray quote does not drop the rows after it. The
    first `required` columns must exist, else `SpeederError`.

    Args:
        columns: each column's possible names.
        separator: None: a tab if the header has one, else a comma.
    """
    lines = _Lines(read_lines(path, count, raw_lines=True), count)
    number, header = next(lines, (0, None))
    wrong = next((reason for reason in count.dropped if reason != BLANK), None)
    if wrong or header is None:
        remedy = f"; {SAVE_AS_UTF8}" if wrong == NOT_UTF8 else ""
        raise SpeederError(
            f"{path}: its first line is {wrong}, and a header line was expected{remedy}"
            if wrong
            else f"{path} is empty, and a header line was expected"
        )
    count.read -= 1
    separator = separator or ("\t" if "\t" in header else ",")
    try:
        names = _record(lines, number, header, separator, count)
    except BadLine as error:
        raise SpeederError(f"{path} line {number}: the header has {error}") from None
    if len(names) == 1 and ";" in names[0]:
        raise SpeederError(
            f"{path}: the separator seems to be ';': expected {separator!r}; save the table with "
            + {",": "commas", "\t": "tabs"}[separator]
        )
    picks = pick_columns(count, names, columns, required)
    for number, line in lines:
        try:
            cells = _of_width(_record(lines, number, line, separator, count), len(names))
        except BadLine as error:
            count.drop(number, error)
            continue
        yield number, [None if pick is None else cells[pick] for pick in picks]


class _Lines:
    """Numbered lines that can be put back; blank ones, which are no rows, are dropped and counted."""

    def __init__(self, source: Iterator[tuple[int, str]], count: LineCount):
        self.source, self.count, self.returned = source, count, []

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> tuple[int, str]:
        while True:
            number, line = self.any()
            if line and not line.isspace():
                return number, line
            self.count.drop(number, BLANK)

    def any(self) -> tuple[int, str]:
        """The next line, also a blank one; raises `StopIteration` at the end."""
        return self.returned.pop() if self.returned else next(self.source)


def _record(lines: _Lines, number: int, first: str, separator: str, count: LineCount) -> list[str]:
    """The cells of a row that starts with line `number`, `first`, and may continue on further lines.

    Raises `BadLine` if they make no row. The further lines are put back then.
    """
    if '"' not in first:
        return first.rstrip("\r\n").split(separator)
    cells = _one_line(first, separator)
    if cells is not None:
        return cells
    taken: list[tuple[int, str]] = []

    def record() -> Iterator[str]:
        yield first
        size = len(first)
        while len(taken) < _RECORD_LINES and size < _RECORD_SIZE:
            try:
                taken.append(lines.any())
            except StopIteration:
                return
            if taken[-1][0] != number + len(taken):  # a line between was dropped
                return
            size += len(taken[-1][1])
            yield taken[-1][1]

    try:
        cells = next(csv.reader(record(), delimiter=separator, strict=True))
    except csv.Error as error:
        lines.returned += reversed(taken)
        raise BadLine(_reason(error)) from None
    count.read -= len(taken)
    return cells


def _one_line(line: str, separator: str) -> list[str] | None:
    """The cells of one line; None if it ends within quotes. Raises `BadLine`."""
    reader = csv.reader([line, ""], delimiter=separator)  # it asks for the second only within quotes
    try:
        cells = next(reader)
    except csv.Error as error:
        raise BadLine(_reason(error)) from None
    return cells if reader.line_num == 1 else None


def _reason(error: csv.Error) -> str:
    if "limit" in str(error):
        return "cell longer than 128 KiB"
    return "carriage return within a row" if "new-line" in str(error) else _QUOTES


def _of_width(fields: list[str], width: int) -> list[str]:
    if len(fields) != width:
        raise BadLine("wrong number of fields", f"got {len(fields)}, expected {width}")
    return fields


def unquoted(text: str) -> str:
    """A single cell without the quotes around it; text with unmatched quotes is not changed."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1].replace('""', ""):
        return text[1:-1].replace('""', '"')
    return text


def pick_columns(count: LineCount, names: Sequence[str], columns: Columns, required: int) -> list[int | None]:
    """The index of each wanted column in a table, and in `count` the names of the others.

    Raises `SpeederError`, which names all required columns that are missing.
    """
    places = {name.strip().lower(): place for place, name in reversed(list(enumerate(names)))}
    picks = [next((places[name] for name in options if name in places), None) for options in columns]
    missing = [options for pick, options in zip(picks[:required], columns, strict=False) if pick is None]
    if missing:
        lacks = ", and no column ".join(" or ".join(map(repr, options)) for options in missing)
        raise SpeederError(
            f"{count.path} has no column {lacks}; it names {', '.join(names)[:200]}; rename "
            + ", and ".join(f"a column to {options[0]!r}" for options in missing)
        )
    unused = [name.strip() for place, name in enumerate(names) if place not in picks]
    count.unused = [
        name for name in unused if name and name.isprintable()
    ]  # no file may hold lone surrogates
    return picks


def parquet_rows(path: Path, count: LineCount, columns: Columns, required: int) -> Iterator[tuple[int, list]]:
    """Rows of a Parquet file, as from `csv_rows`; columns of dates become `Nanoseconds`."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            picks = pick_columns(count, names, columns, required)
            wanted = [names[pick] for pick in picks if pick is not None]
            number = 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=wanted):
                lists = {name: _values(batch.column(name)) for name in wanted}
                values = [[None] * len(batch) if pick is None else lists[names[pick]] for pick in picks]
                for row in zip(*values, strict=True):
                    number += 1
                    count.read += 1
                    yield number, list(row)
    except FileNotFoundError:
        raise SpeederError(f"{path} is missing") from None
    except (pa.ArrowException, OSError, KeyError, ValueError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SpeederError(f"{path} cannot be read as Parquet: {reason}") from error


def _values(column: pa.Array) -> list:
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        return arrow_times(column)
    return column.to_pylist()


def json_rows(path: Path, count: LineCount, columns: Columns, required: int) -> Iterator[tuple[int, list]]:
    """Rows of JSON lines, as from `csv_rows`; None for a missing key. A required key must be in some line."""
    known: dict[str, None] = {}  # in their order
    for number, line in read_lines(path, count):
        try:
            record = {key.lower(): value for key, value in json_object(line).items()}
            if not record.keys() <= known.keys() and len(known) < _MOST_NAMES:
                known |= dict.fromkeys(record)
        except BadLine as error:
            count.drop(number, error)
            continue
        yield (
            number,
            [next((record[name] for name in options if name in record), None) for options in columns],
        )
    if 0 < len(known) < _MOST_NAMES:
        pick_columns(count, list(known), columns, required)


def rows_of(path: Path) -> Callable[..., Iterator[tuple[int, list]]]:
    """The function above that reads a file, by its name."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".parquet", ".pq")):
        return parquet_rows
    if name.endswith((".jsonl", ".json", ".ndjson")):
        return json_rows
    if name.endswith((".csv", ".tsv", ".txt")):
        return csv_rows
    raise SpeederError(f"{path}: expected a table (.csv, .tsv, .parquet or .jsonl), got another kind of name")
