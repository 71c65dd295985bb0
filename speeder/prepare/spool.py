"""Interactions between raw lines and arrays: columns of integers on disk, with ids beside them.

A table of all ids in memory would take gigabytes for tens of millions of users, most of whom a k-core filter drops. So
while lines are read, an id is represented by its 64-bit hash, and (hash, id) is written to disk. Ids are read back only
for the kept hashes. Two ids with one hash (probability 1 in 100,000 for 20 million ids) are noticed then, and refused.
"""

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from speeder.errors import SpeederError

_ROWS = 1 << 18  # rows held in memory before they go to disk
_NAMES = pa.schema([("hash", pa.int64()), ("id", pa.string())])


class Spool:
    """Columns user, item and time of rows that are added one by one, in a folder of its own."""

    def __init__(self, folder: Path):
        """`folder` is empty and exists."""
        self.users, self.items = IdColumn(folder / "users"), IdColumn(folder / "items")
        self._times = _Integers(folder / "times")

    def add(self, user: str, item: str, time: int) -> None:
        """Adds a row; `time` fits 64 bits."""
        self.users.add(user)
        self.items.add(item)
        self._times.add(time)

    def close(self) -> None:
        """Ends the writing."""
        self.users.close()
        self.items.close()
        self._times.close()

    def times(self) -> np.ndarray:
        """`(N,)` int64, on disk."""
        return self._times.mapped()

    def times_of(self, keep: np.ndarray) -> np.ndarray:
        """`(n,)` int64 of the rows where `keep`, `(N,)` bool, is True."""
        times, start, end = np.empty(int(np.count_nonzero(keep)), dtype=np.int64), 0, 0
        for part in self._times.chunks():
            kept = part[keep[start : start + len(part)]]
            times[end : end + len(kept)] = kept
            start, end = start + len(part), end + len(kept)
        return times


class IdColumn:
    """A column of string ids."""

    def __init__(self, path: Path):
        self._hashes = _Integers(path.with_suffix(".hashes"))
        self._file = pa.OSFile(str(path.with_suffix(".names")), "wb")
        self._names = pa.ipc.new_stream(self._file, _NAMES)
        self._path, self._new = path, {}

    def add(self, name: str) -> None:
        """Adds a row."""
        code = hash(name)
        self._new[name] = code
        self._hashes.add(code)
        if len(self._new) >= _ROWS:
            self._write_names()

    def close(self) -> None:
        """Ends the writing."""
        self._hashes.close()
        self._write_names()
        self._names.close()
        self._file.close()

    def _write_names(self) -> None:
        columns = [pa.array(self._new.values(), pa.int64()), pa.array(self._new, pa.string())]
        self._names.write_batch(pa.record_batch(columns, schema=_NAMES))
        self._new = {}

    def codes(self) -> tuple[np.ndarray, np.ndarray]:
        """`(N,)` int32 codes of the rows' ids, and the hash that each code stands for, `(n,)` int64, ascending."""
        distinct = self._hashes.values()
        count = len(distinct)
        distinct.sort()
        distinct = distinct[np.append(True, distinct[1:] != distinct[:-1])[:count]]
        codes = np.empty(count, dtype=np.int32)
        start = 0
        for hashes in self._hashes.chunks():
            few, places = np.unique(
                hashes, return_inverse=True
            )  # a search for ascending values is a quick one
            codes[start : start + len(hashes)] = np.searchsorted(distinct, few)[places]
            start += len(hashes)
        return codes, distinct

    def names(self, hashes: np.ndarray) -> list[str]:
        """The ids of `(n,)` hashes; raises `SpeederError` if two ids share one of them."""
        order = np.argsort(hashes)
        ascending = hashes[order]
        found: list[str | None] = [None] * len(hashes)
        for batch in self._batches() if found else ():
            codes = batch.column("hash").to_numpy()
            places = np.minimum(np.searchsorted(ascending, codes), len(ascending) - 1)
            rows = np.flatnonzero(ascending[places] == codes)
            for place, name in zip(
                order[places[rows]], batch.column("id").take(rows).to_pylist(), strict=True
            ):
                if found[place] is None:
                    found[place] = name
                elif found[place] != name:
                    raise SpeederError(
                        f"the ids {found[place]!r} and {name!r} have the same hash; run the command again, which uses"
                        " other hashes"
                    )
        return found

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with pa.OSFile(str(self._path.with_suffix(".names"))) as file, pa.ipc.open_stream(file) as stream:
            yield from stream


class _Integers:
    """A column of int64 in a file."""

    def __init__(self, path: Path):
        self._path, self._rows = path, array("q")
        self._file = open(path, "wb")  # noqa: SIM115 - `close` closes it

    def add(self, value: int) -> None:
        self._rows.append(value)
        if len(self._rows) >= _ROWS:
            self._write()

    def _write(self) -> None:
        self._rows.tofile(self._file)
        self._rows = array("q")

    def close(self) -> None:
        self._write()
        self._file.close()

    def values(self) -> np.ndarray:
        """`(N,)` int64."""
        return np.fromfile(self._path, dtype=np.int64)

    def chunks(self) -> Iterator[np.ndarray]:
        """The same, part by part."""
        with open(self._path, "rb") as file:
            while len(part := np.fromfile(file, dtype=np.int64, count=_ROWS)):
                yield part

    def mapped(self) -> np.ndarray:
        """The same, on disk."""
        if not self._path.stat().st_size:  # which cannot be mapped
            return np.zeros(0, dtype=np.int64)
        return np.memmap(self._path, dtype=np.int64, mode="r")
