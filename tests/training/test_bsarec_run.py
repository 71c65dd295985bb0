"""BSARec by recipe: trained, evaluated, reported and resumed as SASRec is; a row beside other runs if asked for."""

import json
from pathlib import Path

import pytest
import torch

from speeder.baselines import BSARec, SASRec, SASRecConfig
from speeder.cli.main import main
from speeder.data import PreparedData
from speeder.data.fingerprints import training_hash
from speeder.prepare.synthetic import synthetic_world
from speeder.training.run_folder import stage_logs

SETTINGS = {"hidden_size": 8, "layers": 1, "max_length": 8, "c": 3, "batch_size": 64, "epochs": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of BSARec, beside it a SASRec that learned nothing, so that none is fitted."""
    world = synthetic_world(num_users=40, history=6)
    place = tmp_path_factory.mktemp("bsarec")
    PreparedData(world.catalogue, world.interactions, world.manifest).save(place / "data")
    (place / "recipe.yaml").write_text(json.dumps({"baseline": "bsarec", "seed": 3, "bsarec": SETTINGS}))
    command = ["train", "--data", place / "data", "--recipe", place / "recipe.yaml", "--out", place / "run"]
    assert main([str(part) for part in command]) == 0
    tiny_sasrec(place).save(place / "run" / "baselines" / "sasrec")
    return place / "run"


def tiny_sasrec(place: Path) -> SASRec:
    data = PreparedData.load(place / "data")
    model = SASRec(len(data.catalogue), SASRecConfig(hidden_size=8, heads=1, layers=1))
    model.training_hash = training_hash(data.split.training())
    return model


def rows(printed: str) -> list[str]:
    names = ("popularity", "neighbours", "SASRec (cross-entropy)", "BSARec")
    return [line.split("  ")[0] for line in printed.splitlines() if line.split("  ")[0] in names]


def test_it_is_trained_evaluated_and_reported_as_sasrec_is(run, capsys):
    log = stage_logs(run)["bsarec"]
    assert [entry["step"] for entry in log] == [1, 2] and log[1]["loss"] < log[0]["loss"]
    assert main(["evaluate", str(run), "--bsarec"]) == 0  # its own row alone
    assert rows(capsys.readouterr().out) == ["popularity", "neighbours", "SASRec (cross-entropy)", "BSARec"]
    assert not (run / "baselines" / "bsarec").exists()
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "BSARec" in page and "alpha" in page
    capsys.readouterr()
    assert main(["recommend", str(run), "--history", "item-1"]) == 1
    assert "expected a run of a language model, got BSARec" in capsys.readouterr().err


def test_asked_for_it_stands_beside_another_run(run, capsys):
    other = run.parent / "other"
    tiny_sasrec(run.parent).save(other / "model")
    (other / "recipe.json").write_text((run / "recipe.json").read_text())
    BSARec.load(run / "model").save(other / "baselines" / "bsarec")
    assert main(["evaluate", str(other)]) == 0
    assert rows(capsys.readouterr().out) == ["popularity", "neighbours", "SASRec (cross-entropy)"]
    assert main(["evaluate", str(other), "--bsarec"]) == 0
    assert rows(capsys.readouterr().out) == ["popularity", "neighbours", "BSARec", "SASRec (cross-entropy)"]
    popularity = other / "evaluations" / "test" / "popularity.json"
    assert main(["compare", str(other), str(popularity)]) == 0
    assert "\n| BSARec |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--no-baselines"], "--no-baselines"), (["--protocol", "cold-items"], "it cannot rank")],
)
def test_where_it_cannot_stand_the_option_is_refused(run, options, message, capsys):
    assert main(["evaluate", str(run), "--bsarec", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.exact
def test_a_stopped_run_resumes_to_the_same_weights(run, monkeypatch):
    again, states = run.parent / "again", BSARec.states

    def stop(self, examples):
        stages = again / "stages" / "01-bsarec"
        if (stages / "checkpoint.safetensors").exists():
            raise KeyboardInterrupt
        return states(self, examples)

    command = ["train", "--data", run.parent / "data", "--recipe", run.parent / "recipe.yaml", "--out", again]
    with monkeypatch.context() as patched:
        patched.setattr(BSARec, "states", stop)
        with pytest.raises(BaseException):  # noqa: B017, however the command ends
            raise SystemExit(main([str(part) for part in command]))
    assert not (again / "model").exists()
    assert main(["train", "--out", str(again), "--resume"]) == 0
    whole = BSARec.load(run / "model").state_dict()
    assert all(
        torch.equal(value, whole[name]) for name, value in BSARec.load(again / "model").state_dict().items()
    )
    assert stage_logs(again) == stage_logs(run)
