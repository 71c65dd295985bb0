"""Neighbours: the counts and cosines of a slow dense formula, weights that follow the validation items, and the same
bits from disk and in every table."""

import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder.baselines.auto import load_model
from speeder.baselines.fit_neighbours import content_modalities, fit_neighbours, fits
from speeder.baselines.neighbours import ITEM_PAIRS, Content, Neighbours
from speeder.cli.main import main
from speeder.data import ItemCatalogue, PreparedData
from speeder.data.fingerprints import training_hash
from speeder.data.interactions import Interactions
from speeder.errors import SpeederError
from speeder.evaluation.evaluate import evaluate
from speeder.evaluation.leaks import LeakError
from speeder.model.item_pairs import count_pairs
from speeder.model.whitening import Whitening
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.load import load_recipe, recipe_from_dict
from speeder.recipes.neighbours import NeighboursConfig, NeighboursRecipe
from speeder.studies.evaluate_run import Measure, baselines
from speeder.training.neighbours import train_neighbours
from speeder.training.run_folder import stage_logs

CONFIG = NeighboursConfig()


def made(sequences, num_items: int, features=None, present=None) -> PreparedData:
    """Data of users' sequences, with the features as modality "text", which came from no interactions."""
    users = np.repeat(np.arange(len(sequences)), [len(items) for items in sequences])
    items = np.concatenate(sequences)
    names = [f"u{user}" for user in range(len(sequences))]
    catalogue = ItemCatalogue([f"i{item}" for item in range(num_items)])
    data = PreparedData(catalogue, Interactions(users, items, np.arange(len(items)), names))
    if features is None:
        return data
    return data.with_features("text", features, present, made_by="test", training_hash=None)


def fitted(data: PreparedData, **how) -> Neighbours:
    return fit_neighbours(data.split, data.catalogue, content_modalities(data), **how)


def slow_pairs(sequences, num_items: int, config: NeighboursConfig) -> np.ndarray:
    """The counts by their definition, pair by pair."""
    total, counts = np.zeros((num_items, num_items)), np.zeros(num_items)
    for sequence in sequences:
        for place, item in enumerate(sequence):
            counts[item] += 1
            for later in range(place + 1, len(sequence)):
                if later - place <= config.window:
                    weight = config.window_decay ** (later - place - 1)
                    total[item, sequence[later]] += weight
                    total[sequence[later], item] += config.backward * weight
    return total / np.sqrt(np.outer(counts + 1, counts + 1))


def slow_rows(features: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Whitened rows by a singular value decomposition, one row after another."""
    own = features[present].astype(np.float64)
    mean = own.mean(axis=0)
    _, singular, directions = np.linalg.svd(own - mean, full_matrices=False)
    variances = singular**2 / len(own)
    kept = variances > variances.max() * 1e-12
    ridge = variances.sum() / len(own)
    rows = np.zeros((len(features), int(kept.sum())))
    for item in np.flatnonzero(present):
        row = directions[kept] @ (features[item] - mean) / np.sqrt(variances[kept] + ridge)
        rows[item] = row / np.linalg.norm(row)
    return rows


@given(
    st.lists(st.lists(st.integers(0, 6), max_size=14), max_size=8),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    st.sampled_from([0.0, 0.7, 2.0]),
)
def test_pairs_are_those_of_the_dense_formula(sequences, window, decay, backward):
    """Also for repeated items, empty sequences and items that never occur."""
    config = NeighboursConfig(window=window, window_decay=decay, backward=backward)
    found = count_pairs(sequences, 7, config)
    assert found.shape == (7, 7) and found.dtype == np.float32
    np.testing.assert_allclose(found.toarray(), slow_pairs(sequences, 7, config), rtol=1e-6, atol=1e-7)


def test_a_sequence_counted_by_hand():
    """a b c: a gives 1 to b and .8 to c; c gives .7 to b and .7 * .8 to a; every count is 1, so all is halved."""
    found = count_pairs([[0, 1, 2]], 4, CONFIG).toarray()
    expected = [[0, 0.5, 0.4, 0], [0.35, 0, 0.5, 0], [0.28, 0.35, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_scores_are_those_of_the_dense_formula(seed):
    rng = np.random.default_rng(seed)
    items, width = int(rng.integers(9, 30)), int(rng.integers(1, 6))
    sequences = [rng.integers(0, items, rng.integers(3, 15)) for _ in range(12)]
    features = rng.normal(size=(items, width)) + 3
    present = rng.random(items) < 0.8
    present[:2] = True
    data = made(sequences, items, torch.from_numpy(features), torch.from_numpy(present))
    tried = []
    model = fitted(data, log=tried.append)
    value = evaluate(model, data.split, "validation", resamples=2).mean("NDCG@10")
    assert value == pytest.approx(max(record["NDCG@10"] for record in tried)), "also where a target was seen"
    pairs = slow_pairs(data.split.training(), items, CONFIG)
    rows = slow_rows(data.catalogue.features["text"].numpy(), present)
    histories = data.split.histories("test")
    for weights in (model.weights, {ITEM_PAIRS: 1.0, "text": 0.3}, {ITEM_PAIRS: 0.0, "text": 2.0}):
        expected = np.zeros((len(histories), items))
        for user, history in enumerate(histories):
            for age, item in enumerate(history[::-1]):
                if age < 10:
                    expected[user] += weights[ITEM_PAIRS] * 0.8**age * pairs[item]
                if age < 8:
                    expected[user] += weights["text"] * 0.7**age * (rows @ rows[item])
        model.weights = weights
        found = model.score(histories)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_whitened_features_have_the_identity_as_covariance_on_their_range(rank):
    """Features of 6 numbers in a space of `rank` dimensions, far from 0, with variances from 1 to 10,000."""
    rng = torch.Generator().manual_seed(rank)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=rng))[0][:rank].double()
    spread = torch.logspace(0, 2, rank, dtype=torch.float64)
    features = torch.randn(200_000, rank, generator=rng).double() * spread @ basis + 50
    present = torch.rand(200_000, generator=rng) < 0.9
    features[~present] = 1e6  # must not be read
    fit = Whitening.fit(features, present)
    white = (features[present] - fit.mean) @ fit.matrix
    covariance = white.T @ white / len(white)
    torch.testing.assert_close(covariance, basis.T @ basis, atol=0.06, rtol=0)  # the ridge, and nothing else:
    variances = torch.linalg.eigvalsh(torch.cov(features[present].T, correction=0))[-rank:]
    expected = variances / (variances + variances.sum() / len(white))
    torch.testing.assert_close(torch.linalg.eigvalsh(covariance)[-rank:].sort()[0], expected.sort()[0])


def test_few_items_keep_their_likeness():
    """Whitened to the end, five items with many features would all be equally far from each other."""
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(5, 40, generator=rng)
    features[1] = features[0] + 0.2 * torch.randn(40, generator=rng)
    present = torch.ones(5, dtype=torch.bool)
    rows = Whitening.fit(features, present)(features, present)
    likeness = rows @ rows.T
    assert likeness[0, 1] > 0.3 > likeness[0, 2:].max() + 0.2


@pytest.mark.parametrize("count", [0, 1, 3])
def test_features_that_tell_nothing_apart_are_zeros(count):
    """Nobody has them, one item has them, or all have the same."""
    present = torch.arange(6) < count
    rows = Whitening.fit(torch.full((6, 4), 7.3), present)(torch.full((6, 4), 7.3), present)
    assert torch.equal(rows, torch.zeros(6, 4))


def test_items_without_features_get_nothing_from_contents_and_give_nothing():
    features = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    present = torch.arange(12) != 5
    data = made([[0, 1, 2, 3], [5, 6, 7, 8], [9, 10, 11, 4]], 12, features, present)
    scores = fitted(data).part("text", [[5], [1], [1, 5]])
    assert torch.equal(scores[0], torch.zeros(12)) and torch.equal(scores[:, 5], torch.zeros(3))
    torch.testing.assert_close(scores[2], 0.7 * scores[1])


def test_small_worlds():
    """One item alone; items that never occur; users with one event; an empty history; no modality."""
    one = fitted(made([[0, 0, 0], [0]], 1, torch.ones(1, 2)))
    assert one.score([[0], []]).shape == (2, 1)
    data = made([[0, 1, 2, 3], [4], [2]], 9)
    model = fitted(data)
    scores = model.score([[0], [4], [], [8]])
    assert scores[0].argmax() == 1 and not scores[1:].any(), "nobody had 4 or 8 beside another item"
    assert model.weights == {ITEM_PAIRS: 1.0} and model.score([]).shape == (0, 9)
    with pytest.raises(SpeederError, match="no user has a validation item"):
        fitted(made([[0, 1], [2]], 3))
    with pytest.raises(SpeederError, match="modalities: expected some of text, got 'sound'"):
        fit_neighbours(data.split, made([[0]], 1, torch.ones(1, 2)).catalogue, ["sound"])


def test_what_is_no_item_is_refused():
    model = fitted(made([[0, 1, 2]], 3))
    for history in ([1.0], [True], "1"):
        with pytest.raises(TypeError, match="histories"):
            model.score([history])
    for history in ([3], [-1]):
        with pytest.raises(IndexError, match=r"histories: expected items in 0\.\.2"):
            model.score([history])
    with pytest.raises(IndexError, match=r"training_sequences: expected items in 0\.\.2"):
        count_pairs([[0, 3]], 3, CONFIG)
    with pytest.raises(ValueError, match="weights: expected one for each of"):
        Neighbours(
            CONFIG, model.pairs, {}, {"text": 1.0}, training_hash="", features_hashes={}, split_hash=""
        )
    fit = Whitening.fit(torch.ones(2, 2), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="text: expected 3 rows, got 2"):
        Neighbours(
            CONFIG,
            model.pairs,
            {"text": Content(fit, torch.ones(2, 2))},
            {ITEM_PAIRS: 1.0, "text": 1.0},
            training_hash="",
            features_hashes={},
            split_hash="",
        )


def content_world() -> PreparedData:
    """Users who stay with one of 100 kinds of items. No item occurs twice, so pairs tell nothing."""
    rng = np.random.default_rng(3)
    sequences = [start + rng.permutation(6) for start in range(0, 600, 6)]
    features = np.repeat(rng.normal(size=(100, 16)), 6, axis=0) + 0.1 * rng.normal(size=(600, 16))
    return made(sequences, 600, torch.from_numpy(features))


def pairs_world() -> PreparedData:
    """Each item is followed by the next modulo 120. Features are noise."""
    rng = np.random.default_rng(4)
    sequences = [(start + np.arange(7)) % 120 for start in rng.integers(0, 120, 400)]
    return made(sequences, 120, torch.from_numpy(rng.normal(size=(120, 16))))


def test_weights_follow_the_validation_items():
    """Where only contents tell, they count; where only pairs do, contents do not."""
    data, pairs = content_world(), fitted(pairs_world())
    contents = fitted(data)
    assert contents.weights["text"] > 0
    assert pairs.weights == {ITEM_PAIRS: 1.0, "text": 0.0}
    assert evaluate(pairs, pairs_world().split, resamples=5).mean("HR@1") == 1
    assert evaluate(contents, data.split, resamples=5).mean("HR@10") > 0.9
    contents.weights = {ITEM_PAIRS: 1.0, "text": 0.0}
    assert evaluate(contents, data.split, resamples=5).mean("HR@10") < 0.1


def misleading_world() -> PreparedData:
    """40 kinds of 3 items that each have a twin. The next item is the last one's twin, which is with nothing of the
    history in training; the other twins are."""
    rng, sequences = np.random.default_rng(5), []
    for kind in range(0, 240, 6):
        sequences += [
            kind + np.array(items) for items in ([0, 2, 4, 5, 1], [1, 3, 4, 5, 0]) for _ in range(3)
        ]
    kinds = np.repeat(rng.normal(size=(40, 16)), 6, axis=0)
    twins = np.repeat(rng.normal(size=(120, 16)), 2, axis=0)
    return made(sequences, 240, torch.from_numpy(kinds + 0.25 * twins + 0.01 * rng.normal(size=(240, 16))))


def test_pairs_that_mislead_are_left_out():
    model = fitted(misleading_world())
    assert model.weights[ITEM_PAIRS] == 0.0 and model.weights["text"] > 0


def test_the_validation_items_alone_choose(monkeypatch):
    """The weights are the best by validation, whatever the test items are."""
    data = misleading_world()
    tried = []
    model = fitted(data, log=tried.append)
    best = max(tried, key=lambda record: record["NDCG@10"])
    assert best["weights"] == model.weights and len(tried) == 9
    value = evaluate(model, data.split, "validation", resamples=5).mean("NDCG@10")
    assert value == pytest.approx(best["NDCG@10"], abs=1e-9), "the ranks of the evaluator"
    for record in tried:
        model.weights = record["weights"]
        again = evaluate(model, data.split, "validation", resamples=5).mean("NDCG@10")
        assert again == pytest.approx(record["NDCG@10"], abs=1e-9)
    targets = data.split.targets
    monkeypatch.setattr(
        type(data.split),
        "targets",
        lambda self, name: pytest.fail("read") if name == "test" else targets(name),
    )
    monkeypatch.setattr(type(data.split), "hash", lambda self: "")
    assert fitted(data).weights == best["weights"]


@pytest.mark.exact
def test_saved_and_loaded_it_gives_the_same_bits(tmp_path):
    data = synthetic_world(num_users=60, history=8)
    model = fitted(data)
    assert set(model.contents) == {"text", "image"}, "collaborative features are of interactions"
    model.save(tmp_path / "model")
    assert {file.name for file in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
    loaded = load_model(tmp_path / "model")
    histories = data.split.histories("test")
    assert torch.equal(loaded.score(histories), model.score(histories)) and fits(loaded, data)
    again = fitted(data)
    again.save(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


@pytest.mark.parametrize("damage", ["cut", "other", "config", "gone"])
def test_damaged_files_are_refused(tmp_path, damage):
    fitted(made([[0, 1, 2, 3]], 4)).save(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "other":
        fitted(made([[1, 0, 2, 3]], 4)).save(tmp_path / "other")
        (tmp_path / "other" / "model.safetensors").rename(weights)
    elif damage == "config":
        content = json.loads(config.read_text())
        config.write_text(json.dumps(content | {"num_items": 5}))
    else:
        weights.unlink()
    with pytest.raises(SpeederError, match="not saved neighbours"):
        load_model(tmp_path)


def test_what_was_fitted_on_other_data_is_refused():
    data, other = (synthetic_world(num_users=40, history=8, seed=seed) for seed in (0, 1))
    model = fitted(data)
    assert model.training_hash == training_hash(data.split.training())
    with pytest.raises(LeakError, match="Neighbours: fitted on interactions"):
        evaluate(model, other.split)
    features = data.catalogue.features["text"].flip(0)
    changed = data.with_features("text", features, made_by="test", training_hash=None)
    assert fits(model, data) and not fits(model, changed) and not fits(model, other)
    with pytest.raises(LeakError, match="Neighbours: its text features differ"):
        Measure(changed)(model)
    hashed = training_hash(data.split.training())
    fitted_on_them = data.with_features("text", features, made_by="test", training_hash=hashed)
    assert content_modalities(fitted_on_them) == ["image"]


def test_the_run_folder_keeps_it_until_the_data_change(tmp_path, monkeypatch):
    data, fit = synthetic_world(num_users=40, history=8), []
    monkeypatch.setattr(
        "speeder.studies.evaluate_run.fit_neighbours",
        lambda *given: fit.append(1) or fit_neighbours(*given),
    )
    rows = [baselines(tmp_path, Measure(data), with_sasrec=False) for _ in range(2)]
    assert len(fit) == 1 and [list(row) for row in rows] == [["popularity", "neighbours"]] * 2
    features = torch.randn(len(data.catalogue), 3, generator=torch.Generator().manual_seed(2))
    changed = data.with_features("text", features, made_by="test", training_hash=None)
    newer = baselines(tmp_path, Measure(changed), with_sasrec=False)
    assert len(fit) == 2
    model = fitted(changed)
    found = evaluate(model, changed.split).ranks["masked"]
    np.testing.assert_array_equal(newer["neighbours"].ranks["masked"], found)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("neighbours")
    synthetic_world(num_users=40, history=8).save(place / "data")
    command = ["train", "--data", place / "data", "--recipe", "neighbours", "--out", place / "run"]
    assert main(list(map(str, command))) == 0
    return place / "run"


def test_a_recommender_of_its_own(run, capsys, caplog):
    """Trained, resumed, evaluated by every protocol, reported and compared as any other; `recommend` refuses it."""
    model, data = load_model(run / "model"), PreparedData.load(run.parent / "data")
    assert isinstance(model, Neighbours) and fits(model, data)
    log = stage_logs(run)["neighbours"]
    assert [entry["step"] for entry in log] == list(range(1, len(log) + 1))
    assert max(log, key=lambda entry: entry["eval_NDCG@10"])["weights"] == model.weights
    baselines(run, Measure(data), with_neighbours=False, with_sasrec=False)
    # fitting SASRec takes seconds; it stands in the tables of other tests
    for protocol, column in (("full", "NDCG@10"), ("vhr", "VHR@1"), ("sampled", "AUC")):
        assert main(["evaluate", str(run), "--protocol", protocol, "--no-baselines"]) == 0
        table = capsys.readouterr().out
        assert "\nneighbours" in table and column in table
    popularity = run / "evaluations" / "test" / "popularity.json"
    with caplog.at_level(logging.WARNING):
        assert main(["compare", str(run), str(popularity)]) == 0
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "window_decay" in page and "neighbours" in page
    capsys.readouterr()
    for command in (["recommend", str(run), "--history", "item-1"], ["index", str(run)], ["serve", str(run)]):
        assert main(command) == 1
        assert "got Neighbours" in capsys.readouterr().err, command
    assert main(["train", "--out", str(run), "--resume"]) == 0
    with pytest.raises(SpeederError, match="holds a finished run"):
        train_neighbours(load_recipe("neighbours"), data, run)


def test_recipes():
    recipe = load_recipe("neighbours")
    assert isinstance(recipe, NeighboursRecipe) and recipe.config == CONFIG
    assert recipe_from_dict(recipe.to_dict()) == recipe == NeighboursRecipe()
    for wrong, message in (
        ({"neighbours": {"window": 0}}, "neighbours: window: expected at least 1, got 0"),
        ({"neighbours": {"pair_decay": 1.5}}, "pair_decay: expected at most 1, got 1.5"),
        ({"neighbours": {"seed": 1}}, "neighbours: unknown key 'seed'"),
        ({"stages": []}, "unknown key 'stages'"),
    ):
        with pytest.raises(SpeederError, match=message):
            recipe_from_dict({"baseline": "neighbours", **wrong})


def test_new_items_have_contents_and_no_pairs():
    """Scores of old items stay to the bit; a twin of an item gets its content's part and nothing of its pairs."""
    data = synthetic_world(num_users=60, history=8)
    model, catalogue = fitted(data), data.catalogue
    names = list(catalogue.features)
    twins = ItemCatalogue(
        [f"twin {i}" for i in catalogue.ids[:5]],
        features={name: catalogue.features[name][:5] for name in names},
        present={name: catalogue.present[name][:5] for name in names},
    )
    more, count = model.with_items(catalogue.concat(twins)), len(catalogue)
    assert more.num_items == count + 5
    histories = [[1, 2, 3], [0], [4, 4, 9]]
    torch.testing.assert_close(more.score(histories)[:, :count], model.score(histories))
    assert not more.part(ITEM_PAIRS, histories)[:, count:].any()
    for name in model.contents:
        content = more.part(name, histories)
        torch.testing.assert_close(content[:, count:], content[:, :5])
    assert more.score([[count]]).isfinite().all(), "a new item can be in a history"
    with pytest.raises(ValueError, match="catalogue: expected at least"):
        model.with_items(twins)
