"""Percentile bootstrap intervals for means over users."""

from typing import NamedTuple

import numpy as np

_CHUNK_CELLS = 4_000_000  # resampled users held at once: 32 MB of counts


class Interval(NamedTuple):
    """A mean over users and the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap_intervals(values: np.ndarray, resamples: int = 1000, seed: int = 0) -> list[Interval]:
    """95 % percentile intervals of the column means of ``values`` (n users, m metrics), one for each column.

    Every column sees the same resampled users, so columns stay paired. Users are the unit of resampling
    because one user's metrics are not independent of each other.

    Raises:
        ValueError: no users, or fewer than one resample.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(
            f"values: expected (users, metrics) with at least one user, got shape {values.shape}"
        )
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    num_users = len(values)
    rng = np.random.default_rng(seed)
    means = []
    chunk = max(1, _CHUNK_CELLS // num_users)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(0, num_users, (size, num_users)) + num_users * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * num_users).reshape(size, num_users)
        means.append(
            counts @ values / num_users
        )  # how often each user was drawn: one product serves all metrics
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return [Interval(*map(float, column)) for column in zip(values.mean(axis=0), low, high, strict=True)]
