"""Training: it learns, its logs and files are whole, and it goes on from any kill as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from speeder.data import PreparedData
from speeder.data.fingerprints import FITTED_ON_NOTHING, features_hash
from speeder.data.interactions import Interactions
from speeder.errors import SpeederError
from speeder.evaluation.evaluate import evaluate
from speeder.evaluation.leaks import LeakError
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.sequences import pack_batch
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.load import recipe_from_dict
from speeder.recipes.sasrec import SASRecRecipe
from speeder.training.dataset import TrainingSequences
from speeder.training.run_folder import stage_logs
from speeder.training.sequential import train_sequential
from speeder.training.train import train
from tests.model.worlds import save_tiny_backbone, tiny_model

RECIPE = {
    "precision": "bf16",
    "batch_users": 16,
    "checkpoint_steps": 4,
    "log_steps": 2,
    "ema_decay": 0.8,
    "model": {
        "item_embedding": True,
        "dropout": 0.1,
        "modality_dropout": 0.1,
        "position_proxy_weight": 0.05,
        "experts": "linear",
        "words": True,
        "word_dropout": 0.1,
        "history_lookup": True,
    },
    "stages": [
        {"name": "text", "open": ["text"], "steps": 10},
        {"name": "+image", "open": ["text", "image"], "steps": 40, "ramp_steps": 6},
        {"name": "joint", "open": ["text", "words", "image", "collaborative", "item"], "steps": 10},
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny backbone, a small prepared world and a recipe."""
    folder = tmp_path_factory.mktemp("training")
    save_tiny_backbone(folder / "backbone")
    world = synthetic_world(num_users=60, history=8)
    PreparedData(world.catalogue, world.interactions, world.manifest).save(folder / "data")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"backbone": str(folder / "backbone")}))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(place):
    """The run that no one disturbed: its folder."""
    run_speeder(place, "uninterrupted").wait(timeout=300)
    return place / "uninterrupted"


def run_speeder(place, name: str, *more: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "speeder.cli",
        "train",
        "--data",
        str(place / "data"),
        "--out",
        str(place / name),
    ]
    command += [*more] if "--resume" in more else ["--recipe", str(place / "recipe.yaml"), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def test_a_stop_between_a_stage_and_its_row_is_made_good(place, tmp_path):
    """`on_stage` is called again, with that very stage's model, for the stage that was finished last."""
    data = PreparedData.load(place / "data")
    recipe = recipe_from_dict(yaml.safe_load((place / "recipe.yaml").read_text()))
    recipe.stages = recipe.stages[:2]

    class Stop(Exception):
        pass

    def stop(stage, model):
        raise Stop

    with pytest.raises(Stop):
        train(recipe, data, tmp_path / "run", on_stage=stop)
    rows = {}
    train(
        recipe,
        data,
        tmp_path / "run",
        resume=True,
        on_stage=lambda stage, model: rows.setdefault(stage.name, model.eval().score([[1, 2]])),
    )
    assert list(rows) == ["text", "+image"] and not torch.equal(rows["text"], rows["+image"])


def test_a_trained_recommender_knows_what_was_popular_in_training(place, uninterrupted):
    data = PreparedData.load(place / "data")
    model = SpeederForCausalLM.from_pretrained(uninterrupted / "model")
    counts = np.bincount(np.concatenate(data.split.training()), minlength=len(data.catalogue))
    best = np.argsort(-counts, kind="stable")[:5]
    assert [item.item for item in model.recommend([[]], k=5, fallback="popularity")[0]] == best.tolist()


def test_evaluation_refuses_another_split(uninterrupted):
    model = SpeederForCausalLM.from_pretrained(uninterrupted / "model")
    other = synthetic_world(num_users=60, history=8, seed=3)
    with pytest.raises(LeakError, match="SpeederForCausalLM: fitted on interactions"):
        evaluate(model, other.split)


def metrics(run) -> dict[str, float]:
    data = PreparedData.load(run.parent / "data")
    evaluation = evaluate(SpeederForCausalLM.from_pretrained(run / "model"), data.split, "test", resamples=1)
    return {name: evaluation.mean(name) for name in ("NDCG@10", "HR@10", "MRR")}


def wait_for(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline, "the moment to kill at never came"
        time.sleep(0.01)


def test_a_run_folder_is_whole(uninterrupted):
    state = json.loads((uninterrupted / "state.json").read_text())
    assert state == {"finished": ["text", "+image", "joint"], "model": "model"}
    logs = stage_logs(uninterrupted)
    for name, steps in (("text", 10), ("+image", 40), ("joint", 10)):
        losses = [entry for entry in logs[name] if "loss" in entry]
        assert losses[-1]["step"] == steps
        assert sum(v for k, v in losses[-1].items() if k.startswith("gate/")) == pytest.approx(1, abs=1e-4)
        assert [entry["step"] for entry in logs[name] if "eval_NDCG@10" in entry]
    ramp = [entry["gate/image"] for entry in logs["+image"] if "gate/image" in entry]
    assert ramp[0] < 0.05 < ramp[-1]
    events = EventAccumulator(str(next(uninterrupted.glob("stages/02-_image/runs/*")))).Reload()
    assert {"train/loss", "train/gate/image", "eval/NDCG@10"} <= set(events.Tags()["scalars"])
    assert not list(uninterrupted.glob("stages/*/checkpoint-*")), "finished stages leave no checkpoints"
    assert {path.name for path in (uninterrupted / "plots").iterdir()} == {
        "training.png",
        "gates.png",
        "gate_distribution.png",
    }


def test_what_training_never_met_is_not_trusted(place, uninterrupted):
    """Rows of the learned embedding stay random for items that only the held-out events have."""
    data = PreparedData.load(place / "data")
    met = {int(item) for sequence in data.split.training() for item in sequence}
    never = [item for item in range(len(data.catalogue)) if item not in met]
    assert never and met
    gates = SpeederForCausalLM.from_pretrained(uninterrupted / "model").gates()["item"]
    assert (gates[never] == 0).all() and (gates[sorted(met)] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["before a checkpoint", "in stage 2", "between files of a checkpoint", "stage 3"]
)
def test_kill_and_resume_gives_the_same_model(place, uninterrupted, moment):
    name = f"killed {moment}".replace(" ", "-")
    run = place / name
    process = run_speeder(place, name)
    second, third = run / "stages" / "02-_image", run / "stages" / "03-joint"
    if moment == "before a checkpoint":
        wait_for(process, lambda: (run / "stages" / "01-text").exists())
    elif moment == "in stage 2":
        wait_for(process, lambda: list(second.glob("checkpoint-*/COMPLETE")))
    elif moment == "between files of a checkpoint":
        wait_for(process, lambda: list(second.glob("checkpoint-8/model.safetensors")))
    else:
        wait_for(process, third.exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "model").exists(), "killed before the end"
    resumed = run_speeder(place, name, "--resume")
    assert resumed.wait(timeout=300) == 0, resumed.stdout.read().decode()
    wanted, got = metrics(uninterrupted), metrics(run)
    assert got == pytest.approx(wanted, abs=1e-3)
    for stage in ("text", "+image", "joint"):
        losses = [
            [(entry["step"], entry["loss"]) for entry in stage_logs(folder)[stage] if "loss" in entry]
            for folder in (uninterrupted, run)
        ]
        assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]]
        torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-3, rtol=1e-3)


def test_a_torn_checkpoint_is_not_resumed_from(place, uninterrupted, tmp_path):
    from speeder.training.checkpoints import COMPLETE, last_checkpoint

    for step, whole in ((4, True), (8, True), (12, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if whole:
            (folder / COMPLETE).touch()
    assert last_checkpoint(tmp_path).name == "checkpoint-8"
    assert not (tmp_path / "checkpoint-12").exists()


def test_what_cannot_be_resumed_is_refused(place, uninterrupted, tmp_path):
    data = PreparedData.load(place / "data")
    recipe = recipe_from_dict(yaml.safe_load((place / "recipe.yaml").read_text()))
    with pytest.raises(SpeederError, match="holds a finished run"):
        train(recipe, data, uninterrupted)
    other = recipe_from_dict(recipe.to_dict() | {"seed": 9})
    with pytest.raises(SpeederError, match="not those that this run began with"):
        train(other, data, uninterrupted, resume=True)
    with pytest.raises(SpeederError, match="expected a run to resume, found none"):
        train(recipe, data, tmp_path / "nothing", resume=True)
    sound = recipe_from_dict(recipe.to_dict() | {"stages": [{"name": "s", "open": ["sound"]}]})
    with pytest.raises(SpeederError, match="opens 'sound', but the prepared data has: text, image"):
        train(sound, data, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("supervision", ["all", "last"])
def test_every_training_interaction_is_asked_for_once(supervision):
    model = tiny_model(max_history=4)
    sequences = [torch.arange(20).numpy()[:length] for length in (2, 1, 5, 6, 13, 9)]
    windows = TrainingSequences(sequences, model.config, supervision)
    asked = [
        label
        for window in map(windows.__getitem__, range(len(windows)))
        for label in window.labels
        if label >= 0
    ]
    expected = [64 + int(item) for sequence in sequences for item in sequence[1:]]
    assert sorted(asked) == sorted(expected)
    if supervision == "last":
        assert len(windows) == len(expected)
    with pytest.raises(SpeederError, match="at least two training interactions"):
        TrainingSequences([torch.arange(1).numpy()], model.config, supervision)


def test_the_loss_is_the_mean_over_labels_and_splits_over_accumulated_batches():
    model = tiny_model()
    windows = TrainingSequences([torch.arange(6).numpy(), torch.arange(9).numpy()], model.config, "all")
    both = pack_batch([windows[0], windows[1]], with_labels=True)
    parts = [pack_batch([windows[i]], with_labels=True) for i in (0, 1)]
    labels = int((both["labels"] >= 0).sum())
    whole = model(**both).loss
    unmarked = both | {"labels": both["input_ids"]}  # labels at the sequences' first tokens, too
    torch.testing.assert_close(model(**unmarked).loss, whole)
    torch.testing.assert_close(sum(model(**part, num_items_in_batch=labels).loss for part in parts), whole)
    logits = model(**both).logits[0, :-1]
    targets = both["labels"][0, 1:]
    kept = targets >= 0
    by_hand = torch.nn.functional.cross_entropy(logits[kept][:, 64:], targets[kept] - 64)
    torch.testing.assert_close(whole, by_hand, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [(0, 0), (0, 1), (1, 2), (1, 3)],
            "a validation item, which is ranked .* needs users with 3 interactions",
        ),
        ([(0, 0), (0, 1), (0, 2), (1, 2)], "at least two training interactions, got none"),
        ([(0, 0), (1, 1)], "at least two training interactions, got none"),
    ],
)
@pytest.mark.parametrize("kind", ["speeder", "sasrec"])
def test_data_that_nobody_can_be_validated_or_trained_on_are_refused_first(
    place, tmp_path, rows, message, kind
):
    catalogue = PreparedData.load(place / "data").catalogue
    users, items = zip(*rows, strict=True)
    data = PreparedData(catalogue, Interactions(users, items, range(len(rows)), ["a", "b"]), {})
    data.manifest["encoders"] = {
        name: {
            "fitted_on": FITTED_ON_NOTHING,
            "features_hash": features_hash(features, catalogue.present[name]),
        }
        for name, features in catalogue.features.items()
    }
    for resume in (False, True) if kind == "speeder" else (False,):
        with pytest.raises(SpeederError, match=message):
            if kind == "sasrec":
                train_sequential(SASRecRecipe(), data, tmp_path / "run")
            else:
                recipe = recipe_from_dict(yaml.safe_load((place / "recipe.yaml").read_text()))
                train(recipe, data, tmp_path / "run", resume=resume)
    assert not (tmp_path / "run").exists()
