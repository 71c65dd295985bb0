"""MicroLens: `*_pairs.csv` (user, item, milliseconds) or `*_pairs.tsv` (a user's items a line), titles, covers."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from speeder.data.readers.lines import LineCount
from speeder.data.readers.plain import ITEM, TIME, USER, item_table, sequence_rows
from speeder.data.readers.raw import RawData, Row
from speeder.data.readers.tables import csv_rows
from speeder.errors import SpeederError

_COVERS = "*covers"


def microlens(path: Path, item_file: Path | None = None) -> RawData:
    """Raw data of any MicroLens release.

    Args:
        path: `*_pairs.csv` or `*_pairs.tsv`, or the folder of one of them (of both, the one with times is read),
            with `*_titles.csv`. A folder `covers` or `*_covers` beside it holds pictures named by item.
        item_file: the titles, where they are elsewhere.

    Raises `SpeederError` where a file is not there, or there are several.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        path = _only(folder, "*_pairs.csv") or _only(folder, "*_pairs.tsv")
        if path is None:
            raise SpeederError(f"{folder}: expected *_pairs.csv or *_pairs.tsv of MicroLens, found neither")
    covers = [entry for entry in sorted(folder.glob(_COVERS)) if entry.is_dir()]
    by_line = path.name.lower().removesuffix(".gz").endswith(".tsv")
    raw = RawData(
        "microlens",
        path,
        partial(sequence_rows if by_line else _pairs, path),
        **item_table(item_file or _only(folder, "*_titles.csv")),
        ticks_per_second=1 if by_line else 1000,
        images=covers[0] if covers else None,
    )
    return replace(raw, images_by_name=False)


def _only(folder: Path, pattern: str) -> Path | None:
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise SpeederError(f"{folder}: expected one file {pattern}, found {names}; name it in its place")
    return found[0] if found else None


def _pairs(path: Path, count: LineCount) -> Iterator[Row]:
    for number, fields in csv_rows(path, count, (USER, (*ITEM, "videoid"), TIME), 3):
        yield Row(number, *fields)
