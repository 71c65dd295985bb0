"""Bootstrap intervals against an unvectorised bootstrap, theory and their own seed; slices as partitions."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speeder.evaluation import bootstrap
from speeder.evaluation.bootstrap import bootstrap_intervals
from speeder.evaluation.slices import quantile_slices


def test_intervals_are_those_of_a_plain_bootstrap():
    values = np.random.default_rng(0).random((40, 2))
    rng = np.random.default_rng(7)
    means = np.array([values[rng.integers(0, 40, 40)].mean(axis=0) for _ in range(200)])
    for column, interval in enumerate(bootstrap_intervals(values, resamples=200, seed=7)):
        low, high = np.percentile(means[:, column], [2.5, 97.5])
        assert interval == pytest.approx((values[:, column].mean(), low, high))


def test_the_chunk_size_does_not_matter(monkeypatch):
    values = np.random.default_rng(0).random((50, 3))
    whole = bootstrap_intervals(values, resamples=100, seed=1)
    monkeypatch.setattr(bootstrap, "_CHUNK_CELLS", 350)
    np.testing.assert_allclose(bootstrap_intervals(values, resamples=100, seed=1), whole)


def test_the_width_is_that_of_the_normal_approximation():
    hits = (np.arange(4000) < 800).astype(float)[:, None]  # a rate of 0.2
    (interval,) = bootstrap_intervals(hits, resamples=2000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * np.sqrt(0.2 * 0.8 / 4000), rel=0.1)


def test_the_seed_decides_and_constants_have_no_width():
    values = np.random.default_rng(0).random((30, 1))
    assert bootstrap_intervals(values, seed=3) == bootstrap_intervals(values, seed=3)
    assert bootstrap_intervals(values, seed=3) != bootstrap_intervals(values, seed=4)
    assert bootstrap_intervals(np.full((9, 1), 0.25)) == [(0.25, 0.25, 0.25)]


@pytest.mark.parametrize(
    ("values", "resamples"), [(np.empty((0, 2)), 10), (np.ones(3), 10), (np.ones((3, 1)), 0)]
)
def test_nothing_to_resample_is_an_error(values, resamples):
    with pytest.raises(ValueError, match="expected"):
        bootstrap_intervals(values, resamples)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(1, 5))
def test_slices_partition_users_in_rising_order(values, parts):
    values = np.array(values)
    members = list(quantile_slices(values, parts, "items").values())
    assert 1 <= len(members) <= parts
    assert np.array_equal(np.sum(members, axis=0), np.ones(len(values)))
    for lower, upper in itertools.pairwise(members):
        assert values[lower].max() < values[upper].min()


def test_slices_of_distinct_values_are_even_and_say_what_they_hold():
    slices = quantile_slices(np.arange(1, 13), 4, "items")
    assert {label: int(member.sum()) for label, member in slices.items()} == {
        "1-3 items": 3,
        "4-6 items": 3,
        "7-9 items": 3,
        "10-12 items": 3,
    }
