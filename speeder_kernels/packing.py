"""Sequence packing: which sequences to lay end to end in one packed batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from speeder_kernels import _host

LARGEST = 2**63 - 1  # the planner counts in int64


def plan_packing(lengths: Sequence[int] | np.ndarray, max_tokens: int) -> list[list[int]]:
    """Share sequences out over as few bins of `max_tokens` tokens as first-fit decreasing finds.

    The longest sequence is placed first, each into the earliest bin with room for it; among equals the lower
    index comes first, so the same lengths always give the same plan. First-fit decreasing never needs more
    than 11/9 of the fewest possible bins, plus one (Johnson 1973). A million lengths take about a second.

    Args:
        lengths: tokens of each sequence, each at least 1.
        max_tokens: tokens that one bin may hold.

    Returns:
        Bins of sequence indices, each index in exactly one bin; within a bin the longest comes first.

    Raises:
        ValueError: no lengths, a length below 1, one above `max_tokens`, or `max_tokens` above 2^63 - 1.
        TypeError: lengths that are not whole numbers.

    Example:
        >>> plan_packing([5, 3, 4, 2], max_tokens=7)
        [[0, 3], [2, 1]]
    """
    array = np.asarray(lengths)
    if array.ndim != 1:
        raise ValueError(f"lengths: expected one dimension, got shape {array.shape}")
    if array.size == 0:
        raise ValueError("lengths: expected at least one sequence, got none")
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"lengths: expected whole numbers, got {array.dtype}")
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, (int, np.integer)):
        raise TypeError(f"max_tokens: expected a whole number, got {type(max_tokens).__name__}")
    if max_tokens > LARGEST:
        raise ValueError(f"max_tokens: expected at most {LARGEST}, got {max_tokens}")
    bad = np.flatnonzero((array < 1) | (array > max_tokens))
    if bad.size:
        at = int(bad[0])
        raise ValueError(f"lengths: expected 1..{max_tokens} (max_tokens), got {array[at]} at position {at}")
    array = np.ascontiguousarray(array, dtype=np.int64)
    plan = _host.plan_packing(array, int(max_tokens))
    return _plan_in_python(array, int(max_tokens)) if plan is None else plan


def _plan_in_python(lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    """The same plan as the compiled planner: a segment tree holds the most room in each range of bins."""
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [max_tokens] * (2 * leaves)
    bins: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(index)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins
