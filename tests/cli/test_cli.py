"""The command line: help with examples, one readable line and a code above zero for what a user can get wrong."""

import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from speeder.cli.main import main
from speeder.data import ItemCatalogue, PreparedData
from speeder.model.modeling import SpeederForCausalLM
from speeder.prepare.synthetic import synthetic_world
from tests.model.worlds import save_tiny_backbone

COMMANDS = (
    "assets",
    "prepare",
    "train",
    "evaluate",
    "compare",
    "ablate",
    "recommend",
    "serve",
    "report",
    "bench",
    "demo",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder, made by the commands themselves on a small world with a tiny backbone."""
    folder = tmp_path_factory.mktemp("cli")
    world = synthetic_world(num_users=40, history=8)
    items = world.catalogue
    kept = {name: items.features[name] for name in ("text", "collaborative")}
    catalogue = ItemCatalogue(items.ids, items.titles, items.texts, features=kept)
    PreparedData(catalogue, world.interactions, world.manifest).save(folder / "data")
    save_tiny_backbone(folder / "backbone")
    recipe = f"""
backbone: {folder / "backbone"}
precision: fp32
stages:
  - {{name: text, open: [text], steps: 2}}
  - {{name: +image, open: [text, image], steps: 2}}
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
    code = (
        "import sys; from speeder.cli.main import build_parser; build_parser();"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["assets", "gold"], "expected some of .* got 'gold'"),
        (["train", "--out", "{tmp}/new"], "expected --data and --recipe"),
        (["train", "--out", "{tmp}/new", "--data", "{tmp}/none", "--recipe", "ml-100k"], "none"),
        (
            ["train", "--out", "{tmp}/new", "--data", "{run}/../data", "--recipe", "best"],
            "one of .*ml-100k.*, got 'best'",
        ),
        (["train", "--out", "{tmp}/new", "--data", "{run}/../data", "--recipe", "{tmp}/no.yaml"], "No such file"),
        (["train", "--out", "{tmp}/new", "--resume"], "expected a run to resume, found none"),
        (["train", "--out", "{run}", "--data", "{run}/../data", "--recipe", "{run}/../recipe.yaml"], "a finished run"),
        (["evaluate", "{tmp}/none"], "found no model in it"),
        (["recommend", "{tmp}/none", "--history", "1"], "found no model in it"),
        (["recommend", "{run}", "--history", "nobody"], "no item has the id 'nobody'"),
        (["recommend", "{run}", "--history", "item-1", "-k", "0"], "-k: expected at least 1, got 0"),
        (
            ["recommend", "{run}", "--history", "item-1", "-k", "48"],
            r"k: expected 1\.\.47, the items of 48 that can be recommended after the history, got 48",
        ),
        (["recommend", "{run}", "--history", "item-1", "-k", "99"], r"1\.\.47, the items of 48 .*, got 99"),
        (
            ["recommend", "{run}", "--history", "item-1", "-k", "49", "--include-seen"],
            r"k: expected 1\.\.48, the items of 48 .*, got 49",
        ),
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
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "new" / "recipe.json").exists(), "a mistake leaves no half-made run"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("model: {dropout: 2}", "dropout: expected a probability"),
        ("model: {droput: 0.2}", "unknown setting 'droput'"),
        ("model: {max_history: many}", "max_history"),
        ("lora: {rank: 8}", "lora: .*rank"),
        ("lora: {target_modules: [nope]}", "lora: .*nope"),
        ("template: hello", "template: expected {history}, each once"),
        ("layers: 99", "layers: expected 1..2"),
        ("backbone: /nowhere/at/all", "/nowhere/at/all"),
    ],
)
def test_a_wrong_recipe_gets_one_line_and_can_be_mended(line, message, run, tmp_path, capsys):
    good = (run.parent / "recipe.yaml").read_text()
    recipe = tmp_path / "recipe.yaml"
    kept = [row for row in good.splitlines() if row.split(":")[0] != line.split(":")[0]]
    recipe.write_text("\n".join([*kept, line]))
    arguments = ["train", "--data", run.parent / "data", "--recipe", recipe, "--out", tmp_path / "new"]
    assert main([*map(str, arguments)]) == 1
    assert re.search(f"^speeder: .*{message}", capsys.readouterr().err, re.MULTILINE)
    recipe.write_text(good)
    assert main([*map(str, arguments)]) == 0, "the folder is free for the mended recipe"


def test_a_refused_run_keeps_its_data(run, tmp_path):
    other = synthetic_world(num_users=40, history=8, seed=5)
    PreparedData(other.catalogue, other.interactions, other.manifest).save(tmp_path / "other")
    before = (run / "recipe.json").read_text()
    command = ["train", "--data", str(tmp_path / "other"), "--recipe", "ml-100k", "--out", str(run)]
    assert main(command) == 1 and main([*command[:3], "--out", str(run), "--resume"]) == 1
    assert (run / "recipe.json").read_text() == before


def test_files_where_folders_should_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("speeder: ")


def test_a_damaged_model_gets_one_line(run, tmp_path, capsys):
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
    printed = capsys.readouterr()
    assert not seen & {line.split()[1] for line in printed.out.splitlines()}
    assert f"after {len(seen)} items, the last: " in printed.err


def test_a_model_with_other_features_than_the_datas_is_not_evaluated(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), "--no-baselines"]) == 0
    model = SpeederForCausalLM.from_pretrained(tmp_path / "run" / "model")
    model.set_catalogue(model.catalogue.with_features("text", model.catalogue.features["text"].flip(0)))
    model.save_pretrained(tmp_path / "run" / "model")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--no-baselines"]) == 1
    message = "SpeederForCausalLM: its text features differ from the prepared data's"
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_writes_the_table_beside_baselines(run, capsys):
    assert main(["evaluate", str(run)]) == 0
    table = capsys.readouterr().out
    for row in ("popularity", "neighbours", "SASRec", "Speeder"):
        assert f"\n{row}" in table
        assert f"| {row}" in (run / "results.md").read_text()
    assert max(map(len, table.splitlines()[:-1])) <= 110 and str(run / "results.md") in table
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"popularity", "neighbours", "SASRec (cross-entropy)", "Speeder"}
    assert (run / "plots" / "comparison.png").stat().st_size > 1000
    assert "\\toprule" in (run / "results.tex").read_text()
    results_rows = ("popularity", "neighbours", "SASRec", "Speeder")
    for protocol, column in (("vhr", "VHR@1"), ("sampled", "AUC")):  # from the same checkpoint and SASRec
        assert main(["evaluate", str(run), "--protocol", protocol]) == 0
        table = capsys.readouterr().out
        assert column in table and all(f"\n{row}" in table for row in results_rows)
        assert f"| {column} " in (run / f"results-test-{protocol}.md").read_text()
    files = {path.name for path in (run / "candidates").iterdir()}
    assert files == {"test-19-seed0.json", "test-20-seed0.json"}
    sasrec = run / "evaluations" / "test" / "sasrec__cross-entropy_.json"
    assert main(["compare", str(run), str(sasrec), "--out", str(run / "compared")]) == 0
    assert "| run | sasrec__cross-entropy_ |" in capsys.readouterr().out
    planted = run / "candidates" / "test-19-seed0.json"
    planted.write_text(planted.read_text().replace('"seed": 0', '"seed": 1'))
    assert main(["evaluate", str(run), "--protocol", "vhr"]) == 1
    assert "content has changed" in capsys.readouterr().err


def test_assets_are_listed_without_fetching(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SPEEDER_CACHE", str(tmp_path))
    assert main(["assets", "--list"]) == 0
    assert capsys.readouterr().out.count("missing") == 4


def test_what_runs_on_one_process_refuses_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["evaluate", "runs/none"]) == 1
    assert capsys.readouterr().err == (
        "speeder: evaluate: runs on one process; start it without torchrun or accelerate\n"
    )


def moved(run, tmp_path):
    """A folder with the run and its data, which lies where they never were; the old one is gone."""
    old = tmp_path / "old"
    shutil.copytree(run.parent, old)
    known = json.loads((old / "run" / "recipe.json").read_text())
    assert known["data_from_run"] == "../data"
    (old / "run" / "recipe.json").write_text(json.dumps(known | {"data": str(old / "data")}))
    new = tmp_path / "elsewhere" / "new"
    new.parent.mkdir()
    shutil.move(old, new)
    return new / "run"


def test_a_run_that_was_moved_together_with_its_data(run, tmp_path, capsys):
    new = moved(run, tmp_path)
    assert main(["recommend", str(new), "--user", "user-1", "-k", "3"]) == 0
    assert main(["report", str(new)]) == 0
    assert "were not found" not in (new / "report.html").read_text()
    assert main(["evaluate", str(new)]) == 0
    assert main(["train", "--out", str(new), "--resume"]) == 0
    assert json.loads((new / "recipe.json").read_text())["data"] == str((new.parent / "data").resolve())


def test_a_run_of_version_0_1_0_finds_data_of_the_same_name_beside_it(run, tmp_path):
    new = moved(run, tmp_path)
    known = json.loads((new / "recipe.json").read_text())
    del known["data_from_run"]
    (new / "recipe.json").write_text(json.dumps(known))
    assert main(["recommend", str(new), "--user", "user-1"]) == 0


def test_moved_data_must_be_the_runs_own(run, tmp_path, capsys):
    new = moved(run, tmp_path)
    other = synthetic_world(num_users=40, history=8, seed=5)
    shutil.rmtree(new.parent / "data")
    PreparedData(other.catalogue, other.interactions, other.manifest).save(new.parent / "data")
    assert main(["recommend", str(new), "--user", "user-1"]) == 1
    assert "the data have changed since" in capsys.readouterr().err


def test_titles_that_a_terminal_cannot_show_end_nothing(run, tmp_path, monkeypatch):
    shutil.copytree(run / "model", tmp_path / "model")
    catalogue = ItemCatalogue.load(tmp_path / "model" / "catalogue")
    catalogue.titles[:] = ["Am\u00e9lie \u732b"] * len(catalogue)
    model = SpeederForCausalLM.from_pretrained(run / "model")
    model.set_catalogue(catalogue)
    model.save_pretrained(tmp_path / "model")
    for encoding, shown in (
        ("ascii", b"Am?lie ?"),
        ("latin-1", b"Am\xe9lie ?"),
        ("utf-8", "Am\u00e9lie \u732b".encode()),
    ):
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding, write_through=True))
        assert main(["recommend", str(tmp_path / "model"), "--history", "item-1", "-k", "1"]) == 0
        assert shown in out.getvalue()


def test_a_process_with_an_ascii_terminal(run):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "speeder.cli", "recommend", str(run), "--history", "caf\u00e9"]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert (
        done.returncode == 1 and b"no item has the id 'caf" in done.stderr and b"Traceback" not in done.stderr
    )


def test_an_item_whose_token_is_not_a_number_is_named(run, tmp_path, capsys):
    model = SpeederForCausalLM.from_pretrained(run / "model")
    model.mrc.features_text[5] = float("nan")
    with pytest.raises(ValueError, match=r"tokens of 1 item\(s\) hold NaN, the first: item 'item-5'"):
        model.recommend([["item-1"]], k=3)
