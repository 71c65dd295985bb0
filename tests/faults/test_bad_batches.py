"""NaN in a loss or a gradient: a clear error before the step, or a step that changes nothing and is counted."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from speeder.data import PreparedData
from speeder.errors import SpeederError
from speeder.model.modeling import SpeederForCausalLM
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.load import load_recipe, recipe_from_dict
from speeder.training.bad_batches import check_weights
from speeder.training.ema import AVERAGE_FILE
from speeder.training.run_folder import stage_logs
from speeder.training.train import train
from speeder.training.trainer import SpeederTrainer
from tests.faults import jobs
from tests.faults.processes import free_port, start
from tests.model.worlds import save_tiny_backbone

RECIPE = {
    "precision": "fp32",
    "batch_users": 8,  # of 24 users: three batches an epoch
    "checkpoint_steps": 1,
    "log_steps": 1,
    "keep_best": False,
    "ema_decay": 0.5,
    "stages": [{"name": "joint", "open": ["text", "image"], "steps": 8}],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad-batches")
    world = synthetic_world(num_users=24, history=6)
    PreparedData(world.catalogue, world.interactions, world.manifest).save(folder / "data")
    recipe = RECIPE | {"backbone": str(save_tiny_backbone(folder / "backbone"))}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch):
    """`jobs.spoil`, undone after the test; meanwhile all checkpoints stay."""
    monkeypatch.setattr("speeder.training.callbacks.remove_checkpoint", lambda folder: None)
    monkeypatch.setattr(SpeederTrainer, "compute_loss", SpeederTrainer.compute_loss)
    return jobs.spoil


def train_by(place: Path, run: Path, resume: bool = False, **settings: object) -> SpeederForCausalLM:
    recipe = recipe_from_dict(load_recipe(place / "recipe.yaml").to_dict() | settings)
    return train(recipe, PreparedData.load(place / "data"), run, resume=resume)


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All that an optimizer step may change: weights, their average, the optimizer's moments."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors |= {f"average {key}": value for key, value in load_file(checkpoint / AVERAGE_FILE).items()}
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return tensors | {f"{n} {key}": value for n, entry in moments.items() for key, value in entry.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_by_default_it_is_an_error_and_the_last_checkpoint_stays(place, tmp_path, spoil, how):
    spoil({5: how})
    with pytest.raises(
        SpeederError, match=rf"stage 'joint', step 5: the {how} of batch 2 of epoch 2 is not finite"
    ) as caught:
        train_by(place, tmp_path / "run")
    assert "\n" not in str(caught.value) and "skip_bad_batches" in str(caught.value)
    checkpoints = sorted((tmp_path / "run").glob("stages/*/checkpoint-*/COMPLETE"))
    assert [path.parent.name for path in checkpoints] == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    for path in checkpoints:
        assert all(tensor.isfinite().all() for tensor in state(path.parent).values())


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing_and_is_counted(place, tmp_path, spoil, caplog, how):
    run = tmp_path / "run"
    spoil({5: how, 6: "loss"})
    with pytest.raises(SpeederError, match=r"step 6: .* 1 batches were already skipped"):
        train_by(place, run, skip_bad_batches=1)
    before, after = (state(run / "stages" / "01-joint" / f"checkpoint-{step}") for step in (4, 5))
    assert same(before, after)
    caplog.clear()
    spoil({2: "loss"})  # the resumed run's second batch: step 7
    with pytest.raises(SpeederError, match="skip_bad_batches: 1"):
        train_by(place, run, resume=True, skip_bad_batches=1)  # those before the stop count
    model = train_by(place, run, resume=True, skip_bad_batches=2)
    assert all(weight.isfinite().all() for weight in model.parameters())
    record = json.loads((run / "stages" / "01-joint" / "log.json").read_text())
    assert record["skipped_batches"] == 1
    entries = [entry for entry in record["log"] if "skipped_batches" in entry]
    assert [(entry["step"], entry["skipped_batches"]) for entry in entries] == [(5, 1)]
    assert entries[0]["not_finite"] == f"the {how} of batch 2 of epoch 2"
    assert "1 of 8 steps were skipped" in caplog.text
    losses = [entry["loss"] for entry in stage_logs(run)["joint"] if "loss" in entry]
    assert len(losses) == 8 and all(0 < loss < 100 for loss in losses)


def test_with_accumulation_one_bad_batch_spoils_its_step_alone(place, tmp_path, spoil):
    """Steps of two batches, the last of an epoch of one: batch 2 is step 1's, batch 3 of epoch 2 is step 4's."""
    run = tmp_path / "run"
    spoil({2: "loss", 6: "gradient", 7: "gradient"})
    with pytest.raises(
        SpeederError, match=r"step 5: the gradient of batches 1 to 2 of epoch 3 is not finite"
    ):
        train_by(place, run, skip_bad_batches=2, gradient_accumulation_steps=2)
    third, fourth = (state(run / "stages" / "01-joint" / f"checkpoint-{step}") for step in (3, 4))
    assert same(third, fourth)
    log = json.loads((run / "stages" / "01-joint" / "checkpoint-4" / "trainer_state.json").read_text())
    skipped = [(e["step"], e["not_finite"]) for e in log["log_history"] if "skipped_batches" in e]
    assert skipped == [(1, "the loss of batch 2 of epoch 1"), (4, "the gradient of batch 3 of epoch 2")]


def test_several_processes_skip_or_fail_together(place, tmp_path):
    """The second alone has the bad batch. Both skip it, both fail at the next one, and neither waits for ever."""
    for name in ("data", "backbone"):
        (tmp_path / name).symlink_to(place / name)
    recipe = load_recipe(place / "recipe.yaml").to_dict() | {"skip_bad_batches": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    port = free_port()
    both = [
        start(jobs.train_spoiled, tmp_path, "run", {3: "loss", 5: "loss"}, rank, 2, port) for rank in (0, 1)
    ]
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [3, 3], (tmp_path / "printed.txt").read_text()[-3000:]
    for rank in (0, 1):
        assert "step 5: the loss of batch 2 of epoch 2" in (tmp_path / f"error-run-{rank}.txt").read_text()
    folder = tmp_path / "run" / "stages" / "01-joint" / "checkpoint-4"
    skipped = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in skipped if "skipped_batches" in entry] == [3]
    assert all(tensor.isfinite().all() for tensor in state(folder).values())


def test_weights_that_are_not_finite_are_never_saved(place, tmp_path, monkeypatch):
    step = SpeederTrainer.training_step

    def break_weights(self, model, *arguments):
        loss = step(self, model, *arguments)  # finite, as is the gradient
        if self.state.global_step == 3:
            self.plain.item_head.weight.data[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(SpeederTrainer, "training_step", break_weights)
    monkeypatch.setattr(SpeederTrainer, "evaluate", lambda *a, **k: {"eval_NDCG@10": 0.0})
    with pytest.raises(SpeederError, match=r"step 4: the weights item_head\.weight are no longer finite"):
        train_by(place, tmp_path / "run")
    names = [path.name for path in (tmp_path / "run").glob("stages/*/checkpoint-*")]
    assert sorted(names) == ["checkpoint-1", "checkpoint-3"], "the best and the newest"
    check_weights({"fine": torch.ones(2), "whole numbers": torch.ones(2).long()}, "here")


def test_the_setting_is_checked_and_told_only_where_used(place):
    recipe = load_recipe(place / "recipe.yaml")
    assert "skip_bad_batches" not in recipe.to_dict(), "a run that began before there was the key goes on"
    assert recipe_from_dict(recipe.to_dict() | {"skip_bad_batches": 3}).to_dict()["skip_bad_batches"] == 3
    with pytest.raises(SpeederError, match="skip_bad_batches: expected at least 0, got -1"):
        recipe_from_dict(recipe.to_dict() | {"skip_bad_batches": -1})
