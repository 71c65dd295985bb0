"""Popularity counts training alone and scores every history the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speeder.baselines import Popularity
from speeder.data.fingerprints import training_hash

sequences = st.lists(st.lists(st.integers(0, 9), max_size=8), max_size=6)


@given(sequences)
def test_scores_are_training_counts(rows):
    model = Popularity([np.array(row, dtype=np.int64) for row in rows], 10)
    flat = [item for row in rows for item in row]
    scores = model.score([[1], [2, 3], []])
    assert scores.shape == (3, 10) and scores.dtype.is_floating_point
    for row in scores.tolist():
        assert row == [flat.count(item) for item in range(10)]
    assert model.training_hash == training_hash(rows)


@pytest.mark.parametrize("item", [-1, 10])
def test_an_item_outside_the_catalogue_is_refused(item):
    with pytest.raises(IndexError, match=r"0\.\.9"):
        Popularity([[0, item]], 10)
