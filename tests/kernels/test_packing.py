"""plan_packing: a valid, deterministic, tight plan, the same from C++ and from Python."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder_kernels import _host, packing, plan_packing


def first_fit_decreasing(lengths, max_tokens) -> list[list[int]]:
    """The textbook version: look through the bins from the first."""
    bins, room = [], []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [b for b, left in enumerate(room) if left >= lengths[index]]
        if not fits:
            bins.append([])
            room.append(max_tokens)
            fits = [len(bins) - 1]
        bins[fits[0]].append(index)
        room[fits[0]] -= lengths[index]
    return bins


@settings(max_examples=200, deadline=None)
@given(max_tokens=st.integers(1, 60), data=st.data())
def test_plan(max_tokens, data):
    lengths = data.draw(st.lists(st.integers(1, max_tokens), min_size=1, max_size=60))
    plan = plan_packing(lengths, max_tokens)
    assert plan == first_fit_decreasing(lengths, max_tokens)
    assert sorted(index for one in plan for index in one) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in one) for one in plan]
    assert max(loads) <= max_tokens
    # At most one bin is half empty, or the last would have fitted into an earlier one.
    assert sum(2 * load <= max_tokens for load in loads) <= 1
    assert packing._plan_in_python(np.asarray(lengths), max_tokens) == plan


def test_many_sequences():
    """A million lengths are packed to within a per cent of the least number of bins."""
    lengths = np.random.default_rng(0).integers(1, 200, 1_000_000)
    plan = plan_packing(lengths, 4096)
    assert sum(map(len, plan)) == len(lengths)
    assert len(plan) <= 1.01 * lengths.sum() / 4096


def test_the_lock_is_released():
    """Another Python thread runs while the planner does."""
    lengths = np.random.default_rng(0).integers(1, 200, 300_000).astype(np.int64)
    planner = threading.Thread(target=_host.plan_packing, args=(lengths, 4096))
    planner.start()
    turns = 0
    while planner.is_alive():
        turns += 1
    assert turns > 10


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "error", "message"),
    [
        ([], 4, ValueError, "lengths: expected at least one sequence, got none"),
        ([1, 5, 9], 4, ValueError, r"lengths: expected 1\.\.4 \(max_tokens\), got 5 at position 1"),
        ([1, 0], 4, ValueError, r"lengths: expected 1\.\.4 \(max_tokens\), got 0 at position 1"),
        ([1.5], 4, TypeError, "lengths: expected whole numbers, got float64"),
        ([[1]], 4, ValueError, r"lengths: expected one dimension, got shape \(1, 1\)"),
        ([1], 4.0, TypeError, "max_tokens: expected a whole number, got float"),
    ],
)
def test_bad_arguments(lengths, max_tokens, error, message):
    with pytest.raises(error, match=message):
        plan_packing(lengths, max_tokens)
