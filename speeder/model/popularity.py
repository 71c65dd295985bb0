"""How often each item occurs in training: what is recommended to a user without a history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from speeder.data.catalogue import ItemCatalogue
from speeder.data.item_indices import item_array
from speeder.errors import SpeederError

FILE = "popularity.parquet"


class ItemCounts:
    """Occurrences by item id, so that they fit a catalogue that has grown or has another order."""

    def __init__(self, counts: Mapping[str, int]):
        self._counts = dict(counts)
        self._ordered: tuple[ItemCatalogue, np.ndarray] | None = None

    @property
    def counts(self) -> Mapping[str, int]:
        """Id -> occurrences, above 0; to be read only."""
        return MappingProxyType(self._counts)

    @classmethod
    def of_sequences(cls, sequences: Sequence[Sequence[int]], catalogue: ItemCatalogue) -> ItemCounts:
        """Count the items of sequences, such as `data.split.training()`; raises `IndexError` for an item out of
        range."""
        flat = np.concatenate([item_array("sequences", sequence) for sequence in sequences] or [[]])
        flat = flat.astype(np.int64)
        if len(flat) and not 0 <= flat.min() <= flat.max() < len(catalogue):
            raise IndexError(
                f"sequences: expected items in 0..{len(catalogue) - 1}, got {flat.min()}..{flat.max()}"
            )
        found = np.bincount(flat, minlength=len(catalogue))
        return cls({catalogue.ids[row]: int(found[row]) for row in np.flatnonzero(found)})

    def in_catalogue(self, catalogue: ItemCatalogue) -> np.ndarray:
        """`(I,)` int64 occurrences of a catalogue's items; 0 for those that are not known."""
        return np.array([self.counts.get(name, 0) for name in catalogue.ids], dtype=np.int64)

    def ordered(self, catalogue: ItemCatalogue) -> tuple[np.ndarray, np.ndarray]:
        """A catalogue's items, the most frequent first, and their occurrences; ties in the catalogue's order."""
        if self._ordered is None or self._ordered[0] is not catalogue:
            counts = self.in_catalogue(catalogue)
            order = np.argsort(-counts, kind="stable")
            self._ordered = (catalogue, np.stack([order, counts[order]]))
        return tuple(self._ordered[1].copy())

    def save(self, folder: Path) -> None:
        """Write `popularity.parquet` into a folder: columns `id` and `count`."""
        import pyarrow as pa  # slow to import
        import pyarrow.parquet as pq

        names, counts = list(self.counts), list(self.counts.values())
        table = pa.table({"id": pa.array(names, pa.string()), "count": pa.array(counts, pa.int64())})
        pq.write_table(table, folder / FILE)

    @classmethod
    def load(cls, file: Path) -> ItemCounts:
        """Read what `save` wrote; raises `SpeederError` if the file holds something else."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(file) as parquet:
                columns = parquet.read().to_pydict()
            counts = dict(zip(columns["id"], columns["count"], strict=True))
            if not all(isinstance(name, str) and type(count) is int for name, count in counts.items()):
                raise ValueError("expected ids and whole numbers")
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise SpeederError(f"{file} does not hold readable counts: {error}") from error
        return cls(counts)
