"""What a run lacks is told on its page; what is broken is one readable line that names the file."""

import json
import re
import shutil

import numpy as np
import pytest

from speeder.cli.main import main
from speeder.data import PreparedData
from speeder.errors import SpeederError
from speeder.evaluation.result import Evaluation, evaluation_file
from speeder.io.files import read_json, write_json
from speeder.studies.report.build import write_report
from speeder.studies.report.contents import read_run
from speeder.training.bad_batches import SKIPPED
from tests.baselines.text_worlds import NAMES, cycle_world, save_text_backbone
from tests.studies.report.worlds import evaluate_run, make_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("contents"))
    evaluate_run(run, "full")
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy to do harm to."""
    return shutil.copytree(finished, tmp_path / "run")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "name",
    [
        "recipe.json",
        "state.json",
        "stages/02-_image/log.json",
        "evaluations/test/model.json",
        "results.json",
        "model/config.json",
        "model/model.safetensors",
        "model/catalogue/items.parquet",
    ],
)
def test_a_truncated_file_is_named(run, name, capsys):
    cut(run / name)
    assert main(["report", str(run)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("speeder: ")]
    folder = "model" if name.startswith("model") else name
    assert len(lines) == 1 and str(run / folder) in lines[0], lines
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("recipe.json", lambda value: value | {"recipe": {"stages": [{"open": []}]}}),
        ("recipe.json", lambda value: value | {"split": None}),
        ("state.json", lambda value: value | {"finished": [1]}),
        ("stages/01-text/log.json", lambda value: value | {"log": [{"loss": 1.0}]}),
        ("stages/01-text/log.json", lambda value: value | {"log": [{"step": 1, "loss": "low"}]}),
        ("stages/01-text/log.json", lambda value: value | {"log": []}),
        ("evaluations/test/model.json", lambda value: value | {"protocol": "fair"}),
        ("evaluations/test/model.json", lambda value: value | {"per_user": {**value["per_user"], "users": []}}),
    ],
)  # fmt: skip
def test_a_file_of_other_content_is_named(run, name, change):
    write_json(run / name, change(read_json(run / name)))
    with pytest.raises(SpeederError, match=re.escape(str(run / name))):
        read_run(run)


def test_data_that_changed_are_not_shown(run, tmp_path):
    data = PreparedData.load(read_json(run / "recipe.json")["data"])
    data.interactions.item = np.roll(data.interactions.item, 1)
    PreparedData(data.catalogue, data.interactions, data.manifest).save(tmp_path / "data")
    with pytest.raises(SpeederError, match=r"the data have changed since .* was trained"):
        read_run(run, tmp_path / "data")


def test_no_run_folder_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "expected a run folder, found no recipe.json" in capsys.readouterr().err


def test_what_is_missing_is_told(run):
    """A run that was stopped after its first stage, whose data moved, and that nobody evaluated."""
    shutil.rmtree(run / "evaluations")
    shutil.rmtree(run / "model")
    write_json(run / "state.json", {"finished": ["text"], "model": "model-01"})
    write_json(
        run / "recipe.json",
        read_json(run / "recipe.json") | {"data": str(run / "gone"), "data_from_run": None},
    )
    text = write_report(run).read_text(encoding="utf-8")
    for words in (
        "1 of 3 stages are finished",
        "are no longer in " + str(run / "gone"),
        "Gate weights and recommendations: the run has no model.",
        "there are none yet; run speeder evaluate",
        "not finished",
        "Training loss",
    ):
        assert words in text
    for words in ("Example recommendations", "computes the weights", "By slice of users"):
        assert words not in text


def test_skipped_batches_are_told(run):
    path = run / "stages" / "01-text" / "log.json"
    record = read_json(path)
    skipped = [
        {"step": 1, SKIPPED: 1, "not_finite": "loss"},
        {"step": 2, SKIPPED: 2, "not_finite": "gradient"},
    ]
    assert "not finite)" not in write_report(run).read_text(encoding="utf-8")
    write_json(path, record | {"log": record["log"] + skipped})
    assert "(2 skipped, not finite)" in write_report(run).read_text(encoding="utf-8")


def test_a_run_that_has_just_begun(run):
    for name in ("evaluations", "model", "stages"):
        shutil.rmtree(run / name)
    (run / "state.json").unlink()
    text = write_report(run).read_text(encoding="utf-8")
    assert "0 of 3 stages are finished" in text and "no record of its machine" in text


def test_rows_of_another_task_are_left_out_and_told(run):
    folder = run / "evaluations" / "test"
    other = json.loads((folder / "popularity.json").read_text())
    write_json(folder / "older.json", other | {"num_items": 47})
    contents = read_run(run)
    assert list(contents.evaluations["test"]) == ["popularity", "neighbours", "Speeder"]
    assert contents.notes == ["test: older was measured on other users, items or candidates."]


def test_a_demos_folder_has_its_evaluations_beside_the_run(run, tmp_path):
    demo = tmp_path / "demo"
    shutil.move(run, demo / "speeder")
    shutil.move(demo / "speeder" / "evaluations" / "test", demo / "evaluations" / "test")
    evaluations = demo / "evaluations" / "test"
    shutil.copy(evaluations / "model.json", evaluations / evaluation_file("Speeder after text"))
    (evaluations / "model.json").rename(evaluations / evaluation_file("Speeder after +image"))
    contents = read_run(demo)
    assert list(contents.evaluations["test"]) == [
        "popularity",
        "neighbours",
        "Speeder after text",
        "Speeder after +image",
    ]
    assert contents.run == demo / "speeder" and contents.model is not None and not contents.notes


def test_a_baseline_without_gates_has_a_page_too(finished, tmp_path):
    recipe = tmp_path / "sasrec.yaml"
    recipe.write_text("baseline: sasrec\nsasrec: {hidden_size: 8, heads: 1, layers: 1, epochs: 2}\nseed: 1\n")
    data = read_json(finished / "recipe.json")["data"]
    arguments = ["--data", data, "--recipe", recipe, "--out", tmp_path / "run"]
    assert main(["train", *map(str, arguments)]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--no-baselines"]) == 0
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "SASRec (cross-entropy)" in text and "Example recommendations" in text
    assert "computes the weights" not in text and 'class="shares"' not in text
    evaluation = Evaluation.load(tmp_path / "run" / "evaluations" / "test" / "model.json")
    assert f"{evaluation.mean('NDCG@10'):.4f}" in text and "hidden_size" in text


def test_a_model_that_ranks_no_catalogue_recommends_nothing(tmp_path):
    cycle_world(num_users=12).save(tmp_path / "data")
    save_text_backbone(tmp_path / "backbone", [f"The {name} Path" for name in NAMES])
    recipe = f"backbone: {tmp_path / 'backbone'}\nbaseline: yes-no\nsupervision: last\nprecision: fp32\n"
    stage = "stages: [{name: asked, train: [backbone], steps: 2}]\n"
    (tmp_path / "recipe.yaml").write_text(recipe + stage)
    arguments = ["--data", tmp_path / "data", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "run"]
    assert main(["train", *map(str, arguments)]) == 0
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Recommendations: yes/no cannot rank a whole catalogue." in text
    assert "Example recommendations" not in text and "Training loss" in text
