"""Slices of users by history length and by how often their target occurs in training."""

import numpy as np


def quantile_slices(values: np.ndarray, parts: int, unit: str) -> dict[str, np.ndarray]:
    """Split users into at most ``parts`` groups of about equal size by an integer value.

    Users with the same value stay together, so groups may be uneven, and fewer than ``parts`` where values
    repeat.

    Args:
        values: (n,) integers, one per user.
        unit: the unit in labels, as in ``"3-7 items"``.

    Returns:
        label -> (n,) bool, in rising order of value; the groups are disjoint and cover every user.
    """
    values = np.asarray(values)
    edges = np.unique(np.quantile(values, np.arange(1, parts) / parts, method="inverted_cdf"))
    group = np.searchsorted(edges, values, side="left")
    slices = {}
    for index in np.unique(group):
        member = group == index
        low, high = int(values[member].min()), int(values[member].max())
        slices[f"{low} {unit}" if low == high else f"{low}-{high} {unit}"] = member
    return slices
