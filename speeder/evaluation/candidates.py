"""Candidate files: the negatives that are ranked with each user's target, drawn once, versioned and hashed.

Every user has a stream of uniform items that depends only on the seed, the split's name and the user's number.
Negatives are its first items outside the history, without the target. So negatives do not depend on the target, except
that it is not among them, and anyone can draw a file again and compare.
"""

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from speeder.data.item_indices import item_array
from speeder.errors import SpeederError
from speeder.io.files import read_json, write_text

if TYPE_CHECKING:
    from speeder.data.interactions import Split

FORMAT = "speeder-candidates-1"
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 64  # items drawn at once


@dataclass(frozen=True)
class Candidates:
    """Negatives of every user of a split.

    Attributes:
        split: "test" or "validation".
        split_hash: the hash of the split.
        num_items: items in the catalogue.
        seed: the seed of the draw.
        users: `(n,)` int64, in the split's order.
        negatives: `(n, N)` int64 item indices, in the order of the draw.
    """

    split: str
    split_hash: str
    num_items: int
    seed: int
    users: np.ndarray
    negatives: np.ndarray

    @classmethod
    def draw(
        cls,
        split: "Split",
        name: str,
        num_items: int,
        negatives: int,
        seed: int = 0,
        rows: np.ndarray | None = None,
    ) -> "Candidates":
        """Draw negatives.

        Args:
            split: leave one out, or temporal.
            name: "test" or "validation".
            num_items: items in the catalogue.
            negatives: number per user, `N`.
            rows: positions of the split's users to draw for; all by default.

        Raises:
            SpeederError: a user has fewer than `N` items outside the history.
        """
        if negatives < 1:
            raise SpeederError(f"negatives: expected at least 1, got {negatives}")
        users, histories, targets = split.users(name), split.histories(name), split.targets(name)
        rows = np.arange(len(users)) if rows is None else rows
        drawn = [
            draw_items(
                seed,
                name,
                int(users[row]),
                negatives,
                num_items,
                {*histories[row].tolist(), int(targets[row])},
            )
            for row in rows
        ]
        users = users[rows]
        table = np.array(drawn, dtype=np.int64).reshape(len(users), negatives)
        return cls(name, split.hash(), num_items, seed, users, table)

    def listed(self, targets: np.ndarray) -> np.ndarray:
        """Negatives and `(n,)` targets as `(n, N + 1)` items, in the order of a prompt.

        That order follows from a second stream over users and items, so the target's position does not reveal it.
        """
        items = np.concatenate([self.negatives, item_array("targets", targets)[:, None]], axis=1)
        keys = random_bits(self.seed, f"order {self.split}", self.users.astype(np.uint64)[:, None], items)
        return np.take_along_axis(items, keys.argsort(axis=1), axis=1)

    def hash(self) -> str:
        """SHA-256 over the file's content: equal hashes mean equal candidates."""
        digest = hashlib.sha256(json.dumps(self._header(), sort_keys=True).encode())
        for part in (self.users, self.negatives):
            digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Write a JSON file, one line per user, atomically."""
        header = json.dumps(self._header() | {"hash": self.hash()}, sort_keys=True)
        rows = ",\n".join(
            f"[{user},{row.tolist()}]" for user, row in zip(self.users, self.negatives, strict=True)
        )
        write_text(path, f'{header[:-1]}, "negatives": [\n{rows}\n]}}\n')

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Candidates":
        """Read what `save` wrote.

        Raises:
            SpeederError: the file is missing, damaged, or of another version.
        """
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise SpeederError(f"{path}: expected candidates of {FORMAT}, got {content.get('format')!r}")
        try:
            users = np.array([user for user, _ in content["negatives"]], dtype=np.int64)
            table = np.array([row for _, row in content["negatives"]], dtype=np.int64)
            header = {name: content[name] for name in ("split", "split_hash", "num_items", "seed")}
            loaded = cls(**header, users=users, negatives=table.reshape(len(users), -1))
            if loaded.hash() != content["hash"]:
                raise ValueError("its content has changed: the hash is not the saved one")
        except (KeyError, TypeError, ValueError) as error:
            raise SpeederError(f"{path}: not readable candidates: {error}") from error
        return loaded

    def _header(self) -> dict:
        fields = {name: getattr(self, name) for name in ("split", "split_hash", "num_items", "seed")}
        return fields | {"format": FORMAT, "count": int(self.negatives.shape[1])}


def draw_items(
    seed: int, stream: str, key: int, count: int, num_items: int, excluded: Collection[int]
) -> list[int]:
    """The first `count` different items outside `excluded` of the stream `(seed, stream, key)`.

    Raises:
        SpeederError: there are fewer.
    """
    taken, seen = [], set(excluded)
    if num_items - len(seen) < count:
        raise SpeederError(
            f"negatives: expected at most {num_items - len(seen)}, the items outside the history of {stream} "
            f"number {key}, got {count}"
        )
    start = 0
    while True:
        words = random_bits(seed, stream, np.uint64(key), np.arange(start, start + _BLOCK))
        for item in (words % np.uint64(num_items)).tolist():
            if item not in seen:
                seen.add(item)
                taken.append(item)
                if len(taken) == count:
                    return taken
        start += _BLOCK


def random_bits(seed: int, stream: str, key: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """64 random bits for every (seed, stream, key, number), by the SplitMix64 finaliser.

    It is written out here, since numpy's generators may change their streams between versions.
    """
    name = np.uint64(int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little"))
    word = np.uint64(seed % 2**64)
    with np.errstate(over="ignore"):
        for part in (name, key, np.asarray(numbers).astype(np.uint64)):
            word = (word ^ part) + _GOLDEN
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            word = word ^ (word >> np.uint64(31))
    return word
