"""MicroLens: `*_pairs.csv` (user, item, milliseconds) or `*_pairs.tsv` (one user's items per line), titles, covers."""

import logging
from collections.abc import Container, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from speeder.errors import SpeederError
from speeder.prepare.readers.lines import LineCount, read_lines
from speeder.prepare.readers.plain import (
    IMAGE,
    ITEM,
    TEXT,
    TIME,
    TITLE,
    USER,
    item_rows,
    item_table,
    sequence_rows,
)
from speeder.prepare.readers.raw import Entry, RawData, Row
from speeder.prepare.readers.tables import csv_rows, unquoted

log = logging.getLogger(__name__)

_COVERS = "*covers"
_TITLES = "*_title*.csv"


def microlens(path: Path, item_file: Path | None = None) -> RawData:
    """Raw data of any MicroLens release.

    Args:
        path: `*_pairs.csv` or `*_pairs.tsv`, or the folder of one of them (of both, the one with times is read), with
            `*_title*.csv`, which may lack a header (of several, the English one, `*_en.csv`, is read). A folder
            `covers` or `*_covers` beside it has pictures named by item.
        item_file: the titles, if they are elsewhere.

    Raises `SpeederError` if a file is missing, or there are several.
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
        **item_table(item_file or _titles_in(folder)),
        ticks_per_second=1 if by_line else 1000,
        images=covers[0] if covers else None,
        has_times=not by_line,
    )
    if raw.item_file:
        raw = replace(raw, items=partial(_items, raw.item_file))
    return replace(raw, images_by_name=False)


def _only(folder: Path, pattern: str) -> Path | None:
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise SpeederError(f"{folder}: expected one file {pattern}, found {names}; name it in its place")
    return found[0] if found else None


def _titles_in(folder: Path) -> Path | None:
    found = sorted(folder.glob(_TITLES))
    english = [file for file in found if file.stem.lower().endswith("_en")]
    if len(found) > 1 and len(english) == 1:
        log.warning("%s: of %s, %s is read", folder, ", ".join(file.name for file in found), english[0].name)
        return english[0]
    if not found:
        log.warning("%s: found no titles (%s), so items have no text", folder, _TITLES)
    return _only(folder, _TITLES)


def _pairs(path: Path, count: LineCount) -> Iterator[Row]:
    for number, fields in csv_rows(path, count, (USER, (*ITEM, "videoid"), TIME), 3):
        yield Row(number, *fields)


def _items(path: Path, count: LineCount, wanted: Container[str]) -> Iterator[Entry]:
    if not path.name.lower().removesuffix(".gz").endswith(".csv") or _has_header(path):
        yield from item_rows(path, count, wanted)
        return
    for number, line in read_lines(path, count):
        item, comma, title = line.partition(",")
        if comma:
            yield Entry(number, unquoted(item), [unquoted(title), None, None])
        else:
            count.drop(number, "wrong number of fields")


def _has_header(path: Path) -> bool:
    _, line = next(read_lines(path, LineCount(path)), (0, ""))
    names = {name.strip().strip('"').lower() for name in line.replace("\t", ",").split(",")}
    return not names.isdisjoint((*ITEM, "id")) and not names.isdisjoint((*TITLE, *TEXT, *IMAGE))
