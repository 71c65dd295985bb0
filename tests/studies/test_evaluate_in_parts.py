"""Ranks computed in parts are those of one process, whatever the protocol, and an interruption costs one part."""

import shutil

import numpy as np
import pytest

from speeder.cli.main import main
from speeder.evaluation.candidates import Candidates
from speeder.evaluation.cold_ranking import evaluate_cold, with_cold_items
from speeder.evaluation.cold_split import hold_out
from speeder.evaluation.evaluate import evaluate, evaluate_titles
from speeder.evaluation.users import Users
from speeder.io.parts import here
from speeder.studies.evaluate_in_parts import AskedInParts, table_users, users_hash, users_table
from tests.io.small_run import USERS, Writer, asked, evaluated, load_writer, save_run, save_world


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    data = save_world(folder)
    model = save_run(folder / "run", data, folder / "data")
    return folder, data, model


def counted(computed):
    """The runner of this process, which notes what it computes."""

    def run(make, parts, missing):
        for part in here(make, parts, missing):
            computed.append(part)
            yield part

    return run


@pytest.mark.exact
@pytest.mark.parametrize("protocol", ["full", "vhr", "sampled"])
def test_every_protocol_gives_the_same_files(place, tmp_path, protocol):
    folder, data, model = place
    whole, parted, computed = tmp_path / "whole", tmp_path / "parted", []
    for run in (whole, parted):
        shutil.copytree(folder / "run", run)
    expected = evaluated(whole, model, data, protocol)
    found = evaluated(
        parted, model, data, protocol, ask_for=asked(parted, folder / "data", counted(computed))
    )
    assert found == expected and set(found) == {
        "bsarec.json",
        "model.json",
        "neighbours.json",
        "popularity.json",
        "sasrec__cross-entropy_.json",
    }
    assert computed == 5 * [0, 1, 2]


def test_the_command(place, tmp_path, monkeypatch, capsys):
    folder, _, _ = place
    asked_for, computed = [], []

    def on_ray(address, workers):
        asked_for.append((address, workers))
        return counted(computed)

    monkeypatch.setattr("speeder.io.ray.OnRay", on_ray)
    for run in ("one", "parts"):
        shutil.copytree(folder / "run", tmp_path / run)
    assert main(["evaluate", str(tmp_path / "one")]) == 0
    table = capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "parts"), "--ray", "--ray-workers", "2"]) == 0
    assert capsys.readouterr().out == table.replace(str(tmp_path / "one"), str(tmp_path / "parts"))
    assert "\nSpeeder" in table and "\npopularity" in table
    assert asked_for == [(None, 2)] and computed == [0, 0, 0, 0]  # 560 users are one part of 1,024


@pytest.mark.exact
def test_cold_items(place, tmp_path):
    _, data, _ = place
    warm, cold = hold_out(data, 0.2)
    cold.save(tmp_path / "held", warm)
    model = save_run(tmp_path / "run", warm, tmp_path / "held" / "warm")
    computed = []
    ask = asked(tmp_path / "run", tmp_path / "held" / "warm", counted(computed), cold=True)
    file = tmp_path / "run" / "evaluations" / "test-cold-items" / "model.json"
    found = evaluate_cold(model, cold, warm, resamples=5, ask=ask(file, model))  # the workers add the items
    expected = evaluate_cold(with_cold_items(model, cold, warm), cold, warm, resamples=5)
    assert {name: each.to_dict() for name, each in found.items()} == {
        name: each.to_dict() for name, each in expected.items()
    }
    assert computed == list(range(-(-len(cold.users) // 256)))


def test_titles(place, tmp_path):
    _, data, _ = place
    titles, draw = data.catalogue.titles, Candidates.draw(data.split, "test", len(data.catalogue), 19)
    expected = evaluate_titles(Writer(titles), data.split, draw, titles, resamples=5)
    ask = AskedInParts(load_writer(titles), tmp_path / "parts", {"writer": 1}, here, part_users=256)
    found = evaluate_titles(Writer(titles), data.split, draw, titles, resamples=5, ask=ask)
    assert found.to_dict() == expected.to_dict()
    assert 0 < expected.valid.sum() < USERS


def test_an_interrupted_evaluation_goes_on(place, tmp_path):
    folder, data, model = place

    def interrupted(make, parts, missing):
        yield next(here(make, parts, missing))
        raise KeyboardInterrupt

    file = tmp_path / "run" / "evaluations" / "test" / "model.json"
    shutil.copytree(folder / "run", tmp_path / "run")
    computed = []
    with pytest.raises(KeyboardInterrupt):
        ask = asked(tmp_path / "run", folder / "data", interrupted)
        evaluate(model, data.split, ask=ask(file, model))
    ask = asked(tmp_path / "run", folder / "data", counted(computed))
    found = evaluate(model, data.split, resamples=5, ask=ask(file, model))
    assert computed == [1, 2]
    assert found.to_dict() == evaluate(model, data.split, resamples=5).to_dict()
    assert not list(file.parent.iterdir()), "the parts are gone"


def test_other_users_or_another_model_begin_anew(place, tmp_path):
    """A part of the validation's users is never taken for one of the test's."""
    folder, data, model = place
    file, started = tmp_path / "run" / "model.json", []

    def interrupted(make, parts, missing):
        started.append(list(missing))
        yield next(here(make, parts, missing))
        raise KeyboardInterrupt

    shutil.copytree(folder / "run", tmp_path / "run")
    for name in ("test", "validation", "validation"):
        with pytest.raises(KeyboardInterrupt):
            ask = asked(tmp_path / "run", folder / "data", interrupted)
            evaluate(model, data.split, name, ask=ask(file, model))
    (tmp_path / "run" / "model" / "more.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        ask = asked(tmp_path / "run", folder / "data", interrupted)
        evaluate(model, data.split, "validation", ask=ask(file, model))
    assert started == [[0, 1, 2], [0, 1, 2], [1, 2], [0, 1, 2]]


@pytest.mark.parametrize("listed", [None, np.array([[4, 5], [6, 7], [8, 9]])])
def test_users_as_a_table(listed):
    users = Users(
        [np.array([1, 2]), np.array([3]), np.array([], dtype=np.int64)], np.array([9, 8, 7]), listed
    )
    again = table_users(users_table(users).slice(1))
    assert [row.tolist() for row in again.histories] == [[3], []] and again.targets.tolist() == [8, 7]
    assert listed is None or again.listed.tolist() == listed[1:].tolist()
    assert users_hash(again) == users_hash(users.part(slice(1, 3))) != users_hash(users)
