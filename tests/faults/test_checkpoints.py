"""Checkpoints: wherever the saving is killed, a whole one is there; a lost part of one is told."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from speeder.checkpoints import COMPLETE, last_checkpoint, mark_whole, reading
from speeder.errors import SpeederError
from speeder.trainer import CheckpointMarker
from tests.data.killing import killed_at

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
