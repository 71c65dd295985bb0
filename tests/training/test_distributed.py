"""Training on two processes is training on one: the same losses, metrics, files and model; either resumes the other."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from speeder.data import PreparedData
from speeder.data.interactions import Interactions
from speeder.errors import SpeederError
from speeder.model.config import SpeederConfig
from speeder.model.modeling import SpeederForCausalLM
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.load import load_recipe
from speeder.training.callbacks import OwnDraws
from speeder.training.dataset import TrainingSequences
from speeder.training.distributed import SharedBatches, share_batch
from speeder.training.run_folder import stage_logs
from speeder.training.train import train
from tests.model.worlds import save_tiny_backbone
from tests.training.distributed_worker import train_one

# 31 windows in batches of 10: the last has one, so that the second process has nothing. Two batches a step, two steps
# an epoch, and a checkpoint after three: within the second epoch.
RECIPE = {
    "precision": "fp32",
    "batch_users": 10,
    "gradient_accumulation_steps": 2,
    "checkpoint_steps": 3,
    "log_steps": 1,
    "ema_decay": 0.5,
    "model": {"item_embedding": True},
    "stages": [
        {"name": "text", "open": ["text"], "steps": 4},
        {"name": "joint", "open": ["text", "image", "item"], "epochs": 3, "ramp_steps": 2},
    ],
}


OTHERS = ["two", "two-one", "one-two", "sharded", "sharded-one", "one-sharded"]
CONFIG = SpeederConfig(text_config=LlamaConfig(vocab_size=64), prompt_prefix=[1, 2], tokens_per_item=2)


def varied_world(num_users: int = 31) -> PreparedData:
    """Users of 4 to 12 interactions, so that equal shares of users are unequal shares of tokens and of targets."""
    world = synthetic_world(num_users=num_users, history=12)
    lengths = np.random.default_rng(3).integers(4, 13, num_users)
    whole = world.interactions
    place = np.concatenate([np.arange(count) for count in np.bincount(whole.user)])
    kept = place < lengths[whole.user]
    short = Interactions(whole.user[kept], whole.item[kept], whole.time[kept], whole.user_ids)
    return PreparedData(world.catalogue, short, world.manifest)


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
ACCELERATE = ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0", "-m")


def launch(folder: Path, *command: str, by: Sequence[str] = TORCHRUN) -> subprocess.Popen:
    """Two processes by `torchrun` or `accelerate launch`; what they print goes to FOLDER/launched.txt."""
    with (folder / "launched.txt").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", *by, *command],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The runs `one`, `two` (processes), `two-one` (stopped on two, resumed on one), ..., `sharded` (FSDP2), ..."""
    folder = tmp_path_factory.mktemp("distributed")
    recipe = RECIPE | {"backbone": str(save_tiny_backbone(folder / "backbone"))}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    varied_world().save(folder / "data")
    train_one(folder, "one")
    for name in ("one-two", "one-sharded"):
        train_one(folder, name, "stop")
    for jobs in (
        ["two", "two-one:stop", "one-two:resume"],
        ["--fsdp", "sharded", "sharded-one:stop", "one-sharded:resume"],
    ):
        both = launch(folder, "tests.training.distributed_worker", str(folder), *jobs)
        assert both.wait(timeout=500) == 0, (folder / "launched.txt").read_text()[-3000:]
    for name in ("two-one", "sharded-one"):
        train_one(folder, name, "resume")
    return folder


def curve(run: Path, *keys: str) -> list[tuple]:
    """(stage, step, value) of all log lines that have one of the keys."""
    return [
        (stage, entry["step"], entry[key])
        for stage, log in stage_logs(run).items()
        for entry, key in itertools.product(log, keys)
        if key in entry
    ]


@pytest.mark.parametrize("name", OTHERS)
def test_losses_metrics_and_weights_are_those_of_one_process(runs, name):
    for keys, tolerance in (
        (["loss"], 1e-4),
        (["grad_norm"], 1e-3),
        (["eval_NDCG@10", "eval_HR@10"], 1e-6),
        (["gate/image"], 1e-5),
    ):
        expected, got = curve(runs / "one", *keys), curve(runs / name, *keys)
        assert expected and [line[:2] for line in got] == [line[:2] for line in expected]
        assert [line[2] for line in got] == pytest.approx([line[2] for line in expected], abs=tolerance)
    models = [SpeederForCausalLM.from_pretrained(runs / run / "model") for run in ("one", name)]
    for (weight, wanted), (_, other) in zip(*(m.state_dict().items() for m in models), strict=True):
        torch.testing.assert_close(other, wanted, atol=1e-4, rtol=1e-3, msg=weight)


@pytest.mark.parametrize("name", OTHERS)
def test_files_are_those_of_one_process(runs, name):
    def files(run: Path) -> list[str]:
        paths = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()]
        return sorted(path for path in paths if "tfevents" not in path)

    assert files(runs / name) == files(runs / "one")
    assert (runs / name / "state.json").read_text() == (runs / "one" / "state.json").read_text()
    events = [len(list((runs / name).glob(f"stages/{stage}-*/runs/*/*"))) for stage in ("01", "02")]
    assert events == [1, 2 if "-" in name else 1], "one writes; a resumed stage has a second file"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 9))
@example([7, 5, 4, 4, 4], 2)
def test_a_batch_is_shared_whole_and_evenly(lengths, ranks):
    shares = share_batch(lengths, ranks)
    assert sorted(itertools.chain(*shares)) == list(range(len(lengths)))
    loads = [sum(lengths[place] for place in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths), "no one could give a sequence away and still have more"
    assert min(map(len, shares)) > 0 or len(lengths) < ranks


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), epoch=st.integers(0, 3), batch=st.integers(1, 12), ranks=st.integers(2, 5))
def test_every_number_of_processes_goes_through_the_same_batches(seed, epoch, batch, ranks):
    sequences = [np.arange(2 + user % 9) for user in range(30)]
    windows = TrainingSequences(sequences, CONFIG, "all")
    for index in range(len(windows)):
        assert windows.num_tokens(index) == len(windows[index].ids)

    def batches(rank: int, ranks: int, examples=windows) -> list[list[int]]:
        shared = SharedBatches(examples, batch, seed, rank, ranks)
        shared.set_epoch(epoch)
        assert len(list(shared)) == len(shared)
        return list(shared)

    whole, parts = batches(0, 1), [batches(rank, ranks) for rank in range(ranks)]
    assert sorted(itertools.chain(*whole)) == list(range(len(windows)))
    assert [sorted(itertools.chain(*shares)) for shares in zip(*parts, strict=True)] == [*map(sorted, whole)]
    plain = [windows[index] for index in range(len(windows))]  # as of examples that cannot tell their length
    assert batches(1, ranks, plain) == parts[1]


def test_sharding_where_accelerate_would_leave_it_out_is_refused(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    recipe, data = load_recipe(runs / "recipe.yaml"), PreparedData.load(runs / "data")
    with pytest.raises(SpeederError, match="FSDP: expected GPUs"):
        train(recipe, data, tmp_path / "run")


def process_of_rank(launcher: subprocess.Popen, rank: int) -> int | None:
    """The id of the launcher's process of that rank, once there is one."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    return None


@pytest.mark.slow
def test_all_end_when_one_is_killed_and_the_command_goes_on_from_there(runs):
    command = ["speeder.cli", "train", "--out", str(runs / "killed")]
    began = ["--data", str(runs / "data"), "--recipe", str(runs / "recipe.yaml")]
    launcher = launch(runs, *command, *began)
    deadline = time.monotonic() + 300
    while not list((runs / "killed").glob("stages/02-*/checkpoint-*/COMPLETE")):
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process_of_rank(launcher, 1), signal.SIGKILL)
    assert launcher.wait(timeout=200) != 0
    assert not (runs / "killed" / "model").exists(), "killed before the end"
    resumed = launch(runs, *command, "--resume", by=ACCELERATE)
    printed = runs / "launched.txt"
    assert resumed.wait(timeout=300) == 0, printed.read_text()[-3000:]
    assert printed.read_text().count("the recommender. Evaluate it") == 1
    losses = [[line[2] for line in curve(runs / name, "loss")] for name in ("one", "killed")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_processes_draw_differently_and_the_first_as_alone():
    draws = []
    for process, step in ((0, 0), (1, 0), (0, 5), (1, 5)):
        torch.manual_seed(3)
        state = SimpleNamespace(global_step=step)
        OwnDraws().on_train_begin(SimpleNamespace(process_index=process, seed=3), state, None)
        draws.append(float(torch.rand(())))
    assert len(set(draws)) == 4
    torch.manual_seed(3)
    assert draws[0] == float(torch.rand(()))
