"""The whole way over a temporal split: train, evaluate beside the baselines, compare, report, hold items out."""

import json

import numpy as np
import pytest

from speeder.baselines.sasrec.model import SASRec
from speeder.cli.main import main
from speeder.data import Interactions, PreparedData
from speeder.data.describe import describe
from speeder.data.fingerprints import training_hash
from speeder.data.temporal_split import DATES, TemporalSplit
from speeder.evaluation.cold_ranking import check_cold_items
from speeder.evaluation.cold_split import hold_out
from speeder.evaluation.evaluate import evaluate
from speeder.evaluation.leaks import LeakError
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.sasrec import SASRecConfig
from speeder.training.sequential import fit_on_split
from tests.model.worlds import save_tiny_backbone

RECIPE = """
backbone: {backbone}
precision: fp32
model: {{item_embedding: true}}
batch_users: 16
stages:
  - {{name: joint, open: [text, collaborative, item], steps: 2}}
"""


@pytest.fixture(scope="module")
def data() -> PreparedData:
    """Users who begin one after another, so that some have only one of the two targets."""
    world = synthetic_world(num_users=42, history=8)
    user = world.interactions.user
    late = Interactions(
        user, world.interactions.item, world.interactions.time + user % 7, world.interactions.user_ids
    )
    dates = {"validation_from": 8, "test_from": 10}
    return PreparedData(world.catalogue, late, {**world.manifest, DATES: dates})


@pytest.fixture(scope="module")
def place(data, tmp_path_factory):
    """The data, a run of a language model and one of neighbours; both evaluated."""
    folder = tmp_path_factory.mktemp("temporal")
    data.save(folder / "data")
    save_tiny_backbone(folder / "backbone")
    (folder / "recipe.yaml").write_text(RECIPE.format(backbone=folder / "backbone"))
    for name, recipe in (("speeder", folder / "recipe.yaml"), ("neighbours", "neighbours")):
        run = folder / name
        assert (
            main(["train", "--data", str(folder / "data"), "--recipe", str(recipe), "--out", str(run)]) == 0
        )
        sasrec = SASRec(
            len(data.catalogue), SASRecConfig(hidden_size=8, heads=1, layers=1)
        )  # fitting takes long
        sasrec.training_hash = training_hash(data.split.training())
        sasrec.save(run / "baselines" / "sasrec")
        assert main(["evaluate", str(run)]) == 0
    return folder


def test_targets_are_of_other_users_for_validation_and_test(data):
    split = data.split
    assert isinstance(split, TemporalSplit)
    only = set(split.users("test")) ^ set(split.users("validation"))
    assert only and set(split.users("test")) & set(split.users("validation"))


def test_every_baseline_and_the_model_have_a_row(place, data, capsys):
    for name in ("speeder", "neighbours"):
        rows = json.loads((place / name / "results.json").read_text())
        assert {"popularity", "neighbours", "SASRec (cross-entropy)"} <= {*rows} and len(rows) == (
            4 if name == "speeder" else 3
        )
        assert {row["num_users"] for row in rows.values()} == {len(data.split.users("test"))}
        assert {row["split_title"] for row in rows.values()} == {data.split.title}
        assert data.split.title + ", test targets" in (place / name / "results.md").read_text()
    assert main(["compare", str(place / "speeder"), str(place / "neighbours")]) == 0
    assert "neighbours" in capsys.readouterr().out
    assert main(["report", str(place / "speeder")]) == 0
    assert "Temporal split (training before" in (place / "speeder" / "report.html").read_text()


def test_candidates_and_validation_targets_work_too(place, capsys):
    for options in (["--protocol", "vhr"], ["--split", "validation"]):
        assert main(["evaluate", str(place / "neighbours"), *options]) == 0
        assert "popularity" in capsys.readouterr().out


def test_describe_tells_what_the_split_leaves_out(data):
    told = describe(data, tokenizer=None)
    training = sum(map(len, data.split.training()))
    assert data.split.title in told and f"{training} interactions" in told
    assert f"{len(data.split.users('test'))} of 24 with interactions from 1970-01-01T00:00:10Z on" in told
    assert "items unseen in training" in told


def test_sasrec_is_stopped_by_the_validation_users(data):
    model = fit_on_split(SASRec, data, SASRecConfig(hidden_size=8, heads=1, layers=1, epochs=1), None)
    result = evaluate(model, data.split)
    assert len(result) == len(data.split.users("test")) and result.split_title == data.split.title


def test_a_model_of_another_split_of_the_same_data_is_refused(data):
    left_out = PreparedData(data.catalogue, data.interactions)
    model = fit_on_split(SASRec, left_out, SASRecConfig(hidden_size=8, heads=1, layers=1, epochs=1), None)
    with pytest.raises(LeakError, match="SASRec: fitted on interactions"):
        evaluate(model, data.split)


@pytest.mark.parametrize("seed", range(3))
def test_cold_targets_are_after_all_training(data, seed):
    warm, cold = hold_out(data, 0.3, seed=seed)
    check_cold_items(cold, warm)
    assert isinstance(warm.split, TemporalSplit)
    place = {external: item for item, external in enumerate(data.catalogue.ids)}
    sequences, times = data.interactions.sequences(), data.interactions.times()
    for user, target in zip(cold.users, cold.targets, strict=True):
        item = place[cold.catalogue.ids[target]]
        assert times[user][np.flatnonzero(sequences[user] == item)[0]] >= 8
