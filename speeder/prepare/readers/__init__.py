"""Readers of raw data sets, by the name that `speeder prepare` takes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from speeder.prepare.readers.amazon import AMAZON_2014, AMAZON_2018, AMAZON_2023, amazon
from speeder.prepare.readers.microlens import microlens
from speeder.prepare.readers.movielens import movielens
from speeder.prepare.readers.plain import plain, sequences
from speeder.prepare.readers.raw import RawData


@dataclass(frozen=True)
class Reader:
    """One raw format.

    Attributes:
        open: path, file of items or None -> raw data, still unread.
        core: its default k-core filter; 1 filters nothing.
    """

    open: Callable[[Path, Path | None], RawData]
    core: int = 1


READERS = {
    "amazon-2014": Reader(partial(amazon, AMAZON_2014), core=5),
    "amazon-2018": Reader(partial(amazon, AMAZON_2018), core=5),
    "amazon-2023": Reader(partial(amazon, AMAZON_2023), core=5),
    **{
        name: Reader(partial(movielens, name))
        for name in ("ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-latest")
    },
    "microlens": Reader(microlens),
    "plain": Reader(plain),
    "sequences": Reader(sequences),
}
