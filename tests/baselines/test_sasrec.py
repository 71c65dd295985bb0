"""SASRec learns planted worlds, ignores padding, and is the same again by seed and from disk."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speeder.baselines.popularity import Popularity
from speeder.baselines.sasrec.fit import fit_sasrec
from speeder.baselines.sasrec.model import SASRec
from speeder.baselines.sequential.fit import cut_windows, length_batches
from speeder.data.fingerprints import training_hash
from speeder.data.interactions import Interactions, LeaveOneOut
from speeder.errors import SpeederError
from speeder.evaluation.evaluate import evaluate
from speeder.evaluation.metrics import metric_values, target_ranks
from speeder.recipes.sasrec import SASRecConfig
from tests.baselines.cycles import NUM_ITEMS, cycle_histories

SMALL = SASRecConfig(32, max_length=12, dropout=0.1, learning_rate=5e-3, batch_size=32, epochs=30)


@pytest.fixture(scope="module")
def world():
    """Two cycles modulo 24 from random starts, in turns: the next item follows the last but one alone."""
    starts = np.random.default_rng(0).integers(0, NUM_ITEMS, (600, 2))
    walks = np.concatenate([starts + step for step in range(5)], axis=1) % NUM_ITEMS
    users = np.repeat(np.arange(len(walks)), walks.shape[1])
    names = [f"u{user}" for user in range(len(walks))]
    return LeaveOneOut(Interactions(users, walks.ravel(), np.arange(walks.size), names))


@pytest.fixture(scope="module")
def trained(world):
    records = []
    model = fit_sasrec(
        world.training(),
        NUM_ITEMS,
        replace(SMALL, epochs=60, patience=60),  # where learning is nearly done, the ranking moves little
        validation=(world.histories("validation"), world.targets("validation")),
        log=records.append,
    )
    return model, records


def test_it_learns_the_planted_order(world, trained):
    model, records = trained
    result = evaluate(model, world, resamples=50)
    # training stopped by the ranking that masks seen items, so that is what is learned; some targets are seen ones
    pairs = zip(world.histories("test"), world.targets("test"), strict=True)
    reachable = np.mean([target not in history for history, target in pairs])
    assert reachable > 0.7 and result.mean("HR@1", "masked") > 0.95 * reachable
    popular = evaluate(Popularity(world.training(), NUM_ITEMS), world, resamples=50)
    assert popular.mean("HR@1", "masked") < 0.2
    assert records[-1]["loss"] < records[0]["loss"]
    assert [record["epoch"] for record in records] == list(range(1, len(records) + 1))


@pytest.fixture(scope="module")
def cycle():
    return cycle_histories()


@pytest.fixture(scope="module")
def model(cycle):
    return fit_sasrec(cycle, NUM_ITEMS, SMALL, epochs=12)


def test_it_learns_a_cycle(model):
    histories = [[(start + step) % NUM_ITEMS for step in range(1 + start % 9)] for start in range(NUM_ITEMS)]
    following = [(history[-1] + 1) % NUM_ITEMS for history in histories]
    assert model.score(histories).argmax(dim=1).tolist() == following


@given(st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), min_size=1, max_size=20), min_size=1, max_size=8))
def test_a_batch_scores_as_one_by_one(model, histories):
    """Neighbours, and with them the padding, have no effect; only the last ``max_length`` items are read."""
    together = model.score(histories)
    assert together.shape == (len(histories), NUM_ITEMS) and together.dtype == torch.float32
    alone = torch.cat([model.score([history[-SMALL.max_length :]]) for history in histories])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_the_padding_value_and_later_items_have_no_effect(model):
    items = torch.arange(8)[None]
    lengths = torch.tensor([8])
    hidden = model(items, lengths)
    changed = items.clone()
    changed[:, 5:] = 23
    torch.testing.assert_close(model(changed, lengths)[:, :5], hidden[:, :5])
    assert not torch.allclose(model(changed, lengths)[:, 5:], hidden[:, 5:])


@pytest.mark.exact
def test_the_seed_decides_and_the_callers_random_state_is_left_alone(cycle):
    state = torch.get_rng_state()
    first, second = (fit_sasrec(cycle, NUM_ITEMS, SMALL, epochs=2, seed=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    third = fit_sasrec(cycle, NUM_ITEMS, SMALL, epochs=2, seed=5)
    other = fit_sasrec(cycle, NUM_ITEMS, SMALL, epochs=2, seed=6)
    histories = [[1, 2, 3], [7]]
    assert torch.equal(first.score(histories), second.score(histories))
    assert torch.equal(first.score(histories), third.score(histories))
    assert not torch.equal(first.score(histories), other.score(histories))


@pytest.mark.exact
def test_saved_and_loaded_is_the_same(model, cycle, tmp_path):
    model.save(tmp_path / "sasrec")
    loaded = SASRec.load(tmp_path / "sasrec")
    assert torch.equal(loaded.score([[1, 2], [5]]), model.score([[1, 2], [5]]))
    assert loaded.config == model.config and loaded.training_hash == training_hash(cycle)
    assert sorted(path.name for path in (tmp_path / "sasrec").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("damage", ["truncate", "remove", "swap", "garble", "config"])
def test_a_damaged_save_is_a_readable_error(model, tmp_path, damage):
    model.save(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "remove":
        weights.unlink()
    elif damage == "swap":
        SASRec(NUM_ITEMS, SMALL).save(tmp_path / "other")
        (tmp_path / "other" / "model.safetensors").replace(weights)
    elif damage == "garble":
        config.write_text("{")
    else:
        config.write_text(config.read_text().replace('"layers"', '"floors"'))
    with pytest.raises(SpeederError):
        SASRec.load(tmp_path)


def test_early_stopping_keeps_the_best_epoch(cycle):
    cycle = cycle[:100]
    histories, targets = [row[:-1] for row in cycle], [row[-1] for row in cycle]
    records = []
    config = replace(SMALL, epochs=40, patience=2, dropout=0.0)
    wrong = np.random.default_rng(0).permutation(targets)  # nothing to learn, so it soon stops getting better
    model = fit_sasrec(cycle, NUM_ITEMS, config, validation=(histories, wrong), log=records.append)
    values = [record["NDCG@10"] for record in records]
    best = int(np.argmax(values))
    assert len(values) == best + 1 + config.patience < 40
    again = []
    fit_sasrec(cycle, NUM_ITEMS, config, validation=(histories, wrong), log=again.append)
    assert again == records
    ranks = target_ranks(model.score(histories), torch.from_numpy(wrong), histories)
    assert metric_values(ranks.numpy(), "NDCG@10").mean() == pytest.approx(values[best])


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 9))
def test_windows_predict_every_item_but_the_first_once(lengths, max_length):
    sequences = [np.arange(length) + 100 * number for number, length in enumerate(lengths)]
    windows = cut_windows(sequences, max_length)
    assert all(2 <= len(window) <= max_length + 1 for window in windows)
    predicted = sorted(item for window in windows for item in window[1:])
    assert predicted == sorted(item for sequence in sequences for item in sequence[1:])


@given(st.lists(st.integers(2, 30), min_size=1, max_size=90), st.integers(1, 8), st.integers(0, 5))
def test_batches_hold_each_window_once(lengths, batch_size, seed):
    windows = [np.full(length, number) for number, length in enumerate(lengths)]
    batches = list(length_batches(windows, batch_size, np.random.default_rng(seed)))
    assert sorted(window[0] for batch in batches for window in batch) == list(range(len(windows)))
    assert all(len(batch) <= batch_size for batch in batches)
    assert len(batches) == math.ceil(len(windows) / batch_size)


def test_wrong_input_is_named(model, cycle):
    with pytest.raises(ValueError, match="number 1 is empty"):
        model.score([[1], []])
    with pytest.raises(IndexError, match=r"expected items in 0\.\.23, number 1 has 3\.\.24"):
        model.score([[1], [3, 24]])
    with pytest.raises(IndexError, match="training_sequences"):
        fit_sasrec(cycle, 5, SMALL)
    with pytest.raises(ValueError, match="two items"):
        fit_sasrec([[1], [2]], NUM_ITEMS, SMALL)
    with pytest.raises(ValueError, match="epochs"):
        fit_sasrec(cycle, NUM_ITEMS, SMALL, epochs=0)
    assert model.score([]).shape == (0, NUM_ITEMS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"heads": 3},
        {"layers": 0},
        {"hidden_size": 6.5},
        {"learning_rate": "1"},
    ],
)
def test_wrong_configurations_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        replace(SMALL, **wrong)
