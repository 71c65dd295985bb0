"""Leak checks: silent on a sound split, and loud on every way of breaking one."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speeder.data import ItemCatalogue, PreparedData
from speeder.data.fingerprints import features_hash, training_hash
from speeder.data.interactions import Interactions, LeaveOneOut
from speeder.data.temporal_split import TemporalSplit
from speeder.errors import SpeederError
from speeder.evaluation.leaks import LeakError, check_features, check_split, check_training_hash
from speeder.prepare.encoders.collaborative import collaborative_features
from speeder.prepare.features import add_features
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.load import recipe_from_dict
from speeder.training.train import train


def interactions_of(sequences):
    """Interactions whose ``sequences()`` are the given ones."""
    users = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    items = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in sequences])
    return Interactions(users, items, np.arange(len(items)), [f"u{user}" for user in range(len(sequences))])


SEQUENCES = [[0, 1, 2, 3, 4], [4, 2], [3, 1, 0], [2, 2, 2, 2]]
histories = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=7), min_size=1, max_size=6)


@given(histories)
def test_a_sound_split_passes_even_with_repeated_items(sequences):
    interactions = interactions_of(sequences)
    check_split(LeaveOneOut(interactions), interactions)


class Broken(LeaveOneOut):
    """A sound split of which one method is replaced."""

    def __init__(self, **methods):
        super().__init__(interactions_of(SEQUENCES))
        vars(self).update(methods)


SOUND = LeaveOneOut(interactions_of(SEQUENCES))


@pytest.mark.parametrize(
    "methods",
    [
        {"training": lambda: [np.array(row) for row in SEQUENCES]},
        {"training": lambda: [np.array(row[:-1]) for row in SEQUENCES]},
        {"histories": lambda name: [SEQUENCES[user] for user in (0, 2, 3)]},
        {"histories": lambda name: SOUND.histories("test")},
        {"histories": lambda name: SOUND.histories("validation")},
        {"users": lambda name: np.array([0, 2, 3] if name == "test" else [0, 3, 2])},
        {"users": lambda name: np.array([0, 2, 2])},
    ],
)
def test_each_way_of_leaking_is_caught(methods):
    check_split(SOUND)
    with pytest.raises(LeakError) as caught:
        check_split(Broken(**methods))
    assert isinstance(caught.value, SpeederError) and "\n" not in str(caught.value)


def test_a_split_that_is_wrong_throughout_is_caught_with_its_interactions():
    longer = [[*row, 5] for row in SEQUENCES]  # the truth has one more item at each end than the split knows
    with pytest.raises(LeakError, match="user 0"):
        check_split(SOUND, interactions_of(longer))


def test_interactions_out_of_order_are_caught():
    interactions = interactions_of(SEQUENCES)
    interactions.time = interactions.time[::-1].copy()
    with pytest.raises(LeakError, match="order of time"):
        check_split(SOUND, interactions)


@given(histories, histories)
def test_hashes_are_equal_only_for_equal_sequences(first, second):
    assert training_hash(first) == training_hash([np.array(row, dtype=np.int32) for row in first])
    assert (training_hash(first) == training_hash(second)) == (first == second)


def test_only_a_fit_on_training_alone_passes():
    check_training_hash(training_hash(SOUND.training()), SOUND)
    for seen in (SEQUENCES, SOUND.histories("test"), SOUND.training()[:-1]):
        with pytest.raises(LeakError, match="features: fitted on"):
            check_training_hash(training_hash(seen), SOUND, "features")


def prepared(record):
    """A world whose collaborative features claim to be fitted as the record says."""
    world = synthetic_world(num_users=20, history=8)
    encoders = dict(world.manifest["encoders"])
    own = encoders.pop("collaborative")
    if record is not None:
        encoders["collaborative"] = {
            "features_hash": own["features_hash"],
            "training_hash": record(world.split),
        }
    return PreparedData(world.catalogue, world.interactions, {"encoders": encoders})


def test_features_fitted_on_training_rows_pass():
    check_features(prepared(lambda split: training_hash(split.training())))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda split: training_hash(split.histories("test")), "collaborative features: fitted on"),
        (lambda split: training_hash(split.training()[:-1]), "collaborative features: fitted on"),
        (lambda split: None, "expected a record with a training_hash"),
        (None, "expected a record of what they were fitted on"),
    ],
)
def test_features_fitted_on_test_rows_are_caught_before_training(record, message, tmp_path):
    data = prepared(record)
    with pytest.raises(LeakError, match=message):
        check_features(data)
    recipe = recipe_from_dict({"stages": [{"name": "text", "open": ["text"]}], "backbone": "never loaded"})
    with pytest.raises(LeakError, match=message):
        train(recipe, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def fitted():
    """Data with honest collaborative features, as `speeder prepare` makes them, and those fitted on test rows too."""
    world = synthetic_world(num_users=20, history=8)
    bare = ItemCatalogue(world.catalogue.ids, world.catalogue.titles)
    data = add_features(PreparedData(bare, world.interactions), ["collaborative"])
    leaking = collaborative_features(world.interactions.sequences(), len(bare), epochs=1)
    return data, leaking


def test_features_fitted_on_test_rows_are_caught_by_content(fitted, tmp_path):
    """Whatever name they are planted under, and whatever the manifest that was kept says."""
    data, leaking = fitted
    check_features(data)
    for name, message in {"collaborative": "not those of their record", "image": "expected a record"}.items():
        catalogue = data.catalogue.with_features(name, leaking.features, leaking.present)
        planted = PreparedData(catalogue, data.interactions, data.manifest)
        with pytest.raises(LeakError, match=f"{name} features: {message}"):
            check_features(planted)
        planted.save(tmp_path / name)
        with pytest.raises(LeakError, match=f"{name} features: {message}"):
            check_features(PreparedData.load(tmp_path / name))


def test_a_change_of_presence_alone_is_caught(fitted):
    data, _ = fitted
    present = data.catalogue.present["collaborative"].clone()
    present[(~present).nonzero()[0]] = True
    catalogue = data.catalogue.with_features(
        "collaborative", data.catalogue.features["collaborative"], present
    )
    with pytest.raises(LeakError, match="not those of their record"):
        check_features(PreparedData(catalogue, data.interactions, data.manifest))


def test_features_of_ones_own_say_what_they_were_fitted_on(fitted):
    data, leaking = fitted
    own = {"made_by": "matrix factorisation", "present": leaking.present}
    honest = training_hash(data.split.training())
    check_features(data.with_features("own", leaking.features, training_hash=honest, **own))
    check_features(data.with_features("own", leaking.features, training_hash=None, **own))
    with pytest.raises(LeakError, match="own features: fitted on"):
        check_features(
            data.with_features("own", leaking.features, training_hash=leaking.training_hash, **own)
        )
    for record, message in (
        ({"training_hash": honest}, "prepare the data again"),
        ("sasrec", "expected a record"),
    ):
        old = {"encoders": {"collaborative": record}}  # as versions before the hash of the content wrote it
        with pytest.raises(LeakError, match=message):
            check_features(PreparedData(data.catalogue, data.interactions, old))


def test_large_features_are_hashed_in_parts(monkeypatch):
    features, present = torch.randn(37, 5), torch.rand(37) > 0.5
    whole = features_hash(features, present)
    monkeypatch.setattr("speeder.data.fingerprints._CHUNK_BYTES", 100)
    assert features_hash(features, present) == whole
    assert features_hash(features.flip(0), present) != whole != features_hash(features, ~present)
    assert features_hash(features.view(5, 37).T, present) != whole


def test_a_test_item_in_a_training_row_stops_training(tmp_path):
    data = prepared(lambda split: training_hash(split.training()))
    longer = [*data.split.training()]
    longer[3] = np.append(longer[3], data.split.targets("test")[3])
    data.split.training = lambda: longer
    recipe = recipe_from_dict({"stages": [{"name": "text", "open": ["text"]}], "backbone": "never loaded"})
    with pytest.raises(LeakError, match="user 3: the training part is not the validation history"):
        train(recipe, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


TIMED = Interactions(
    [0, 0, 0, 0, 0, 1, 1, 1, 2, 2],
    [0, 1, 2, 3, 4, 5, 0, 1, 2, 3],
    [1, 2, 5, 6, 8, 1, 3, 9, 5, 9],
    ["a", "b", "c"],
)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=30))
def test_a_sound_temporal_split_passes(rows):
    interactions = Interactions(*zip(*rows, strict=True), list("abcd"))
    split = TemporalSplit(interactions, 4, 7)
    check_split(split)
    check_split(split, interactions)


WHOLE = LeaveOneOut(TIMED)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"training": TIMED.sequences}, "user 0: the training part is not the validation history"),
        ({"validation_from": 7}, "user 0: the training part is not what the user had before 1970"),
        ({"test_from": 6}, "user 0: the test history is not what the user had before 1970"),
        (
            {"targets": lambda name: np.array([4, 1, 3] if name == "test" else [3])},
            "user 0: the test history is",
        ),
        (
            {"targets": lambda name: np.array([4, 1, 2] if name == "test" else [2])},
            "user 2: the test target is",
        ),
        # sound for each user alone, but one user's training is later than another's target
        (
            {name: getattr(WHOLE, name) for name in ("training", "users", "histories", "targets")},
            "user 0: the training part is not what",
        ),
    ],
)
def test_each_way_of_leaking_from_a_temporal_split_is_caught(methods, message):
    broken = TemporalSplit(TIMED, 4, 7)
    check_split(broken, TIMED)
    vars(broken).update(methods)
    with pytest.raises(LeakError, match=message):
        check_split(broken, TIMED)
