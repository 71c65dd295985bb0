"""Collaborative features come from training alone, say so, and put together what goes together."""

import numpy as np
import pytest
import torch

from speeder.baselines import SASRecConfig
from speeder.data.fingerprints import training_hash
from speeder.data.interactions import Interactions, LeaveOneOut
from speeder.evaluation.leaks import LeakError, check_training_hash
from speeder.prepare.encoders.collaborative import collaborative_features

NUM_ITEMS = 42
QUICK = SASRecConfig(max_length=12, dropout=0.1, learning_rate=5e-3, batch_size=32)


@pytest.fixture(scope="module")
def sequences():
    """400 users who each stay in one of four groups of ten items; items 40 and 41 are only ever held out."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4, (400, 1)) * 10 + rng.integers(0, 10, (400, 10))
    rows[:, -2:] = rng.integers(40, 42, (400, 2))
    return rows


@pytest.fixture(scope="module")
def split(sequences):
    users = np.repeat(np.arange(400), 10)
    names = [f"u{user}" for user in range(400)]
    return LeaveOneOut(Interactions(users, sequences.ravel(), np.arange(4000), names))


@pytest.fixture(scope="module")
def fitted(split):
    return collaborative_features(split.training(), NUM_ITEMS, dim=16, epochs=8, config=QUICK)


def test_present_items_are_standardised_and_others_zero(fitted):
    features, present, _ = fitted
    assert features.shape == (NUM_ITEMS, 16) and features.dtype == torch.float32
    assert present.tolist() == [True] * 40 + [False] * 2
    assert not features[40:].any()
    torch.testing.assert_close(features[:40].mean(dim=0), torch.zeros(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(features[:40].std(dim=0, correction=0), torch.ones(16))


def test_items_of_one_group_are_alike(fitted):
    unit = torch.nn.functional.normalize(fitted.features[:40], dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(dim=1)
    assert (nearest // 10 == torch.arange(40) // 10).float().mean() > 0.9


@pytest.mark.exact
def test_what_is_held_out_has_no_say(split, sequences, fitted):
    """Other held-out items leave the features bit for bit the same."""
    other = sequences.copy()
    other[:, -2:] = 7
    names = [f"u{user}" for user in range(400)]
    interactions = Interactions(np.repeat(np.arange(400), 10), other.ravel(), np.arange(4000), names)
    again = collaborative_features(
        LeaveOneOut(interactions).training(), NUM_ITEMS, dim=16, epochs=8, config=QUICK
    )
    assert torch.equal(again.features, fitted.features)
    assert again.training_hash == fitted.training_hash


def test_the_recorded_hash_is_checked_against_the_split(split, fitted):
    assert fitted.training_hash == training_hash(split.training())
    check_training_hash(fitted.training_hash, split, "collaborative features")
    leaking = collaborative_features(split.histories("test"), NUM_ITEMS, dim=16, epochs=1, config=QUICK)
    with pytest.raises(LeakError, match="collaborative features"):
        check_training_hash(leaking.training_hash, split, "collaborative features")


@pytest.mark.exact
def test_the_seed_decides(split):
    first, second, third = (
        collaborative_features(
            split.training(), NUM_ITEMS, dim=16, seed=seed, epochs=1, config=QUICK
        ).features
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.equal(first, third)
