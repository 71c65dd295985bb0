"""Filters over interactions as columns of integers: repeats, and the k-core. They copy no whole column."""

from collections.abc import Iterator

import numpy as np

_PART_ROWS = 1 << 22  # rows sorted, or looked at, together: what bounds the memory


def first_of_repeats(user: np.ndarray, item: np.ndarray, time: np.ndarray, *, same_time: bool) -> np.ndarray:
    """`(N,)` bool: the earliest row of each user and item; among equal times, the first one.

    Args:
        user, item: `(N,)` codes from 0.
        time: `(N,)` integers; may be on disk.
        same_time: whether only rows with the same time are repeats of each other.
    """
    keep = np.ones(len(user), dtype=bool)
    for rows in _parts_by_user(user):
        rows = rows[np.lexsort((item[rows], user[rows]))]
        same = (user[rows[1:]] == user[rows[:-1]]) & (item[rows[1:]] == item[rows[:-1]])
        # times are read only where there are repeats: they are the widest column
        rows = rows[np.append(same, False) | np.append(False, same)]
        when = time[rows]
        order = np.lexsort((rows, when, item[rows], user[rows]))
        rows, when = rows[order], when[order]
        same = (user[rows[1:]] == user[rows[:-1]]) & (item[rows[1:]] == item[rows[:-1]])
        if same_time:
            same &= when[1:] == when[:-1]
        keep[rows[1:][same]] = False
    return keep


def _parts_by_user(user: np.ndarray) -> Iterator[np.ndarray]:
    """Rows in parts of some millions, all rows of a user in one."""
    parts = -(-len(user) // _PART_ROWS)
    part_of = np.empty(len(user), dtype=np.uint16)
    for chunk in _chunks(len(user)):
        part_of[chunk] = user[chunk] % parts
    for part in range(parts):
        rows = np.flatnonzero(part_of == part)
        if len(rows):
            yield rows


def k_core(user: np.ndarray, item: np.ndarray, keep: np.ndarray, k: int) -> tuple[int, int]:
    """Shrinks `keep` to the largest set of rows in which every user and every item has at least `k` of them.

    Args:
        user, item: `(N,)` codes from 0.
        keep: `(N,)` bool, changed in place; rows that are False do not count.

    Returns:
        The numbers of rows dropped for their user, and for their item. A row counts for the one that dropped it first;
        users and items take turns.
    """
    columns = (user, item)
    counts = [np.zeros(int(column.max(initial=-1)) + 1, dtype=np.int32) for column in columns]
    for chunk in _chunks(len(keep)):
        for column, count in zip(columns, counts, strict=True):
            np.add.at(count, column[chunk][keep[chunk]], 1)
    dropped = [0, 0]
    settled, side = 0, 0  # columns in a row without a change
    while settled < 2:
        few, lost = counts[side] < k, 0
        for chunk in _chunks(len(keep)):
            rows = np.flatnonzero(keep[chunk] & few[columns[side][chunk]])
            keep[chunk][rows] = False
            for column, count in zip(columns, counts, strict=True):
                np.subtract.at(count, column[chunk][rows], 1)
            lost += len(rows)
        dropped[side] += lost
        settled = 0 if lost else settled + 1
        side = 1 - side
    return dropped[0], dropped[1]


def renumber(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(N,)` codes as int32 from 0, numbered by first appearance, and the old code of each new one, `(n,)`."""
    first = np.full(int(codes.max(initial=-1)) + 1, -1, dtype=np.int64)
    for chunk in reversed(list(_chunks(len(codes)))):
        # of several values for one place the last stays: written backwards, the first row's
        rows = np.arange(chunk.start, min(chunk.stop, len(codes)))[::-1]
        first[codes[rows]] = rows
    old = np.flatnonzero(first >= 0)
    old = old[np.argsort(first[old])]
    place = np.empty(len(first), dtype=np.int32)
    place[old] = np.arange(len(old))
    return place[codes], old


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + _PART_ROWS) for start in range(0, count, _PART_ROWS))
