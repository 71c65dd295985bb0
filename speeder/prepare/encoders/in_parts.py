"""Encoding in parts: a runner's workers compute the same batches as one process, and fill its cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Protocol

import pyarrow as pa
from torch import Tensor

from speeder.errors import SpeederError
from speeder.io.parts import Runner, Work, computed
from speeder.prepare.encoders.cache import (
    FeatureCache,
    check_finite,
    missing_batches,
    shard_rows,
    write_shard,
)


class Encodes(Protocol):
    """A `TextEncoder` or an `ImageEncoder`, which another process can make again by its name."""

    name: str
    identity: str
    batch_size: int

    def compute(self, contents: list[str]) -> list[Tensor | None]:
        """Texts, or paths of pictures -> one row each; None if there is nothing to encode."""


def encode_in_parts(
    encoder: Encodes,
    cache: FeatureCache,
    contents: Sequence[str | None],
    keys: Sequence[str | None],
    costs: Sequence[int],
    runner: Runner,
    description: str,
) -> None:
    """Add to the cache what it lacks, in the batches of `encode_cached`, one cache file per part.

    What cannot be encoded is left out, as in `encode_cached`.

    Args:
        contents: texts, or paths of pictures; every worker must see these and the cache under the same paths.
        keys, costs: as in `encode_cached`.
        runner: such as an `OnRay`.

    Raises:
        SpeederError: see `computed`; a worker has another model; or workers' files are not in the cache.
    """
    batches = missing_batches(cache, keys, costs, encoder.batch_size)
    if not batches:
        return
    known = hashlib.sha256("".join(sorted({key for key in keys if key is not None})).encode())
    # Not only what the cache lacks: that changes while parts are computed.
    identity = {"encode": encoder.identity, "batch_size": encoder.batch_size, "contents": known.hexdigest()}
    folder = cache.folder.resolve()
    make = partial(_encoding, partial(type(encoder), _name(encoder), batch_size=encoder.batch_size))
    make = partial(make, encoder.identity, folder)
    tables = _tables(batches, contents, keys, shard_rows(encoder.batch_size) // encoder.batch_size)
    written: set[str] = set()
    with computed(folder / "parts", identity, tables, make, runner, description) as outputs:
        for table in outputs:
            written.update(table.filter(table["encoded"])["key"].to_pylist())
    cache.read()
    lost = sum(key not in cache for key in written)
    if lost:
        raise SpeederError(
            f"{folder}: lacks {lost} of {len(written)} rows that workers wrote: every machine must see the cache "
            "under this path (SPEEDER_CACHE), and it must not be cleared meanwhile"
        )


def _name(encoder: Encodes) -> str:
    """The encoder's name for other processes: folders as absolute paths."""
    kind, colon, folder = encoder.name.rpartition(":")  # such as backbone:FOLDER
    return f"{kind}{colon}{Path(folder).resolve()}" if Path(folder).is_dir() else encoder.name


def _tables(
    batches: Sequence[Sequence[int]], contents: Sequence[str | None], keys: Sequence[str | None], size: int
) -> Iterator[pa.Table]:
    """Parts of `count` batches: `batch` (its number), `key` and `content` of each row."""
    for start in range(0, len(batches), size):
        rows = [
            (number, place) for number, batch in enumerate(batches[start : start + size]) for place in batch
        ]
        yield pa.table(
            {
                "batch": [number for number, _ in rows],
                "key": [keys[place] for _, place in rows],
                "content": pa.array([contents[place] for _, place in rows], pa.string()),
            }
        )


def _encoding(make: Callable[[], Encodes], identity: str, folder: Path) -> Work:
    encoder = make()
    if encoder.identity != identity:
        raise SpeederError(f"{encoder.name!r}: this worker has another model than the driver")

    def encode(table: pa.Table) -> pa.Table:
        done: dict[str, Tensor] = {}
        for _, batch in groupby(table.to_pylist(), key=lambda row: row["batch"]):
            batch = list(batch)
            rows = encoder.compute([row["content"] for row in batch])
            pairs = zip(batch, rows, strict=True)
            done.update({entry["key"]: row.float().cpu() for entry, row in pairs if row is not None})
        check_finite(done, {key: place for place, key in enumerate(table["key"].to_pylist())})
        if done:
            write_shard(folder, done)
        keys = table["key"]
        return pa.table({"key": keys, "encoded": [key in done for key in keys.to_pylist()]})

    return encode
