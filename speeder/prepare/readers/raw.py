"""The output of a reader of raw files: a stream of interactions, then a stream of items."""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from speeder.prepare.readers.lines import LineCount
from speeder.prepare.readers.text import ItemText

NO_INTERACTIONS = "item without interactions that are kept"  # the reason for most lines of an item file


class Row(NamedTuple):
    """One interaction as in the file, unchecked; `number` is its line number, from 1."""

    number: int
    user: object
    item: object
    time: object
    rating: object = None


class Entry(NamedTuple):
    """One line of an item file, unchecked; what `RawData.describe` makes an `ItemText` of."""

    number: int
    item: object
    record: object


@dataclass
class RawData:
    """Raw files of one data set, unread.

    Attributes:
        name: the data set's name, for the manifest.
        interaction_file, item_file: the files; without an item file, items have only an id.
        interactions: streams the interactions; counts every line that it reads or drops.
        items: streams the items' lines in the same way; it may leave out, and count, lines of items that are not
        wanted.
        describe: an entry's record -> title, text and picture. Accepts any record of `items`.
        ticks_per_second: of the interactions' times, if they are plain numbers.
        images: the data's own folder of pictures.
        images_by_name: whether `describe` names pictures (else they are found by item id).
        columns: the names of further columns of items that `describe` gives.
        has_times: whether the interactions have times, and not only an order.
    """

    name: str
    interaction_file: Path
    interactions: Callable[[LineCount], Iterator[Row]]
    item_file: Path | None = None
    items: Callable[[LineCount, Container[str]], Iterator[Entry]] | None = None
    describe: Callable[[object], ItemText] | None = None
    ticks_per_second: int = 1
    images: Path | None = None
    images_by_name: bool = False
    columns: tuple[str, ...] = ()
    has_times: bool = True
