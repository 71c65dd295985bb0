"""Interactions (user, item, time) in order, and their leave-one-out split."""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from speeder.errors import SpeederError
from speeder.io.files import atomic_path

SPLITS = ("validation", "test")
SPLIT_RULE = (
    "leave one out: a user's last item is the test target, the second last the validation target;"
    " users with fewer than 3 interactions only train"
)
_MINIMUM = 3


class Interactions:
    """`N` interactions, sorted by user, then time; equal times keep their given order.

    Attributes:
        user: `(N,)` int64, index into `user_ids`.
        item: `(N,)` int64, item index.
        time: `(N,)` int64, seconds.
        user_ids: external ids, unique.
    """

    def __init__(self, user: np.ndarray, item: np.ndarray, time: np.ndarray, user_ids: Sequence[str]):
        """Sorts copies of the columns. Raises `TypeError` or `ValueError`, naming the argument that does not fit."""
        columns = {"user": np.asarray(user), "item": np.asarray(item), "time": np.asarray(time)}
        for name, column in columns.items():
            if column.size and column.dtype.kind not in "iu":
                raise TypeError(f"{name} must hold integers, but holds {column.dtype}")
            if column.ndim != 1 or len(column) != len(columns["user"]):
                raise ValueError(f"{name} must be ({len(columns['user'])},), but has shape {column.shape}")
        self.user_ids = list(user_ids)
        if len(set(self.user_ids)) != len(self.user_ids) or not all(
            isinstance(name, str) for name in self.user_ids
        ):
            raise ValueError("user_ids must be unique strings")
        user, item, time = (column.astype(np.int64) for column in columns.values())
        if len(user) and not (user.min() >= 0 and user.max() < len(self.user_ids)):
            raise ValueError(
                f"user must lie in 0..{len(self.user_ids) - 1}, but spans {user.min()}..{user.max()}"
            )
        if len(item) and item.min() < 0:
            raise ValueError(f"item must not be negative, but holds {item.min()}")
        if not _is_sorted(user, time):  # saves a copy of tens of millions of sorted interactions
            order = np.lexsort((time, user))  # lexsort is stable
            user, item, time = user[order], item[order], time[order]
        self.user, self.item, self.time = user, item, time

    def __len__(self) -> int:
        return len(self.user)

    def __repr__(self) -> str:
        return f"Interactions({len(self)} interactions of {len(self.user_ids)} users)"

    def sequences(self) -> list[np.ndarray]:
        """Item indices of each user, oldest first; entry `u` is user `u`'s, empty without interactions."""
        return np.split(self.item, self._bounds()[1:-1]) if self.user_ids else []

    def _bounds(self) -> np.ndarray:
        return np.searchsorted(self.user, np.arange(len(self.user_ids) + 1))

    def save(self, file: str | Path) -> None:
        """Writes one Parquet row per user (`user_id`, `items`, `times`), atomically."""
        import pyarrow as pa  # slow to import, and not needed by a model
        import pyarrow.parquet as pq

        offsets = pa.array(self._bounds(), pa.int64())
        table = pa.table(
            {
                "user_id": pa.array(self.user_ids, pa.string()),
                "items": pa.LargeListArray.from_arrays(offsets, pa.array(self.item)),
                "times": pa.LargeListArray.from_arrays(offsets, pa.array(self.time)),
            }
        )
        with atomic_path(file) as temporary:
            pq.write_table(table, temporary)

    @classmethod
    def load(cls, file: str | Path) -> "Interactions":
        """Reads what `save` wrote; raises `SpeederError` if the file is missing or is something else."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(file) as parquet:  # read_table would import pandas; see ItemCatalogue.load
                table = parquet.read().combine_chunks()
            items, times = table["items"].combine_chunks(), table["times"].combine_chunks()
            lengths = items.value_lengths().to_numpy(zero_copy_only=False)
            user = np.repeat(np.arange(len(table)), lengths)
            item, time = (column.flatten().to_numpy(zero_copy_only=False) for column in (items, times))
            return cls(user, item, time, table["user_id"].to_pylist())
        except FileNotFoundError:
            raise SpeederError(f"{file} is missing") from None
        except (pa.ArrowException, OSError, KeyError, AttributeError, TypeError, ValueError) as error:
            raise SpeederError(f"{file} does not hold readable interactions: {error}") from error


def _is_sorted(user: np.ndarray, time: np.ndarray) -> bool:
    earlier = (user[1:] < user[:-1]) | ((user[1:] == user[:-1]) & (time[1:] < time[:-1]))
    return not earlier.any()


class LeaveOneOut:
    """Splits each user with at least 3 interactions: last = test target, second last = validation target."""

    def __init__(self, interactions: Interactions):
        self._sequences = interactions.sequences()
        self._users = np.array(
            [u for u, items in enumerate(self._sequences) if len(items) >= _MINIMUM], dtype=np.int64
        )

    def training(self) -> list[np.ndarray]:
        """Training part of every user, by index; all interactions of users with fewer than 3."""
        return [items[:-2] if len(items) >= _MINIMUM else items for items in self._sequences]

    def users(self, split: str) -> np.ndarray:
        """`(n,)` int64 user indices, in the order of `histories` and `targets`."""
        _held_out(split)
        return self._users.copy()

    def histories(self, split: str) -> list[np.ndarray]:
        """Items before each target: the training part, and for `"test"` the validation item too."""
        held_out = _held_out(split)
        return [self._sequences[user][:-held_out] for user in self._users]

    def targets(self, split: str) -> np.ndarray:
        """`(n,)` int64 item indices, one per user of `users(split)`."""
        held_out = _held_out(split)
        return np.array([self._sequences[user][-held_out] for user in self._users], dtype=np.int64)

    def part(self, index: int, count: int) -> "LeaveOneOut":
        """The same training part, and every `count`-th user to evaluate, from `index` on."""
        part = copy.copy(self)
        part._users = self._users[index::count]
        return part

    def hash(self) -> str:
        """SHA-256 over users, histories and targets of both splits: equal hashes mean the same task."""
        digest = hashlib.sha256()
        for split in SPLITS:
            histories = self.histories(split)
            lengths = np.array([len(history) for history in histories], dtype=np.int64)
            for part in (self.users(split), lengths, *histories, self.targets(split)):
                digest.update(part.astype("<i8").tobytes())
        return digest.hexdigest()


def _held_out(split: str) -> int:
    """Number of items at the end that are not in the split's histories."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, but got {split!r}")
    return 2 if split == "validation" else 1
