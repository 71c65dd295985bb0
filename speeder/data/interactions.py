"""Interactions (user, item, time) in order, and their leave-one-out split."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from speeder.errors import SpeederError
from speeder.io.files import atomic_path

SPLITS = ("validation", "test")
SPLIT_RULE = (
    "leave one out: a user's last item is the test target, the second last the validation target;"
    " users with fewer than 3 interactions only train"
)
FILE_ORDER = {"order": "file"}  # the record of equal times that keep the order of the raw file
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

    def times(self) -> list[np.ndarray]:
        """Times in seconds of each user's interactions, in the order of `sequences`."""
        return np.split(self.time, self._bounds()[1:-1]) if self.user_ids else []

    def lengths(self) -> np.ndarray:
        """`(U,)` int64: the number of interactions of each user."""
        return np.diff(self._bounds())

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


class Split:
    """At most one target per user for `"validation"` and for `"test"`: its history is all that the user had before it.

    Attributes:
        rule: how users' interactions are split, as a sentence.
        title: the same in a few words, for tables.
        requirement: what a user needs to have a target.
        ties: how interactions of a user with one time are ordered: `FILE_ORDER`, or `{"order": "shuffle", "seed": 0}`.
    """

    name: str
    rule: str
    title: str
    requirement: str

    def __init__(
        self,
        interactions: Interactions,
        training: np.ndarray,
        places: Mapping[str, np.ndarray],
        ties: Mapping[str, object] | None = None,
    ):
        """Args:
        training: `(U,)` int64, the length of each user's training part.
        places: of each of `SPLITS`, `(U,)` int64, the target's place in the user's sequence; -1: none.
        """
        self._sequences, self._training, self._places = interactions.sequences(), training, dict(places)
        self._users = {name: np.flatnonzero(place >= 0) for name, place in self._places.items()}
        self.ties = dict(FILE_ORDER if ties is None else ties)
        if self.ties != FILE_ORDER:
            self.title += ", ties: " + ", ".join(f"{name} {value}" for name, value in self.ties.items())

    def training(self) -> list[np.ndarray]:
        """Training part of every user, by index."""
        return [
            items[:length] for items, length in zip(self._sequences, self._training.tolist(), strict=True)
        ]

    def users(self, split: str) -> np.ndarray:
        """`(n,)` int64 user indices, in the order of `histories` and `targets`."""
        return self._users[_known(split)].copy()

    def histories(self, split: str) -> list[np.ndarray]:
        """The items before each target; for `"test"` those after the training part too."""
        users, places = self._users[_known(split)], self._places[split]
        return [self._sequences[user][: places[user]] for user in users]

    def targets(self, split: str) -> np.ndarray:
        """`(n,)` int64 item indices, one per user of `users(split)`."""
        users, places = self._users[_known(split)], self._places[split]
        return np.array([self._sequences[user][places[user]] for user in users], dtype=np.int64)

    def may_be_targets(self, times: np.ndarray) -> np.ndarray:
        """`(n,)` bool: whether an interaction at each of `(n,)` int64 times may be predicted, if nothing else forbids
        it."""
        return np.ones(len(times), dtype=bool)

    def part(self, index: int, count: int) -> Self:
        """The same training part, and every `count`-th user to evaluate, from `index` on."""
        part = copy.copy(self)
        part._users = {name: users[index::count] for name, users in self._users.items()}
        return part

    def hash(self) -> str:
        """SHA-256 over users, histories and targets of both splits, and the rule: equal hashes mean the same task."""
        digest = hashlib.sha256(self._identity())
        for split in SPLITS:
            histories = self.histories(split)
            lengths = np.array([len(history) for history in histories], dtype=np.int64)
            for part in (self.users(split), lengths, *histories, self.targets(split)):
                digest.update(part.astype("<i8").tobytes())
        return digest.hexdigest()

    def _identity(self) -> bytes:
        """What the hash covers beside users, histories and targets."""
        return json.dumps({"split": self.name, "ties": self.ties}, sort_keys=True).encode()


class LeaveOneOut(Split):
    """Splits each user with at least 3 interactions: last = test target, second last = validation target.

    Users with fewer only train.
    """

    name = "leave-one-out"
    rule = SPLIT_RULE
    title = "Leave one out"
    requirement = "leave one out needs users with 3 interactions"

    def __init__(self, interactions: Interactions, ties: Mapping[str, object] | None = None):
        lengths = interactions.lengths()
        long = lengths >= _MINIMUM
        places = {"validation": np.where(long, lengths - 2, -1), "test": np.where(long, lengths - 1, -1)}
        super().__init__(interactions, np.where(long, lengths - 2, lengths), places, ties)

    def _identity(self) -> bytes:
        # the oldest rule adds nothing, so that hashes of earlier versions stay
        return b"" if self.ties == FILE_ORDER else super()._identity()


def _known(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, but got {split!r}")
    return split
