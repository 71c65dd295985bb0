"""Plain tables: interactions with user, item and time per row, or a user's whole sequence per line; and items."""

from collections.abc import Container, Iterator, Sequence
from functools import partial
from pathlib import Path

from speeder.errors import SpeederError
from speeder.prepare.readers.lines import LineCount, read_lines
from speeder.prepare.readers.raw import Entry, RawData, Row
from speeder.prepare.readers.tables import rows_of
from speeder.prepare.readers.text import ItemText, clean, compose
from speeder.prepare.readers.times import TIME_UNITS

# accepted names of columns, in any case
USER = ("user", "user_id", "userid", "uid")
ITEM = ("item", "item_id", "itemid", "iid")
TIME = ("timestamp", "time", "ts")
RATING = ("rating", "score", "stars")
TITLE = ("title", "item_title", "name")
TEXT = ("text", "description")
IMAGE = ("image", "image_path")
_TABLES = (".csv", ".tsv", ".parquet", ".pq", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz")


def plain(
    path: Path, item_file: Path | None = None, time_unit: str = "s", columns: Sequence[str] = ()
) -> RawData:
    """Raw data in plain tables (CSV, TSV, Parquet, JSON lines).

    Args:
        path: the interactions, columns `user, item, timestamp` and optionally `rating`; or a folder with a table
            `interactions.*`, and optionally `items.*`.
        item_file: column `item`, and any of `title`, `text`, `image`.
        time_unit: unit of numeric times: `"s"`, `"ms"`, `"us"` or `"ns"`. Dates, in ISO 8601 or Parquet's types, need
        none.
        columns: further columns of the items that are kept, such as a category.

    Raises `SpeederError` if there is no such file.
    """
    if path.is_dir():
        item_file = item_file or find_table(path, "items")
        found = find_table(path, "interactions")
        if found is None:
            raise SpeederError(
                f"{path}: expected a table interactions.csv, .tsv, .parquet or .jsonl, found none"
            )
        path = found
    return RawData(
        name="plain",
        interaction_file=path,
        interactions=partial(_interactions, path),
        **item_table(item_file, columns),
        ticks_per_second=TIME_UNITS[time_unit],
    )


def sequences(path: Path, item_file: Path | None = None, columns: Sequence[str] = ()) -> RawData:
    """Raw data with one line per user, `user item item ...`, oldest first, a format of sequential-recommendation
    papers.

    Args:
        path: the file, or a folder with `sequences.txt`, and optionally a table `items.*`.
        item_file, columns: as in `plain`.
    """
    if path.is_dir():
        item_file = item_file or find_table(path, "items")
        path = path / "sequences.txt"
    return RawData(
        "sequences",
        path,
        partial(sequence_rows, path),
        **item_table(item_file, columns),
        has_times=False,
    )


def find_table(folder: Path, name: str) -> Path | None:
    """The table of a name in a folder; `SpeederError` if there are several."""
    found = [folder / f"{name}{suffix}" for suffix in _TABLES if (folder / f"{name}{suffix}").is_file()]
    if len(found) > 1:
        raise SpeederError(
            f"{folder}: expected only one of {', '.join(file.name for file in found)}, found all of them"
        )
    return found[0] if found else None


def item_table(path: Path | None, columns: Sequence[str] = ()) -> dict:
    """Arguments of `RawData` for a table of items; empty without one, which then can have no further columns."""
    if path is None and columns:
        raise SpeederError(
            f"columns: expected a table of items with {', '.join(columns)}, found no such file"
        )
    if path is None:
        return {}
    return {
        "item_file": path,
        "items": partial(item_rows, path, columns=columns),
        "columns": tuple(columns),
        "describe": describe,
        "images_by_name": True,
    }


def _interactions(path: Path, count: LineCount) -> Iterator[Row]:
    for number, fields in rows_of(path)(path, count, (USER, ITEM, TIME, RATING), 3):
        yield Row(number, *fields)


def sequence_rows(path: Path, count: LineCount) -> Iterator[Row]:
    """Interactions of lines `user item item ...`, each counted as read; times count up."""
    time = 0  # over the whole file, so that a user's second line comes after the first
    for number, line in read_lines(path, count):
        user, *items = line.split()
        if not items:
            count.drop(number, "user without items")
            continue
        count.read += len(items) - 1  # the line itself was counted
        for item in items:
            yield Row(number, user, item, time)
            time += 1


def item_rows(
    path: Path,
    count: LineCount,
    wanted: Container[str],
    columns: Sequence[str] = (),
    must_have_columns: bool = True,
) -> Iterator[Entry]:
    """Entries of a table of items; records are `[title, text, image, *columns]`."""
    further = tuple((name.lower(),) for name in columns)
    names = ((*ITEM, "id"), *further, TITLE, TEXT, IMAGE)
    required = 1 + len(further) if must_have_columns else 1
    for number, (item, *fields) in rows_of(path)(path, count, names, required):
        yield Entry(number, item, fields[len(further) :] + fields[: len(further)])


def describe(fields: list) -> ItemText:
    """Title, text (which starts with the title), picture and columns of an entry's `[title, text, image, *columns]`."""
    title, text, image = clean(fields[0]), clean(fields[1]), fields[2]
    whole = compose("" if title and text.startswith(title) else title, [], text)
    columns = tuple(clean(field) or None for field in fields[3:])
    return ItemText(title, whole, image if isinstance(image, str) and image else None, columns=columns)
