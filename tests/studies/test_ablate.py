"""Studies: read strictly, run by seeds, resumed after a kill, and reported with compare's own tests."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from speeder.baselines.sasrec.model import SASRec
from speeder.cli.main import main
from speeder.data import PreparedData
from speeder.data.fingerprints import training_hash
from speeder.errors import SpeederError
from speeder.evaluation.compare import compare, holm
from speeder.evaluation.result import Evaluation
from speeder.io.machine import processor
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.load import bundled_recipe, recipe_from_dict
from speeder.recipes.sasrec import SASRecConfig
from speeder.recipes.schema import MODALITIES
from speeder.studies.ablation.report import Finished, markdown, slices_of, summarise
from speeder.studies.ablation.run import _recipes_for, ablate
from speeder.studies.ablation.study import differing_keys, load_study, study_from_dict
from speeder.training.dataset import occurs
from speeder.training.run_folder import stage_logs
from tests.model.worlds import save_tiny_backbone

RECIPE = {
    "precision": "fp32",
    "batch_users": 16,
    "checkpoint_steps": 2,
    "model": {"item_embedding": True, "position_proxy_weight": 0.05},
    "stages": [
        {"name": "text", "open": ["text"], "steps": 2},
        {"name": "joint", "open": ["text", "collaborative", "item"], "steps": 4},
    ],
}
STUDY = {
    "base": "recipe.yaml",
    "common": {"model": {"dropout": 0.1}, "warmup_ratio": 0.1},
    "variants": {
        "MRC": {"mean": {"tests": "no gate", "changes": {"stages.*.train": ["experts", "item", "backbone"]}}},
        "SPAE": {
            "none": {"tests": "no position", "changes": {"model": {"relative_bias": False}}},
            "rates": {"tests": "one stage's rate", "changes": {"stages.joint.learning_rate": 0.01}},
        },
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny backbone, a small prepared world, a base recipe and a study of it."""
    folder = tmp_path_factory.mktemp("ablate")
    save_tiny_backbone(folder / "backbone")
    world = synthetic_world(num_users=40, history=8)
    PreparedData(world.catalogue, world.interactions, world.manifest).save(folder / "data")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"backbone": str(folder / "backbone")}))
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return folder


@pytest.fixture(scope="module")
def data(place):
    return PreparedData.load(place / "data")


def study_folder(folder, data):
    """With a SASRec that learned nothing: beside it, none is fitted."""
    model = SASRec(len(data.catalogue), SASRecConfig(hidden_size=8, heads=1, layers=1))
    model.training_hash = training_hash(data.split.training())
    model.save(folder / "baselines" / "sasrec")
    return folder


@pytest.fixture(scope="module")
def done(place, data):
    """A finished study of two seeds: its folder, and what it said."""
    out, said = study_folder(place / "done", data), []
    ablate(load_study(place / "study.yaml"), data, out, (1, 2), say=said.append)
    return out, said


def started(said):
    """The runs that were begun, from lines such as `[1 of 8] base, seed 1: ...`."""
    return [found[1] for line in said if (found := re.match(r"\n?\[\d+ of \d+\] (.*?):", line))]


def test_runs_go_by_seeds_and_leave_ranks_without_weights(done):
    out, said = done
    names = ("base", "mean", "none", "rates")
    assert started(said) == [f"{name}, seed {seed}" for seed in (1, 2) for name in names]
    for name in names:
        for seed in (1, 2):
            run = out / name / f"seed-{seed}"
            assert (run / "evaluations" / "test" / "model.json").exists() and not (run / "model").exists()
            assert json.loads((run / "recipe.json").read_text())["recipe"]["seed"] == seed
            assert json.loads((run / "seconds.json").read_text())["seconds"] > 0
    assert {path.name for path in out.glob("ablations.*")} == {
        "ablations.json",
        "ablations.md",
        "ablations.png",
    }


def test_runs_of_a_study_share_their_precision(done, place, data, tmp_path, monkeypatch):
    """The one that the machine was faster in at first, though it may look faster in another one later."""
    study = load_study(place / "study.yaml")
    auto = {k: replace(v, recipe=replace(v.recipe, precision="auto")) for k, v in study.variants.items()}
    study, out, said = replace(study, variants=auto), study_folder(tmp_path, data), []
    monkeypatch.setattr("speeder.studies.ablation.run.resolve_precision", lambda precision: "fp32")
    ablate(study, data, out, (1,), only=["base"], say=said.append)
    monkeypatch.setattr("speeder.studies.ablation.run.resolve_precision", lambda precision: "bf16")
    text = ablate(study, data, out, (1,), only=["mean"], say=said.append)
    assert started(said) == ["base, seed 1", "mean, seed 1"]
    runs = [json.loads((out / name / "seed-1" / "recipe.json").read_text()) for name in ("base", "mean")]
    assert [run["precision"] for run in runs] == ["fp32", "fp32"]
    assert f"Trained in fp32 on {processor()}, threads: {torch.get_num_threads()}." in text
    path = out / "base" / "seed-1" / "recipe.json"
    path.write_text(json.dumps(runs[0] | {"precision": "bf16"}))
    with pytest.raises(SpeederError, match="holds runs in bf16 and in fp32"):
        ablate(study, data, out, (1,))


def test_without_pictures_the_bundled_study_still_compares_runs_of_the_same_length():
    study, said = load_study("ablations-ml-100k"), []
    data = SimpleNamespace(catalogue=SimpleNamespace(readable=["text", "collaborative", "words"]))
    recipes = _recipes_for(study, data, [], said.append)
    assert set(study.variants) - set(recipes) == {"mrc-image"}
    assert any("mrc-image is left out" in line for line in said)
    assert {sum(stage.steps for stage in recipe.stages) for recipe in recipes.values()} == {200}
    with pytest.raises(SpeederError, match=r"mrc-image: .*no stage is left"):
        _recipes_for(study, data, ["mrc-image"], said.append)


def test_what_is_finished_is_not_trained_again(done, place, data):
    out, _ = done
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/seed-*/**/*")}
    said = []
    text = ablate(load_study(place / "study.yaml"), data, out, (1, 2), say=said.append)
    assert started(said) == [] and text == (out / "ablations.md").read_text()
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/seed-*/**/*")} == before


def test_differences_are_those_of_compare(done, place):
    """One seed: the very figures of `compare`. Two: of the users' means."""
    out, _ = done
    study = load_study(place / "study.yaml")
    one, both = Finished(study), Finished(study)
    runs = {}
    for name in study.variants:
        for seed in (1, 2):
            run = Evaluation.load(out / name / f"seed-{seed}" / "evaluations" / "test" / "model.json")
            runs[name, seed] = run
            both.add(name, seed, run, {"seconds": 1.0})
            if seed == 1:
                one.add(name, seed, run, {})
    found = summarise(one, {})["variants"]
    for metric in ("HR@10", "NDCG@10"):
        for seen in ("masked", "allowed"):
            for name in ("mean", "none", "rates"):
                test = compare({name: runs[name, 1], "base": runs["base", 1]}, metric, seen)[0]
                mine = found[name]["differences"][seen][metric]
                assert [mine[key] for key in ("value", "low", "high")] == pytest.approx(test.difference)
                assert mine["p_value"] == test.p_value <= mine["adjusted"] <= min(1, 3 * test.p_value)
    found = summarise(both, {})["variants"]
    written = json.loads((out / "ablations.json").read_text())["variants"]
    for name in found:
        for part in ("metrics", "slices", "by_seed") + (("differences",) if name != "base" else ()):
            assert found[name][part] == written[name][part]
    tests = [found[name]["differences"]["masked"]["NDCG@10"] for name in ("mean", "none", "rates")]
    assert [test["adjusted"] for test in tests] == holm([test["p_value"] for test in tests])
    means = [[runs[name, seed].mean("NDCG@10") for seed in (1, 2)] for name in ("none", "base")]
    assert found["none"]["metrics"]["masked"]["NDCG@10"]["value"] == pytest.approx(np.mean(means[0]))
    assert found["none"]["metrics"]["masked"]["NDCG@10"]["deviation"] == pytest.approx(
        np.std(means[0], ddof=1)
    )
    gap = found["none"]["differences"]["masked"]["NDCG@10"]["value"]
    assert gap == pytest.approx(np.mean(means[0]) - np.mean(means[1]))


def test_a_variant_ahead_of_the_base_is_compared_over_shared_seeds(done, place):
    out, _ = done
    found = Finished(load_study(place / "study.yaml"))
    for name, seed in (("base", 1), ("none", 1), ("none", 2), ("rates", 2)):
        run = Evaluation.load(out / name / f"seed-{seed}" / "evaluations" / "test" / "model.json")
        found.add(name, seed, run, {})
    summary = summarise(found, {})
    gap = found.values("none", "NDCG@10", "masked", {1}) - found.values("base", "NDCG@10", "masked", {1})
    assert summary["variants"]["none"]["differences"]["masked"]["NDCG@10"]["value"] == pytest.approx(
        gap.mean()
    )
    assert "differences" not in summary["variants"]["rates"], "no seed is shared"
    assert "| SPAE | rates | one stage's rate | 1 | " in markdown(summary)


def test_slices_cover_every_user_once(done):
    out, _ = done
    run = Evaluation.load(out / "base" / "seed-1" / "evaluations" / "test" / "model.json")
    for members in slices_of(run).values():
        assert (np.sum(list(members.values()), axis=0) == 1).all()
    report = json.loads((out / "ablations.json").read_text())
    for entry in report["variants"].values():
        for parts in entry["slices"].values():
            weighted = sum(part["users"] * part["NDCG@10"]["value"] for part in parts.values())
            assert weighted / report["num_users"] == pytest.approx(
                entry["metrics"]["masked"]["NDCG@10"]["value"]
            )
    assert set(report["baselines"]) == {"popularity", "neighbours", SASRec.label}


def test_the_command_makes_only_what_is_asked_for(place, data, tmp_path, capsys):
    out, study = study_folder(tmp_path / "study", data), load_study(place / "study.yaml")
    options = ["--data", place / "data", "--out", out, "--seeds", "7", "--only", "rates", "--keep-models"]
    assert main(["ablate", *map(str, [place / "study.yaml", *options])]) == 0
    printed = capsys.readouterr().out
    assert started(printed.splitlines()) == ["base, seed 7", "rates, seed 7"]
    assert printed.rstrip().endswith((out / "ablations.md").read_text().rstrip())
    assert (out / "rates" / "seed-7" / "model" / "config.json").exists(), "asked to be kept"
    assert [each.name for each in study.chosen(["SPAE"])] == ["base", "none", "rates"]
    with pytest.raises(SpeederError, match=r"only: expected some of MRC, SPAE, base, .* got 'mrc'"):
        ablate(study, data, out, (7,), only=["mrc"])
    with pytest.raises(SpeederError, match="seeds: expected at least one, each once"):
        ablate(study, data, out, (1, 1))


def test_a_changed_recipe_is_refused_before_anything_is_trained(done, place, data, tmp_path):
    out = tmp_path / "study"
    shutil.copytree(done[0], out)
    changed = json.loads(json.dumps(STUDY))
    changed["variants"]["SPAE"]["rates"]["changes"]["stages.joint.learning_rate"] = 0.02
    study = study_from_dict(changed, "study", place)
    shutil.rmtree(out / "base" / "seed-2")
    with pytest.raises(SpeederError, match=r"rates/seed-1: .* another recipe \(stages.joint.learning_rate\)"):
        ablate(study, data, out, (1, 2))
    assert not (out / "base" / "seed-2").exists()
    other = synthetic_world(num_users=40, history=8, seed=3)
    with pytest.raises(SpeederError, match="holds a run of other data"):
        ablate(load_study(place / "study.yaml"), other, out, (1, 2))


def study_process(place, out):
    """A process that runs the study with seed 1, at the moment when it is within its first run of "none"."""
    code = (
        "import sys; from speeder.studies.ablation.run import ablate;"
        "from speeder.studies.ablation.study import load_study;"
        "from speeder.data import PreparedData;"
        "ablate(load_study(sys.argv[1]), PreparedData.load(sys.argv[2]), sys.argv[3], (1,))"
    )
    command = [sys.executable, "-c", code, *map(str, (place / "study.yaml", place / "data", out))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    moment, deadline = out / "none" / "seed-1" / "stages" / "02-joint", time.monotonic() + 120
    while not moment.exists():
        assert process.poll() is None and time.monotonic() < deadline, "the moment never came"
        time.sleep(0.01)
    return process


def test_a_finished_run_that_lost_its_evaluation_is_told(done, place, data, tmp_path):
    out = tmp_path / "study"
    shutil.copytree(done[0], out)
    shutil.rmtree(out / "none" / "seed-1" / "evaluations")
    with pytest.raises(
        SpeederError, match="none/seed-1: the run is finished, but its evaluation and its weights are gone"
    ):
        ablate(load_study(place / "study.yaml"), data, out, (1, 2))
    shutil.rmtree(out / "none" / "seed-1")
    said = []
    ablate(load_study(place / "study.yaml"), data, out, (1, 2), say=said.append)
    assert started(said) == ["none, seed 1"]


@pytest.mark.slow
def test_a_killed_study_goes_on(done, place, data):
    out = study_folder(place / "killed", data)
    process = study_process(place, out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "none" / "seed-1" / "evaluations").exists(), "killed within a run"
    said = []
    ablate(load_study(place / "study.yaml"), data, out, (1,), say=said.append)
    assert started(said) == ["none, seed 1", "rates, seed 1"]
    for run in sorted(done[0].glob("*/seed-1")):
        same = out / run.relative_to(done[0])
        whole, again = (Evaluation.load(path / "evaluations" / "test" / "model.json") for path in (run, same))
        assert again.mean("MRR") == pytest.approx(whole.mean("MRR"), abs=2e-3)
    report = json.loads((out / "ablations.json").read_text())["variants"]
    took = report["none"]["took_by_seed"]["1"]
    assert set(took) == {"precision", "processor"}, "no one counted the seconds of a stopped run"
    assert report["none"]["seconds"] is None and report["rates"]["cpu_seconds"] > 0


@pytest.mark.slow
def test_two_processes_share_a_study(place, data):
    out, said = study_folder(place / "shared", data), []
    process = study_process(place, out)
    process.send_signal(signal.SIGSTOP)  # within "none", which it keeps for itself
    only = load_study(place / "study.yaml")
    worker = threading.Thread(target=ablate, args=(only, data, out, (1,)), kwargs={"say": said.append})
    worker.start()
    deadline = time.monotonic() + 120
    while not (out / "rates" / "seed-1" / "seconds.json").exists():
        assert worker.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    assert not (out / "none" / "seed-1" / "evaluations").exists()
    process.send_signal(signal.SIGCONT)
    worker.join()
    assert process.wait(timeout=120) == 0
    assert started(process.stdout.read().splitlines()) == ["base, seed 1", "mean, seed 1", "none, seed 1"]
    assert started(said) == ["rates, seed 1"]
    report = json.loads((out / "ablations.json").read_text())["variants"]
    assert set(report) == {"base", "mean", "none", "rates"}, "the last to end tells of all"


MEAN = "variants: MRC: mean: "


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (("extra",), 1, "unknown key 'extra'; known: base, common, variants"),
        (("base",), "none.yaml", "none.yaml: No such file"),
        (("base",), 3, "base: expected a recipe's name or path, got 3"),
        (("base",), "sasrec-ml-100k", "base: expected a recipe with stages, got a baseline's"),
        (("common", "wings"), 2, "common: recipe: unknown key 'wings'"),
        (("variants",), {}, "variants: expected a mapping that is not empty"),
        (("variants", "MRC"), ["mean"], "variants: MRC: expected a mapping"),
        (
            ("variants", "MRC", "none"),
            STUDY["variants"]["SPAE"]["none"],
            "SPAE: none: expected a unique name",
        ),
        (
            ("variants", "MRC", "a/b"),
            STUDY["variants"]["SPAE"]["none"],
            "MRC: a/b: expected a name of letters",
        ),
        (("variants", "MRC", "mean", "test"), "x", f"{MEAN}unknown key 'test'; known: tests, changes"),
        (("variants", "MRC", "mean", "tests"), None, f"{MEAN}tests: expected one line of text, got None"),
        (("variants", "MRC", "mean", "changes"), {}, f"{MEAN}changes: expected a mapping that is not empty"),
        (
            ("variants", "MRC", "mean", "changes"),
            {"seed": 1},
            f"{MEAN}changes: 'seed': seeds are the study's",
        ),
        (("variants", "MRC", "mean", "changes"), {"layer": 1}, f"{MEAN}recipe: unknown key 'layer'"),
        (
            ("variants", "MRC", "mean", "changes"),
            {"model.wings": 1},
            f"{MEAN}recipe: model: unknown key 'wings'",
        ),
        (
            ("variants", "MRC", "mean", "changes"),
            {"layers": "x"},
            f"{MEAN}recipe: layers: expected a whole number",
        ),
        (
            ("variants", "MRC", "mean", "changes"),
            {"precision.x": 1},
            f"{MEAN}changes: 'precision.x': the base has",
        ),
        (
            ("variants", "MRC", "mean", "changes"),
            {"stages.end.open": []},
            "'stages.end.open': no such stage; the base has text, joint",
        ),
        (
            ("variants", "MRC", "mean", "changes"),
            {"stages.text": 1},
            "'stages.text': expected stages.STAGE.KEY",
        ),
        (
            ("variants", "MRC", "mean", "changes"),
            {"stages.text.opens": ["text"]},
            f"{MEAN}stage 'text': unknown key 'opens'",
        ),
        (
            ("variants", "MRC", "mean", "changes"),
            {"model": {"dropout": 0.1}},
            f"{MEAN}changes: expected something else than the base has",
        ),
        (
            ("variants", "MRC", "mean", "changes"),
            {"model": {"dropout": 0.2}, "model.dropout": 0.3},
            "'model.dropout' is given twice",
        ),
    ],
)
def test_wrong_studies_are_refused_in_one_line(place, tmp_path, key, value, message):
    study = json.loads(json.dumps(STUDY)) | {"base": str(place / "recipe.yaml")}
    inner = study
    for part in key[:-1]:
        inner = inner[part]
    inner[key[-1]] = value
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(SpeederError) as refused:
        load_study(tmp_path / "bad.yaml")
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"study {tmp_path / 'bad.yaml'}: ")


def test_unreadable_studies(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [")
    for name, message in ((tmp_path / "bad.yaml", "not valid YAML"), (tmp_path / "no.yaml", "No such file")):
        with pytest.raises(SpeederError, match=message):
            load_study(name)
    with pytest.raises(SpeederError, match=r"one of .*ablations-ml-100k.*, got 'ablations-none'"):
        load_study("ablations-none")


BUNDLED = sorted(path.stem for path in bundled_recipe("").parent.glob("ablations-*.yaml"))


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_studies_change_what_they_list_and_nothing_else(name):
    study = load_study(name)
    base = study.variants["base"].recipe
    for variant in list(study.variants.values())[1:]:
        assert (
            variant.group and variant.tests and recipe_from_dict(variant.recipe.to_dict()) == variant.recipe
        )
        for key in differing_keys(base.to_dict(), variant.recipe.to_dict()):
            first, _, rest = key.partition(".")
            listed = {key, first} | ({f"stages.*.{rest.rpartition('.')[2]}"} if first == "stages" else set())
            assert listed & set(variant.changes), f"{variant.name} differs in {key}"
        steps = [
            sum(stage.steps for stage in each.stages) for each in (base, variant.recipe)
        ]  # the same budget
        assert steps[0] == steps[1]
        every = {stage.steps % variant.recipe.checkpoint_steps for stage in variant.recipe.stages}
        assert every == {0}, "a stage's last step is among those that its best is chosen from"


@pytest.mark.slow
def test_every_variant_of_the_bundled_study_trains(place, data, tmp_path):
    """Its last stage, two steps of it, on a tiny backbone: nothing in it asks for what a model does not have."""
    study = load_study("ablations-ml-100k")

    def small(variant):
        own = {"stages": [replace(variant.recipe.stages[-1], steps=2)], "keep_best": False, "log_steps": 1}
        own |= {"backbone": str(place / "backbone"), "layers": None, "batch_users": 8, "precision": "fp32"}
        return replace(variant, recipe=replace(variant.recipe, **own))

    # with its last stage alone, an order of opening is no change any more
    study = replace(study, variants={k: v for k, v in study.variants.items() if v.group != "MPO"})
    study = replace(study, variants={key: small(variant) for key, variant in study.variants.items()})
    out = study_folder(tmp_path, data)
    ablate(study, data, out, (1,))
    report = json.loads((out / "ablations.json").read_text())["variants"]
    assert set(report) == set(study.variants)
    for variant, entry in report.items():
        assert variant == "base" or 0 < entry["differences"]["masked"]["NDCG@10"]["adjusted"] <= 1
    gates = {key: last_gates(out / key / "seed-1") for key in study.variants}
    assert gates["mrc-text"]["text"] == pytest.approx(1, abs=1e-6)
    assert gates["mrc-item"]["item"] == pytest.approx(1, abs=1e-6)
    equal = equal_gates(data, list(gates["mrc-mean"]))
    assert gates["mrc-mean"] == pytest.approx(equal, abs=1e-6)
    assert gates["base"] != pytest.approx(equal, abs=1e-4)


def equal_gates(data: PreparedData, names: list[str]) -> dict[str, float]:
    """Each modality's mean weight where all modalities of an item count the same; the embedding of an item that
    training never met counts nothing."""
    trained = torch.from_numpy(occurs(data.split.training(), len(data.catalogue)))
    present = torch.stack([data.catalogue.present.get(name, trained) for name in names], dim=1).float()
    return dict(zip(names, (present / present.sum(dim=1, keepdim=True)).mean(dim=0).tolist(), strict=True))


def last_gates(run):
    """Each modality's mean weight in the last stage's last line."""
    entries = [entry for entry in list(stage_logs(run).values())[-1] if "loss" in entry]
    names = (*MODALITIES, "item")
    return {name: entries[-1][f"gate/{name}"] for name in names if f"gate/{name}" in entries[-1]}


def test_the_bundled_studies_are_there():
    assert set(BUNDLED) >= {"ablations-ml-100k", "ablations-ml-100k-long"}
    study = load_study("ablations-ml-100k")
    groups = {variant.group for variant in study.variants.values()} - {""}
    assert groups == {"MRC", "MPO", "SPAE", "backbone", "supervision"}
    assert load_study("ablations-ml-100k-long").variants["base"].recipe.model["max_history"] == 200
