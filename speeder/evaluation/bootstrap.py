"""Percentile bootstrap intervals for means over users."""

from typing import NamedTuple

import numpy as np

_CHUNK_CELLS = 4_000_000  # resampled users held at once: 32 MB of counts


class Interval(NamedTuple):
    """A mean over users and the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap_intervals(
    values: np.ndarray, resamples: int = 1000, seed: int = 0, weights: np.ndarray | None = None
) -> list[Interval]:
    """95 % percentile intervals of the column means of ``values`` (n users, m metrics), one per column.

    All columns use the same resampled users, so they stay paired. Users are the unit of resampling, because one
    user's metrics are not independent of each other.

    Args:
        weights: (n, m), the weight of each value in its column's mean, such as 0 for an invalid answer; 1 by default.
            A column whose weights are all 0 has mean 0.

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
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    both = np.concatenate([values * weights, weights], axis=1)
    rng = np.random.default_rng(seed)
    means = []
    chunk = max(1, _CHUNK_CELLS // num_users)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(0, num_users, (size, num_users)) + num_users * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * num_users).reshape(size, num_users)
        means.append(_ratio(counts @ both))  # how often each user was drawn: one product serves all metrics
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    mean = _ratio(both.sum(axis=0))
    return [Interval(*map(float, column)) for column in zip(mean, low, high, strict=True)]


def _ratio(sums: np.ndarray) -> np.ndarray:
    """Weighted sums, then sums of weights -> weighted means."""
    total, weight = np.split(sums, 2, axis=-1)
    return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
