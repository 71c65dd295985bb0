"""Amazon Reviews of 2014, 2018 and 2023: reviews or ratings, and the `meta` lines of their items."""

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from speeder.errors import SpeederError
from speeder.prepare.readers.lines import BadLine, LineCount, read_lines
from speeder.prepare.readers.raw import NO_INTERACTIONS, Entry, RawData, Row
from speeder.prepare.readers.tables import csv_rows, split_rows
from speeder.prepare.readers.text import ItemText, clean, compose, parts
from speeder.prepare.readers.values import json_object, literal_object

_FIRST_KEY = re.compile(r"\{'asin': '(\w+)'")
_REVIEWS = (".json", ".jsonl", ".csv")


@dataclass(frozen=True)
class Edition:
    """The differences between the editions.

    Attributes:
        user, item, rating, time: a review's keys; `item` is also a `meta` line's.
        ticks_per_second: of its times.
        ratings: the columns of its ratings file, which has no header; None if it has one with the keys above.
        literals: whether lines may be Python literals instead of JSON.
        brand, categories, features: a `meta` line's keys for them.
    """

    name: str
    user: str = "reviewerID"
    item: str = "asin"
    rating: str = "overall"
    time: str = "unixReviewTime"
    ticks_per_second: int = 1
    ratings: tuple[str, ...] | None = None
    literals: bool = False
    brand: str = "brand"
    categories: str = "categories"
    features: str = "feature"


AMAZON_2014 = Edition(
    "amazon-2014", ratings=("reviewerID", "asin", "overall", "unixReviewTime"), literals=True
)
AMAZON_2018 = Edition(
    "amazon-2018", ratings=("asin", "reviewerID", "overall", "unixReviewTime"), categories="category"
)
AMAZON_2023 = Edition(
    "amazon-2023",
    user="user_id",
    item="parent_asin",  # colours and sizes of one product share it
    rating="rating",
    time="timestamp",
    ticks_per_second=1000,
    brand="store",
    features="features",
)


def amazon(edition: Edition, path: Path, item_file: Path | None = None) -> RawData:
    """Raw data of one edition.

    Args:
        path: the reviews (`.json[l]`, also gzipped) or ratings (`.csv`); or a folder with one such file, and one whose
            name starts with `meta`.
        item_file: the `meta` file, if `path` is a file.

    Raises `SpeederError` if a folder does not have exactly one of each.
    """
    if path.is_dir():
        path, found = _files_in(path)
        item_file = item_file or found
    return RawData(
        name=edition.name,
        interaction_file=path,
        interactions=partial(_interactions, edition, path),
        item_file=item_file,
        items=partial(_items, edition, item_file) if item_file else None,
        describe=partial(_describe, edition),
        ticks_per_second=edition.ticks_per_second,
    )


def _files_in(folder: Path) -> tuple[Path, Path]:
    files = [
        entry
        for entry in sorted(folder.iterdir())
        if entry.is_file() and entry.name.lower().removesuffix(".gz").endswith(_REVIEWS)
    ]
    metas = [entry for entry in files if entry.name.lower().startswith("meta")]
    reviews = [entry for entry in files if entry not in metas]
    for kind, found in (("reviews or ratings", reviews), ("items (meta*)", metas)):
        if len(found) != 1:
            names = ", ".join(entry.name for entry in found) or "none"
            raise SpeederError(f"{folder}: expected one file of {kind}, found {names}; name it in its place")
    return reviews[0], metas[0]


def _interactions(edition: Edition, path: Path, count: LineCount) -> Iterator[Row]:
    keys = (edition.user, edition.item, edition.time, edition.rating)
    if path.name.lower().removesuffix(".gz").endswith(".csv"):
        if edition.ratings is None:
            for number, fields in csv_rows(path, count, [[key] for key in keys], 3):
                yield Row(number, *fields)
        else:
            places = [edition.ratings.index(key) for key in keys]
            for number, fields in split_rows(path, count, ",", len(edition.ratings), quoted=True):
                yield Row(number, *(fields[place] for place in places))
        return
    for number, line in read_lines(path, count):
        try:
            record = _record(edition, line)
        except BadLine as error:
            count.drop(number, error)
            continue
        yield Row(number, *(record.get(key) for key in keys))


def _record(edition: Edition, line: str) -> dict:
    """2014's files were written as Python literals, and some of them later as JSON."""
    if edition.literals and not line.startswith('{"'):
        return literal_object(line)
    try:
        return json_object(line)
    except BadLine:
        if edition.literals:  # a literal whose first key holds an apostrophe starts like JSON
            return literal_object(line)
        raise


def _items(edition: Edition, path: Path, count: LineCount, wanted: Container[str]) -> Iterator[Entry]:
    for number, line in read_lines(path, count):
        if edition.literals:
            # a literal takes some 100 us to parse, and most items of the file are not wanted
            first = _FIRST_KEY.match(line)
            if first and first[1] not in wanted:
                count.leave_out(NO_INTERACTIONS)
                continue
        try:
            record = _record(edition, line)
        except BadLine as error:
            count.drop(number, error)
            continue
        yield Entry(number, record.get(edition.item), record)


def _describe(edition: Edition, record: dict) -> ItemText:
    title = clean(record.get("title"))
    script = "getTime" in title  # some of 2018's titles are a piece of the page's script
    title = "" if script else title
    categories = parts(record.get(edition.categories))
    facts = [("Brand", parts(record.get(edition.brand))), ("Categories", categories)]
    passages = [" ".join(parts(record.get(key))) for key in (edition.features, "description")]
    return ItemText(title, compose(title, facts, *passages), blanked=script)
