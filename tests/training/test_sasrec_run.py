"""SASRec by recipe: killed at any epoch it goes on to the same end, and its run is evaluated like any other."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from speeder.baselines.bsarec.model import BSARec
from speeder.baselines.sasrec.model import SASRec
from speeder.baselines.sequential.checkpoint import FitState, save_checkpoint
from speeder.baselines.sequential.fit import fit_sequential
from speeder.cli.main import main
from speeder.data import PreparedData
from speeder.errors import SpeederError
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.bsarec import BSARecConfig, BSARecRecipe
from speeder.recipes.load import (
    bsarec_settings_for,
    bundled_recipe,
    load_recipe,
    recipe_from_dict,
    settings_for,
)
from speeder.recipes.sasrec import SASRecConfig, SASRecRecipe
from speeder.training.run_folder import stage_logs
from tests.io.killing import killed_at

ROWS = ("popularity", "neighbours", "SASRec (cross-entropy)", "Speeder")
SETTINGS = {"hidden_size": 16, "max_length": 8, "dropout": 0.2, "batch_size": 16, "epochs": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    world = synthetic_world(num_users=60, history=8)
    place = tmp_path_factory.mktemp("sasrec")
    PreparedData(world.catalogue, world.interactions, world.manifest).save(place / "data")
    recipe = {"baseline": "sasrec", "seed": 3, "sasrec": SETTINGS}
    (place / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return place


@pytest.fixture(scope="module")
def data(folder) -> PreparedData:
    return PreparedData.load(folder / "data")


@pytest.fixture(scope="module")
def uninterrupted(folder) -> Path:
    """By the command, in a process of its own as those that are killed: in another, sums may go by other threads."""
    command = [sys.executable, "-m", "speeder.cli", "train", "--out", str(folder / "whole")]
    subprocess.run(
        [*command, "--data", str(folder / "data"), "--recipe", str(folder / "recipe.yaml")], check=True
    )
    return folder / "whole"


def test_a_run_is_evaluated_compared_and_refused_as_any_other(folder, uninterrupted, capsys):
    assert main(["evaluate", str(uninterrupted)]) == 0
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row in ROWS] == ["popularity", "neighbours", "SASRec (cross-entropy)"]
    assert main(["evaluate", str(uninterrupted), "--protocol", "sampled"]) == 0
    assert "AUC" in capsys.readouterr().out
    popularity = uninterrupted / "evaluations" / "test" / "popularity.json"
    assert main(["compare", str(uninterrupted), str(popularity)]) == 0
    capsys.readouterr()
    assert main(["recommend", str(uninterrupted), "--history", "item-1"]) == 1
    assert "expected a run of a language model, got SASRec" in capsys.readouterr().err
    again = ["train", "--data", str(folder / "data"), "--recipe", str(folder / "recipe.yaml")]
    assert main([*again, "--out", str(uninterrupted)]) == 1
    assert "holds a finished run" in capsys.readouterr().err
    assert main(["demo", "--out", str(folder / "demo"), "--recipe", str(folder / "recipe.yaml")]) == 1


def test_its_log_shows_every_epoch(uninterrupted):
    entries = stage_logs(uninterrupted)["sasrec"]
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    assert entries[-1]["loss"] < entries[0]["loss"] and "eval_NDCG@10" in entries[-1]
    assert not list(uninterrupted.glob("**/checkpoint*"))


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_weights(folder, uninterrupted):
    """Killed for good after its first epoch, then asked to resume from the command line."""
    run = folder / "killed"
    command = [sys.executable, "-m", "speeder.cli", "train", "--out", str(run)]
    begin = [*command, "--data", str(folder / "data"), "--recipe", str(folder / "recipe.yaml")]
    process = subprocess.Popen(begin)
    checkpoint = run / "stages" / "01-sasrec" / "checkpoint.safetensors"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and checkpoint.exists()
    assert subprocess.run([*command, "--resume"]).returncode == 0
    ended, whole = SASRec.load(run / "model"), SASRec.load(uninterrupted / "model")
    for name, weight in whole.state_dict().items():
        assert torch.equal(ended.state_dict()[name], weight), name
    assert stage_logs(run) == stage_logs(uninterrupted)
    assert not list(run.rglob(".*")), "nothing half written is left"


def test_what_a_kill_leaves_of_a_checkpoint_goes_with_the_next_one(tmp_path):
    """Such as a whole one beside its place, for every kill of a process that saves after each epoch."""
    model, folder = SASRec(5, SASRecConfig(**SETTINGS)), tmp_path / "stage"
    optimizer, path = torch.optim.Adam(model.parameters()), folder / "checkpoint.safetensors"

    def save() -> None:
        save_checkpoint(path, model, optimizer, None, FitState(), np.random.default_rng(0), "this one")

    sizes, touch = [], 0
    while killed_at(touch, save):
        sizes.append(sum(file.stat().st_size for file in folder.glob(".*")))
        touch += 1
        save()
        assert [file.name for file in folder.iterdir()] == [path.name]
    assert max(sizes) == path.stat().st_size


@pytest.mark.exact
@pytest.mark.parametrize(("kind", "stop_after"), [(SASRec, 1), (SASRec, 3), (SASRec, 5), (BSARec, 2)])
def test_stopped_after_any_epoch_it_ends_the_same(data, tmp_path, kind, stop_after):
    class Stop(Exception):
        pass

    def fit(log=None, checkpoint=None, **changes):
        config = kind.config_class(**SETTINGS | changes)
        validation = (data.split.histories("validation"), data.split.targets("validation"))
        sequences, items = data.split.training(), len(data.catalogue)
        return fit_sequential(
            kind, sequences, items, config, validation=validation, log=log, checkpoint=checkpoint, seed=5
        )

    records, count, path = [], itertools.count(1), tmp_path / "checkpoint"
    whole = fit(records.append)

    def stop(record: dict) -> None:
        if next(count) == stop_after:
            raise Stop

    with pytest.raises(Stop):
        fit(stop, path)
    again = []
    resumed = fit(again.append, path)
    assert again == records
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    with pytest.raises(SpeederError, match="of another training"):
        fit(None, path, dropout=0.3)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SpeederError, match="not a checkpoint"):
        fit(None, path)


def test_bundled_recipes_are_whole_and_suit_their_data():
    for name in ("sasrec-ml-100k", "sasrec-ml-100k-long", "sasrec-beauty"):
        recipe = load_recipe(bundled_recipe(name))
        assert isinstance(recipe, SASRecRecipe) and recipe_from_dict(recipe.to_dict()) == recipe
    assert load_recipe(bundled_recipe("sasrec-ml-100k")).config == SASRecConfig()
    assert settings_for([[1, 2, 3]] * 9) == load_recipe(bundled_recipe("sasrec-beauty")).config
    for name in ("bsarec-ml-100k", "bsarec"):
        recipe = load_recipe(bundled_recipe(name))
        assert isinstance(recipe, BSARecRecipe) and recipe_from_dict(recipe.to_dict()) == recipe
    assert load_recipe(bundled_recipe("bsarec")).config == BSARecConfig()
    assert bsarec_settings_for([[1, 2, 3]] * 9) == BSARecConfig()
    assert bsarec_settings_for([range(50)] * 9) == load_recipe(bundled_recipe("bsarec-ml-100k")).config


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"baseline": "bsarec", "bsarec": {"beta": 2}}, "bsarec: unknown key 'beta'; known: hidden_size"),
        ({"baseline": "bsarec", "bsarec": {"c": 51}}, "bsarec: c: expected at most max_length=50, got 51"),
        ({"baseline": "bsarec", "sasrec": {}}, "recipe: unknown key 'sasrec'"),
        ({"sasrec": {"floors": 2}}, "sasrec: unknown key 'floors'"),
        ({"sasrec": {"heads": 3}}, "hidden_size: expected a multiple of heads=3, got 64"),
        ({"sasrec": {"dropout": "much"}}, "dropout: expected a number, got 'much'"),
        ({"sasrec": {"epochs": 0}}, "recipe: sasrec: epochs: expected at least 1, got 0"),
        ({"sasrec": {"epochs": 2.5}}, "epochs: expected a whole number, got 2.5"),
        ({"stages": []}, "unknown key 'stages'"),
        ({"seed": "one"}, "seed: expected a whole number, got 'one'"),
    ],
)
def test_wrong_recipes_are_refused_by_name(recipe, message):
    with pytest.raises(SpeederError, match=message):
        recipe_from_dict({"baseline": "sasrec", **recipe})
