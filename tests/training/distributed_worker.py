"""What test_distributed.py starts by `torchrun`: one training after another, on all processes.

    torchrun ... -m tests.training.distributed_worker FOLDER [--fsdp] RUN[:stop|:resume] ...

A run with `:stop` ends after the second stage's first checkpoint. FOLDER holds `data` and `recipe.yaml`.
"""

import os
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from speeder.data import PreparedData
from speeder.model.modeling import SpeederForCausalLM
from speeder.recipes.load import load_recipe
from speeder.training.callbacks import CheckpointMarker
from speeder.training.train import train


class Stop(Exception):
    """Ends a training in the middle of its second stage."""


def train_one(folder: Path, name: str, how: str = "") -> SpeederForCausalLM | None:
    """Train FOLDER's recipe into FOLDER/name; the model, or None of a run that is stopped."""
    data, recipe = PreparedData.load(folder / "data"), load_recipe(folder / "recipe.yaml")
    if how != "stop":
        return train(recipe, data, folder / name, resume=how == "resume")
    marked = CheckpointMarker.on_save

    def stop_in_stage_2(self, args, state, control, **kwargs):
        marked(self, args, state, control, **kwargs)
        if Path(args.output_dir).name.startswith("02"):
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointMarker, "on_save", stop_in_stage_2)
        with pytest.raises(Stop):
            train(recipe, data, folder / name)
    return None


def shard_on_cpus() -> None:
    """Ask for FSDP2 as `accelerate launch` does, and take away that Accelerate leaves it out, untold, on CPUs."""
    asked = {"VERSION": "2", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "RESHARD_AFTER_FORWARD": "true"}
    asked |= {"CPU_RAM_EFFICIENT_LOADING": "false"}
    os.environ |= {"ACCELERATE_USE_FSDP": "true"} | {f"FSDP_{key}": value for key, value in asked.items()}
    make = AcceleratorState.__init__

    def make_sharding(self, *args, **kwargs):
        if PartialState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        make(self, *args, **kwargs)

    AcceleratorState.__init__ = make_sharding


if __name__ == "__main__":
    jobs = sys.argv[2:]
    if sharded := "--fsdp" in jobs:
        jobs.remove("--fsdp")
        shard_on_cpus()
    for job in jobs:
        name, _, how = job.partition(":")
        train_one(Path(sys.argv[1]), name, how)
    PartialState().destroy_process_group()
    if sharded:
        # That joined Gloo's threads, but for those of FSDP's groups, which DTensor's caches hold on to: one that wants
        # the interpreter while it ends would abort the process. So it ends at once.
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)
