"""Checkpoints: wherever the saving is killed, a whole one is there; a lost part of one is told."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from speeder.data import PreparedData
from speeder.errors import SpeederError
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.load import recipe_from_dict
from speeder.training.callbacks import CheckpointMarker
from speeder.training.checkpoints import COMPLETE, last_checkpoint, mark_whole, reading
from speeder.training.train import train
from tests.io.killing import killed_at
from tests.model.worlds import save_tiny_backbone

FILES = ["model.safetensors", "optimizer.pt", "trainer_state.json"]


def write(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in FILES:
        (checkpoint / name).write_text(f"{name} of {step}")
    return checkpoint


def save(folder: Path, step: int, best: int) -> None:
    """As the `Trainer` does after it wrote the files."""
    state = SimpleNamespace(
        global_step=step, is_world_process_zero=True, best_model_checkpoint=str(folder / f"checkpoint-{best}")
    )
    CheckpointMarker().on_save(SimpleNamespace(output_dir=str(folder)), state, None)


def test_killed_at_any_moment_a_whole_one_stays(tmp_path: Path) -> None:
    """And the best one with it, which the stage ends with."""
    touch, found = 0, set()
    while True:
        folder = tmp_path / str(touch)
        for step in (2, 4, 6):
            mark_whole(write(folder, step))
        write(folder, 8)
        killed = killed_at(touch, lambda folder=folder: save(folder, step=8, best=2))
        last = last_checkpoint(folder)
        assert {COMPLETE, *FILES} <= {path.name for path in last.iterdir()}
        assert (folder / "checkpoint-2" / COMPLETE).exists()
        found.add(last.name)
        if not killed:
            break
        touch += 1
    assert touch > 5 and found == {"checkpoint-6", "checkpoint-8"}
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-8"]


def test_where_the_newest_is_the_best_the_one_before_stays(tmp_path: Path) -> None:
    for step in (2, 10):
        mark_whole(write(tmp_path, step))
    write(tmp_path, 12)
    save(tmp_path, step=12, best=12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-12"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_lost_part_is_told(tmp_path: Path, name: str, how: str) -> None:
    mark_whole(write(tmp_path, 2))
    newest = write(tmp_path, 4)
    mark_whole(newest)
    if how == "missing":
        (newest / name).unlink()
    else:
        (newest / name).write_text("x")
    with pytest.raises(SpeederError, match=rf"checkpoint-4/{name} (is missing|has 1 bytes)"):
        last_checkpoint(tmp_path)


def test_a_checkpoint_of_an_earlier_version_counts(tmp_path: Path) -> None:
    (write(tmp_path, 2) / COMPLETE).touch()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    assert last_checkpoint(tmp_path / "none") is None


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpeederError, match="cannot be read: Expecting value") as caught, reading(tmp_path):
        json.loads("")
    assert "\n" not in str(caught.value)


def test_what_a_kill_leaves_of_a_finished_stage_goes_with_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a stage is told as finished, and before its checkpoints and the model before it are removed."""
    world = synthetic_world(num_users=20, history=6)
    data, run = PreparedData(world.catalogue, world.interactions, world.manifest), tmp_path / "run"
    stages = [{"name": name, "open": ["text"], "steps": 2} for name in ("first", "second", "third")]
    backbone = str(save_tiny_backbone(tmp_path / "backbone"))
    recipe = recipe_from_dict(
        {"backbone": backbone, "precision": "fp32", "checkpoint_steps": 1, "stages": stages}
    )

    class Stop(Exception):
        pass

    def stop(run: Path, state: dict) -> None:
        if len(state["finished"]) == 2:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr("speeder.training.train._clear_finished", stop)
        train(recipe, data, run)
    (run / "model-01").mkdir(exist_ok=True)  # as if the kill had come a moment earlier still
    assert len(list(run.glob("stages/*/checkpoint-*"))) >= 2
    train(recipe, data, run, resume=True)
    assert not list(run.glob("stages/*/checkpoint-*"))
    assert [path.name for path in run.glob("*model*")] == ["model"]
