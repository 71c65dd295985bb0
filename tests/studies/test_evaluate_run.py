"""`speeder evaluate` on a run folder: what it keeps there, what it believes of it, and data that moved or changed."""

import json
import logging
import shutil

import pytest
import torch

from speeder.baselines.sasrec.model import SASRec
from speeder.cli.main import main
from speeder.data import ItemCatalogue, PreparedData
from speeder.data.fingerprints import training_hash
from speeder.errors import SpeederError
from speeder.evaluation.candidates import Candidates
from speeder.evaluation.evaluate import evaluate_titles
from speeder.evaluation.leaks import LeakError
from speeder.io.files import write_json
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.sasrec import SASRecConfig
from speeder.studies.evaluate_run import Measure, baselines, evaluate_once, kept_evaluation, measure_for


def tiny_sasrec(data):
    """A SASRec that learned nothing: beside it, `speeder evaluate` fits no other one."""
    model = SASRec(len(data.catalogue), SASRecConfig(hidden_size=8, heads=1, layers=1))
    model.training_hash = training_hash(data.split.training())
    return model


@pytest.fixture
def run(tmp_path):
    world = synthetic_world(num_users=40, history=8)
    world.save(tmp_path / "data")
    tiny_sasrec(world).save(tmp_path / "run" / "model")
    where = {"data": str(tmp_path / "data"), "split": world.split.hash()}
    write_json(tmp_path / "run" / "recipe.json", where)
    return tmp_path / "run"


def grown(data):
    """The same interactions over a catalogue of one item more."""
    items = data.catalogue
    more = ItemCatalogue([*items.ids, "new"], [*items.titles, "New"])
    data = PreparedData(more, data.interactions)
    return data.with_features("text", torch.ones(len(more), 3), made_by="hand", training_hash=None)


def one_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if "evaluate (" not in line]  # the bar
    assert len(lines) == 1 and lines[0].startswith("speeder: "), lines
    return lines[0]


def test_a_damaged_evaluation_is_measured_again(run, caplog, capsys):
    assert main(["evaluate", str(run)]) == 0
    table, file = capsys.readouterr().out, run / "evaluations" / "test" / "popularity.json"
    assert "\npopularity" in table
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING, "speeder.studies.evaluate_run"):
        assert main(["evaluate", str(run)]) == 0
    assert capsys.readouterr().out == table and file.read_bytes() == whole
    assert "evaluating again" in caplog.text


def test_a_finished_stage_is_not_measured_by_another_model(run):
    """Without `mend` a damaged file is told: the model at hand may not be the one that the name stands for."""
    data = PreparedData.load(run.parent / "data")
    place = run / "evaluations" / "test" / "stage.json"
    place.parent.mkdir(parents=True)
    place.write_text("{")
    with pytest.raises(SpeederError, match="not a readable evaluation"):
        evaluate_once(run, "stage", tiny_sasrec(data), Measure(data))


def test_a_catalogue_that_grew_is_measured_anew(run, monkeypatch, capsys):
    data = PreparedData.load(run.parent / "data")
    larger = grown(data)
    assert larger.split.hash() == data.split.hash()
    monkeypatch.setattr(
        "speeder.training.sequential.fit_sequential",
        lambda kind, training, num_items, *_, **__: fits.append(num_items) or kinds[num_items],
    )
    kinds = {len(each.catalogue): tiny_sasrec(each) for each in (data, larger)}
    fits = []
    for each in (data, data, larger, larger):
        rows = baselines(run, Measure(each))
        assert {row.num_items for row in rows.values()} == {len(each.catalogue)}
    assert fits == [len(data.catalogue), len(larger.catalogue)]

    larger.save(run.parent / "data")  # what the run's model ranks is no longer the whole catalogue
    assert main(["evaluate", str(run)]) == 1
    assert "evaluate: evaluations: num_items of 'popularity' is 49" in one_line(capsys)


@pytest.mark.parametrize("protocol", ["vhr", "sampled"])
def test_candidates_of_a_few_items_are_refused(run, protocol, capsys):
    data = PreparedData.load(run.parent / "data")
    count = {"vhr": 19, "sampled": 20}[protocol]
    few = Candidates.draw(data.split, "test", 40, count)
    few.save(run / "candidates" / f"test-{count}-seed0.json")
    with pytest.raises(LeakError, match="drawn over 40 items, but the catalogue has 48"):
        measure_for(run, data, protocol=protocol)
    with pytest.raises(LeakError, match="drawn over 40 items, the catalogue has 48"):
        Measure(data, "test", protocol, few)(tiny_sasrec(data))
    with pytest.raises(LeakError, match="drawn over 40 items, the catalogue has 48"):
        evaluate_titles(None, data.split, few, data.catalogue.titles)
    assert main(["evaluate", str(run), "--protocol", protocol]) == 1
    assert "drawn over 40 items, but the catalogue has 48" in one_line(capsys)


def test_features_that_leak_stop_the_evaluation(run, capsys):
    data = PreparedData.load(run.parent / "data")
    catalogue = data.catalogue.with_features("text", torch.ones(len(data.catalogue), 3))
    PreparedData(catalogue, data.interactions, data.manifest).save(run.parent / "data")
    assert main(["evaluate", str(run)]) == 1
    assert "text features: not those of their record" in one_line(capsys)


def test_interactions_out_of_order_stop_the_evaluation(run):
    data = PreparedData.load(run.parent / "data")
    data.interactions.time = data.interactions.time[::-1].copy()
    with pytest.raises(LeakError, match="order of time"):
        Measure(data)


def test_data_that_moved(run, capsys):
    moved = run.parent / "elsewhere"
    shutil.move(run.parent / "data", moved)
    assert main(["evaluate", str(run)]) == 1
    assert "use evaluate --data DIR" in one_line(capsys)
    assert main(["evaluate", str(run), "--data", str(moved)]) == 0
    assert "\npopularity" in capsys.readouterr().out
    synthetic_world(num_users=40, history=8, seed=1).save(run.parent / "other")
    assert main(["evaluate", str(run), "--data", str(run.parent / "other")]) == 1
    assert "other: the data have changed since" in one_line(capsys)


def test_choices_that_a_protocol_would_ignore_are_refused(run, capsys):
    for choice in (["--negatives", "7"], ["--candidates-seed", "7"]):
        assert main(["evaluate", str(run), *choice]) == 1
        assert "the protocol 'full'" in one_line(capsys)


def test_a_model_without_a_record_is_named_in_the_results(run, capsys):
    data = PreparedData.load(run.parent / "data")
    SASRec(len(data.catalogue), SASRecConfig(hidden_size=8, heads=1, layers=1)).save(run / "model")
    assert main(["evaluate", str(run)]) == 0
    assert "Fitted on: unknown for SASRec" in capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert {name: row["fitted_on"] for name, row in results.items()} == {
        "popularity": "the split's training part",
        "neighbours": "the split's training part",
        SASRec.label: "not told",
    }


def test_a_stage_whose_model_is_gone_is_not_measured_by_another(run):
    data = PreparedData.load(run.parent / "data")
    measure = Measure(data)
    with pytest.raises(SpeederError, match="'after text' was not kept"):
        kept_evaluation(run, "after text", measure)
    kept = evaluate_once(run, "after text", tiny_sasrec(data), measure)
    assert kept_evaluation(run, "after text", measure).task == kept.task
    with pytest.raises(SpeederError, match="other data or another protocol"):
        kept_evaluation(run, "after text", Measure(grown(data)))
