"""Ties: how a user's interactions with one time are ordered.

In many raw files the order of equal times tells something that time does not: Amazon's days are sorted by item id. What
such an order predicts is no taste. Shuffled ties are the check.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speeder.data.interactions import FILE_ORDER
from speeder.errors import SpeederError
from speeder.evaluation.candidates import random_bits

ORDERS = ("file", "shuffle")


@dataclass(frozen=True)
class Ties:
    """A rule for equal times.

    Args:
        order: `"file"` keeps the order of the raw file, `"shuffle"` orders them by random numbers.
        seed: of these numbers; None is 0. They depend only on the seed and the ids of user and item, so neither the
            file's order nor any other user changes them.

    Raises `SpeederError` for another order, a negative seed, or a seed that nothing uses.
    """

    order: str = "file"
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise SpeederError(f"ties: expected one of {', '.join(ORDERS)}, got {self.order!r}")
        if self.seed is not None and (self.order == "file" or self.seed < 0):
            raise SpeederError(f"ties seed: expected a number from 0, with ties 'shuffle', got {self.seed}")

    @property
    def record(self) -> dict:
        """The manifest's record, which is part of the split's hash."""
        return dict(FILE_ORDER) if self.order == "file" else {"order": self.order, "seed": self.seed or 0}

    def sort(
        self,
        user: np.ndarray,
        item: np.ndarray,
        time: np.ndarray,
        user_ids: Sequence[str],
        item_ids: Sequence[str],
    ) -> np.ndarray:
        """`(N,)` rows by user, then time, then this rule; rows are given in the order of the file.

        Raises `SpeederError` if no user has two times, so that a shuffle would leave no order at all.
        """
        if self.order == "file":
            return np.lexsort((time, user))  # lexsort is stable
        keys = random_bits(self.seed or 0, "ties", _hashes(user_ids)[user], _hashes(item_ids)[item])
        order = np.lexsort((keys, time, user))
        users, times = user[order], time[order]
        same_user = users[1:] == users[:-1]
        if same_user.any() and not (same_user & (times[1:] != times[:-1])).any():
            raise SpeederError(
                "ties: expected 'file', since all interactions of each user have one time and only the file's order is"
                " left, got 'shuffle'"
            )
        return order


def _hashes(ids: Sequence[str]) -> np.ndarray:
    """`(n,)` uint64: 64 bits of each id's hash."""
    digests = (hashlib.blake2b(external.encode(), digest_size=8).digest() for external in ids)
    return np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)
