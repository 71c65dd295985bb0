"""The command line: help with examples, one readable line and a code above zero for what a user can get wrong."""

import json
import subprocess
import sys

import pytest

from speeder.cli import main
from speeder.data import PreparedData
from speeder.data.synthetic import synthetic_world
from tests.model.worlds import save_tiny_backbone

COMMANDS = ("assets", "prepare", "train", "evaluate", "recommend", "demo")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder, made by the commands themselves on a small world with a tiny backbone."""
    folder = tmp_path_factory.mktemp("cli")
    world = synthetic_world(num_users=40, history=8)
    PreparedData(world.catalogue, world.interactions, world.manifest).save(folder / "data")
    save_tiny_backbone(folder / "backbone")
    recipe = f"""
backbone: {folder / "backbone"}
precision: fp32
stages:
  - {{name: text, open: [text], steps: 2}}
  - {{name: +sound, open: [text, sound], steps: 2}}
"""
    (folder / "recipe.yaml").write_text(recipe)
    arguments = ["--data", folder / "data", "--recipe", folder / "recipe.yaml", "--out", folder / "run"]
    assert main(["train", *map(str, arguments)]) == 0
    return folder / "run"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and f"example:\n  speeder {command}" in text


def test_help_and_mistakes_answer_without_loading_models():
    code = "import sys; from speeder.cli import build_parser; build_parser(); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["assets", "gold"], "expected some of .* got 'gold'"),
        (["train", "--out", "{tmp}/new"], "expected --data and --recipe"),
        (["train", "--out", "{tmp}/new", "--data", "{tmp}/none", "--recipe", "ml-100k"], "none"),
        (["train", "--out", "{tmp}/new", "--data", "{run}/../data", "--recipe", "best"], "one of ml-100k, got 'best'"),
        (["train", "--out", "{tmp}/new", "--data", "{run}/../data", "--recipe", "{tmp}/no.yaml"], "No such file"),
        (["train", "--out", "{tmp}/new", "--resume"], "expected a run to resume, found none"),
        (["train", "--out", "{run}", "--data", "{run}/../data", "--recipe", "{run}/../recipe.yaml"], "holds a run"),
        (["evaluate", "{tmp}/none"], "found no model in it"),
        (["recommend", "{tmp}/none", "--history", "1"], "found no model in it"),
        (["recommend", "{run}", "--history", "nobody"], "no item has the id 'nobody'"),
        (["recommend", "{run}", "--history", "item-1", "-k", "0"], "-k: expected at least 1, got 0"),
        (["recommend", "{run}", "--history", "item-1", "-k", "48"], "k"),
        (["recommend", "{run}", "--user", "nobody"], "no user 'nobody' among 40"),
        (["demo", "--out", "{tmp}/new", "--recipe", "best"], "got 'best'"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(arguments, message, run, tmp_path, capsys):
    filled = [argument.format(tmp=tmp_path, run=run) for argument in arguments]
    capsys.readouterr()
    assert main(filled) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if not line.startswith(("Loading weights", "\r"))]
    assert len(lines) == 1 and lines[0].startswith("speeder: ")
    import re

    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "new" / "recipe.json").exists(), "a mistake leaves no half-made run"


def test_a_damaged_model_gets_one_line(run, tmp_path, capsys):
    import shutil

    shutil.copytree(run / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["recommend", str(tmp_path / "model"), "--history", "item-1"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("speeder: ")


def test_train_says_which_stage_it_leaves_out(run):
    assert json.loads((run / "recipe.json").read_text())["recipe"]["stages"][0]["name"] == "text"
    assert json.loads((run / "state.json").read_text())["finished"] == ["text"]


def test_recommend_by_history_and_by_user(run, capsys):
    assert main(["recommend", str(run), "--history", "item-3", "item-4", "-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("item-" in line for line in lines)
    assert not any("item-3 " in line or "item-4 " in line for line in lines)
    assert main(["recommend", str(run / "model"), "--history", "item-3", "-k", "48", "--include-seen"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 48
    assert main(["recommend", str(run), "--user", "user-7"]) == 0
    data = PreparedData.load(run.parent / "data")
    seen = {data.catalogue.ids[i] for i in data.interactions.sequences()[7]}
    assert not seen & {line.split()[1] for line in capsys.readouterr().out.splitlines()}


@pytest.mark.slow
def test_evaluate_writes_the_table_beside_baselines(run, capsys):
    assert main(["evaluate", str(run)]) == 0
    table = capsys.readouterr().out
    for row in ("popularity", "SASRec", "Speeder"):
        assert f"| {row}" in table
    assert (run / "results.md").read_text().strip() == table.strip()
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"popularity", "SASRec (cross-entropy)", "Speeder"}
    assert (run / "plots" / "comparison.png").stat().st_size > 1000


def test_assets_are_listed_without_fetching(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SPEEDER_CACHE", str(tmp_path))
    assert main(["assets", "--list"]) == 0
    assert capsys.readouterr().out.count("missing") == 4
