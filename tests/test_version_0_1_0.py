"""What version 0.1.0 wrote still works: prepared data, run folders, saved recommenders, recipes, names and commands.

The files in `fixtures/v0.1.0/` were made by the code of 0.1.0 (`make.py` there says how) and are never made anew. Each
test works in a copy, which is also its working directory: the runs name their data and backbone relative to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickletools
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from speeder import (
    ItemCatalogue,
    PreparedData,
    SpeederConfig,
    SpeederForCausalLM,
    SpeederProcessor,
    UserSessions,
    load_recipe,
)
from speeder.baselines.auto import load_recommender
from speeder.data.fingerprints import features_hash
from speeder.studies.ablation.study import load_study
from tests.public_interface import ROOT, commands, public_parameters, raw_formats, run_speeder

KEPT = Path(__file__).parent / "fixtures" / "v0.1.0"
EXPECTED = json.loads((KEPT / "expected.json").read_text())
INTERFACE = json.loads((KEPT / "interface.json").read_text())
SCORES = load_file(KEPT / "scores.safetensors")
HISTORIES = EXPECTED["histories"]
DATA_OF = {"lora": "hold-out/warm"}  # the others' are data
RUNS = ["run", "stopped", "lora", "text-prompt", "sasrec", "sasrec-stopped"]
# As shares of the largest score, since other processors round otherwise: with plain SSE, AVX2 and AVX-512, scores in
# float32, after a resumed training too, were within 4e-7 of those kept, and those in bfloat16 within 8e-3.
TOLERANCE, TOLERANCE_BFLOAT16, TOLERANCE_TRAINED = 1e-5, 2e-2, 1e-4
# what torch's own files of an optimizer and of random states name; torch reads them by `weights_only`
NAMED_BY_A_CHECKPOINT = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage",
    "torch ByteStorage",
    "numpy._core.multiarray _reconstruct",
    "numpy ndarray",
    "numpy dtype",
    "_codecs encode",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixtures, which a test may write into, as the working directory."""
    copy = tmp_path / "copy"
    shutil.copytree(KEPT, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("SPEEDER_CACHE", str(tmp_path / "cache"))
    return copy


def speeder(*arguments: object) -> str:
    """Run a command that must succeed; what it printed."""
    status, printed, told = run_speeder(*arguments)
    assert status == 0, told
    return printed


def check_scores(got: torch.Tensor, name: str, tolerance: float = TOLERANCE) -> None:
    """Scores of the three histories, as 0.1.0 gave them."""
    wanted = SCORES[name]
    torch.testing.assert_close(got, wanted, atol=tolerance * float(wanted.abs().max()), rtol=0)


# ---- the files themselves -------------------------------------------------------------------------------------


def test_the_fixtures_are_those_of_0_1_0() -> None:
    """All of them, unchanged: files made anew would prove nothing, and one that git ignores would be missing."""
    known = json.loads((KEPT / "files.json").read_text())
    found = {
        path.relative_to(KEPT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in KEPT.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.name not in ("make.py", "files.json")
    }
    assert found == known


def test_no_file_runs_code_when_it_is_read() -> None:
    """Tensors, JSON, Parquet, tables and pictures; the optimizer's state, which torch pickles, names tensors alone."""
    checkpoint = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    plain = {".safetensors", ".json", ".parquet", ".yaml", ".csv", ".png"}
    found = [
        path for path in KEPT.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".py", *plain)
    ]
    assert {path.name for path in found} == {"COMPLETE", *checkpoint}
    named = set()
    for path in found:
        if path.name in checkpoint:
            with zipfile.ZipFile(path) as archive:
                (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
                for code, argument, _ in pickletools.genops(archive.read(pickled)):
                    assert code.name != "STACK_GLOBAL", "a name that is put together as the file is read"
                    if code.name == "GLOBAL":
                        named.add(argument)
    assert named == NAMED_BY_A_CHECKPOINT


# ---- prepared data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["data", "hold-out/warm"])
def test_prepared_data(place: Path, folder: str) -> None:
    data, wanted = PreparedData.load(folder), EXPECTED["data"][folder]
    assert data.split.hash() == wanted["split_hash"]
    assert data.catalogue.modalities == wanted["modalities"]
    for name, recorded in wanted["features_hash"].items():
        assert data.manifest["encoders"][name]["features_hash"] == recorded
        assert features_hash(data.catalogue.features[name], data.catalogue.present[name]) == recorded
        assert int(data.catalogue.present[name].sum()) == wanted["present"][name]
    ids = data.catalogue.ids
    users = zip(data.interactions.user_ids, data.interactions.sequences(), strict=True)
    assert {user: [ids[item] for item in row] for user, row in users} == wanted["sequences"]
    assert data.catalogue.titles[data.catalogue.index_of("i7")] == "Bold lantern"
    data.save(place / "again")
    assert PreparedData.load(place / "again").split.hash() == wanted["split_hash"]


def test_the_same_raw_files_give_the_same_split_and_text_features(place: Path) -> None:
    encoder = ["--text-encoder", "backbone:backbone", "--without", "image", "collaborative"]
    speeder("prepare", "plain", "raw", "--images", "pictures", "--out", "new", *encoder)
    new, old = PreparedData.load("new"), PreparedData.load("data")
    assert new.split.hash() == EXPECTED["data"]["data"]["split_hash"]
    assert (new.catalogue.ids, new.catalogue.texts) == (old.catalogue.ids, old.catalogue.texts)
    assert new.catalogue.images == old.catalogue.images
    torch.testing.assert_close(new.catalogue.features["text"], old.catalogue.features["text"])


def test_the_same_items_are_held_out(place: Path) -> None:
    speeder("items", "hold-out", "--data", "data", "--out", "new", "--share", "0.12")
    assert ItemCatalogue.load("new/cold/catalogue").ids == ItemCatalogue.load("hold-out/cold/catalogue").ids
    assert PreparedData.load("new/warm").split.hash() == EXPECTED["data"]["hold-out/warm"]["split_hash"]


def test_describe(place: Path) -> None:
    text = speeder("describe", "data", "--tokenizer", "backbone")
    assert "156" in text and "36" in text


# ---- saved recommenders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "lora", "text-prompt", "sasrec"])
def test_saved_recommenders_score_as_before(place: Path, name: str) -> None:
    model = load_recommender(f"{name}/model")
    catalogue = PreparedData.load(DATA_OF.get(name, "data")).catalogue
    check_scores(model.score([catalogue.indices_of(history) for history in HISTORIES]), name)
    for row, wanted in enumerate(EXPECTED["recommended"].get(name, [])):
        got = model.recommend(HISTORIES[row : row + 1], 5)[0]
        assert [item.id for item in got] == [external for external, _ in wanted]
        assert [item.score for item in got] == pytest.approx([score for _, score in wanted], rel=1e-4)


def test_a_bfloat16_recommender_saved_without_its_catalogue(place: Path) -> None:
    catalogue = PreparedData.load("data").catalogue
    model = SpeederForCausalLM.from_pretrained("bfloat16", catalogue=catalogue)
    assert model.dtype == torch.bfloat16
    check_scores(model.score(HISTORIES), "bfloat16", TOLERANCE_BFLOAT16)


@pytest.mark.parametrize("name", ["run", "lora"])
def test_auto_classes_load_and_save_it_again(place: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(f"{name}/model")
    assert type(model) is SpeederForCausalLM
    check_scores(model.score(HISTORIES), name)
    model.save_pretrained("again")
    check_scores(SpeederForCausalLM.from_pretrained("again").score(HISTORIES), name)


def test_lora_merges(place: Path) -> None:
    model = SpeederForCausalLM.from_pretrained("lora/model")
    adapters = [weight for weight_name, weight in model.named_parameters() if "lora_B" in weight_name]
    assert adapters and all(weight.abs().max() > 0 for weight in adapters), (
        "the fixture's adapters do nothing"
    )
    model.merge_lora()
    assert not [weight_name for weight_name, _ in model.named_parameters() if "lora" in weight_name]
    check_scores(model.score(HISTORIES), "lora")


def test_processor_and_sessions(place: Path) -> None:
    processor = SpeederProcessor.from_pretrained("run/model")
    laid_out = processor(HISTORIES)
    assert {name: laid_out[name].tolist() for name in ("input_ids", "ranks")} == EXPECTED["processor"]
    assert processor.batch_decode(laid_out["input_ids"]) == EXPECTED["decoded"]
    sessions = UserSessions(SpeederForCausalLM.from_pretrained("run/model"), max_tokens=256)
    sessions.extend({"ann": HISTORIES[2][:3]})
    got = sessions.recommend({"ann": HISTORIES[2][3:]}, k=5)["ann"]
    assert [item.id for item in got] == EXPECTED["session"]


@pytest.mark.parametrize("how", ["recommend", "recommend --user", "recommend --index"])
def test_recommend_prints_the_same_items(place: Path, how: str) -> None:
    who = ["--user", "u3"] if how == "recommend --user" else ["--history", *HISTORIES[2]]
    shards = ["--index", "run/index/shards"] if how == "recommend --index" else []
    printed = speeder("recommend", "run", *who, "-k", "5", *shards)
    got, wanted = _items(printed), _items(EXPECTED["printed"][how])
    assert len(wanted) == 5
    assert [(external, title) for external, _, title in got] == [
        (external, title) for external, _, title in wanted
    ]
    assert [score for _, score, _ in got] == pytest.approx([score for _, score, _ in wanted], abs=2e-3)


def _items(printed: str) -> list[tuple[str, float, str]]:
    lines = [line.split(maxsplit=3) for line in printed.splitlines()]
    return [(external, float(score), title) for _, external, score, title in lines]


def test_items_are_added(place: Path) -> None:
    """The run's manifest names the text encoder that the new item is encoded by."""
    Path("new.csv").write_text("id,title,text\nnew,Quiet telescope,Made for home.\n")
    speeder("items", "add", "--run", "run", "--items", "new.csv")
    printed = speeder("recommend", "run", "--history", "new", "i3", "-k", "35", "--include-seen")
    assert len(printed.splitlines()) == 35
    model = SpeederForCausalLM.from_pretrained("run/model")
    assert model.catalogue.ids[-1] == "new"
    check_scores(model.score(HISTORIES)[:, :-1], "run")


# ---- run folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "kind", "more"),
    [
        ("run", "test", []),
        ("run", "test-vhr", ["--protocol", "vhr", "--answers", "titles"]),
        ("lora", "test-cold-items", ["--protocol", "cold-items"]),
        ("text-prompt", "test", []),
        ("sasrec", "test", []),
    ],
)
def test_evaluations_find_the_same_ranks(place: Path, run: str, kind: str, more: list[str]) -> None:
    """Candidates that 0.1.0 drew are read, and a cold run finds its held-out items beside its data."""
    shutil.rmtree(place / run / "evaluations")
    speeder("evaluate", run, "--no-baselines", *more)
    kinds = [kind, "test-cold-only"] if kind == "test-cold-items" else [kind]
    kept = [path for each in kinds for path in (KEPT / run / "evaluations" / each).glob("*.json")]
    assert kept
    for path in kept:
        wanted, got = json.loads(path.read_text()), json.loads((place / path.relative_to(KEPT)).read_text())
        task = ("protocol", "split", "split_hash", "num_items", "num_ranked", "candidates_hash", "fitted_on")
        assert {name: got[name] for name in task} == {name: wanted[name] for name in task}
        for name, values in wanted["per_user"].items():
            assert got["per_user"][name] == values, name
        for seen, metrics in wanted["metrics"].items():
            for metric, interval in metrics.items():
                assert got["metrics"][seen][metric]["value"] == pytest.approx(interval["value"]), metric


def test_kept_evaluations_are_compared(place: Path) -> None:
    printed = speeder("compare", "run", "sasrec", "text-prompt", "--out", "compared")
    values = {
        run: json.loads((KEPT / run / "evaluations/test/model.json").read_text())["metrics"]["masked"][
            "NDCG@10"
        ]
        for run in ("run", "sasrec", "text-prompt")
    }
    for interval in values.values():
        assert f"{interval['value']:.4f}" in printed
    assert (place / "compared" / "comparison.md").is_file()


@pytest.mark.parametrize("run", ["run", "lora", "text-prompt", "sasrec"])
def test_a_report_is_written(place: Path, run: str) -> None:
    speeder("report", run)
    page = (place / run / "report.html").read_text()
    interval = json.loads(next((KEPT / run / "evaluations").glob("test*/model.json")).read_text())["metrics"]
    assert f"{interval['masked']['NDCG@10']['value']:.4f}" in page


def test_a_stopped_run_goes_on_to_the_same_end(place: Path) -> None:
    """The first stage's model, the second one's checkpoint with its optimizer and moving average, and the recipe."""
    assert not (place / "stopped" / "model").exists()
    speeder("train", "--out", "stopped", "--resume")
    log = json.loads((place / "stopped/stages/02-_collaborative/log.json").read_text())
    assert {"from": log["resumed_from"], "steps": log["log"][-1]["step"]} == EXPECTED["resumed"]
    assert json.loads((place / "stopped/state.json").read_text())["finished"] == ["text", "+collaborative"]
    got = SpeederForCausalLM.from_pretrained("stopped/model").score(HISTORIES)
    torch.testing.assert_close(
        got, SCORES["stopped"], atol=2e-3 * float(SCORES["stopped"].abs().max()), rtol=0
    )


def test_a_stopped_sasrec_goes_on_to_the_same_end(place: Path) -> None:
    """It ends as the run of the same recipe that was never stopped."""
    speeder("train", "--out", "sasrec-stopped", "--resume")
    log = json.loads((place / "sasrec-stopped/stages/01-sasrec/log.json").read_text())
    assert log["resumed_from"] == "checkpoint.safetensors" and [each["step"] for each in log["log"]] == [
        1,
        2,
        3,
        4,
    ]
    catalogue = PreparedData.load("data").catalogue
    rows = [catalogue.indices_of(history) for history in HISTORIES]
    check_scores(load_recommender("sasrec-stopped/model").score(rows), "sasrec", TOLERANCE_TRAINED)


@pytest.mark.parametrize("run", RUNS)
def test_a_finished_run_is_not_trained_over(place: Path, run: str) -> None:
    before = (place / run / "recipe.json").read_bytes()
    status, _, told = run_speeder("train", "--data", "data", "--recipe", "recipes/run.yaml", "--out", run)
    assert status == 1 and "finished run; " in told
    assert (place / run / "recipe.json").read_bytes() == before


# ---- recipes --------------------------------------------------------------------------------------------------

BUNDLED = sorted(path.stem for path in (KEPT / "recipes" / "bundled").glob("*.yaml"))


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_recipes(name: str) -> None:
    """Those of 0.1.0 still parse, and there is still one of each name."""
    read = load_study if name.startswith("ablations-") else load_recipe
    read(KEPT / "recipes" / "bundled" / f"{name}.yaml")
    read(Path(str(files("speeder") / "recipes" / f"{name}.yaml")))


@pytest.mark.parametrize("name", ["all-keys", "sasrec-all-keys"])
def test_a_recipe_with_every_key(name: str) -> None:
    path = KEPT / "recipes" / f"{name}.yaml"
    recipe, written = load_recipe(path).to_dict(), yaml.safe_load(path.read_text())
    stages = written.pop("stages", [])
    assert {key: recipe[key] for key in written} == written
    for number, stage in enumerate(stages):
        stage["learning_rate"] = float(stage["learning_rate"])  # 1e-3 without a dot is text to YAML
        assert {key: recipe["stages"][number][key] for key in stage} == stage


def test_every_setting_of_the_model() -> None:
    recipe = load_recipe(KEPT / "recipes" / "all-keys.yaml")
    known = {field.name for field in dataclasses.fields(SpeederConfig)}
    assert set(recipe.model) <= known
    config = SpeederConfig(**recipe.model)
    assert {name: getattr(config, name) for name in recipe.model} == recipe.model


def test_a_study_with_every_kind_of_key() -> None:
    study = load_study(KEPT / "recipes" / "study-all-keys.yaml")
    base, text, one = study.variants.values()
    assert (base.recipe.layers, base.recipe.model["dropout"], base.recipe.model["max_history"]) == (
        2,
        0.1,
        10,
    )
    assert [stage.open for stage in text.recipe.stages] == [["text"], ["text"]]
    assert text.recipe.stages[1].item_learning_rate is None and text.group == "MRC"
    assert [stage.steps for stage in one.recipe.stages] == [6] and one.recipe.lora is None


# ---- names and commands ---------------------------------------------------------------------------------------


def test_public_names_and_their_parameters_are_still_there() -> None:
    """Later versions may add names and parameters, and take none away."""
    for path in INTERFACE["parameters"]:
        package, name, *_ = path.split(".")
        assert name in import_module(package).__all__
        assert hasattr(import_module(package), name), path
    found = public_parameters()
    missing = {
        path: sorted(set(names) - set(found.get(path, [])))
        for path, names in INTERFACE["parameters"].items()
        if path not in found or set(names) - set(found[path])
    }
    assert not missing


def test_commands_options_and_choices_are_still_there() -> None:
    found = commands()
    assert len(INTERFACE["commands"]) == 16
    for command, options in INTERFACE["commands"].items():
        for option, choices in options.items():
            assert option in found[command], f"speeder {command} has no {option}"
            assert not set(choices) - set(found[command][option]), f"speeder {command} {option}"
    assert set(INTERFACE["raw formats"]) <= set(raw_formats())


def test_the_kernels_still_tell_what_was_built() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "speeder_kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for op in ("spae_attention", "pack_tokens", "compress_items", "item_cross_entropy", "topk_items"):
        assert re.search(rf"^  reference +available: .*{op}", told, re.MULTILINE), told
