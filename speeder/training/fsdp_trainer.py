"""The `Trainer` of a stage under FSDP2 (`accelerate launch --use_fsdp --fsdp_version 2`)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from speeder.errors import SpeederError
from speeder.training.fsdp import (
    gather,
    load_optimizer_state,
    scatter,
    touch_unsharded,
    whole_optimizer_state,
)
from speeder.training.trainer import SpeederTrainer


def sharding_is_asked() -> bool:
    """Whether the launcher requests FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


class ShardedTrainer(SpeederTrainer):
    """Trains a copy of the model, made by `copy_for_sharding`, which Accelerate shards.

    Args:
        plain: the whole model, which gets the weights for evaluation and saving. It stays on the CPU otherwise.

    Raises:
        SpeederError: Accelerate does not shard here, as on CPUs, or would use the first version of FSDP.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
            raise SpeederError(
                "FSDP: expected GPUs, --fsdp_version 2 and --fsdp_cpu_ram_efficient_loading false; got "
                + ("no GPU" if plugin is None else f"version {plugin.fsdp_version}, "
                   f"cpu_ram_efficient_loading {plugin.cpu_ram_efficient_loading}")
            )  # fmt: skip

    def compute_loss(self, model, inputs, return_outputs: bool = False, *args, **kwargs):
        found = super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        loss, *outputs = found if return_outputs else (found,)
        loss = loss + touch_unsharded(model)
        return (loss, *outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            gather(self.model, self.plain, only="mrc.")
        super().log(logs, *args, **kwargs)

    def _validation_metrics(self) -> dict[str, float]:
        self.gather()
        self.plain.to(self.args.device)
        try:
            return super()._validation_metrics()
        finally:
            self.plain.to("cpu")

    def gather(self) -> None:
        gather(self.model, self.plain)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.gather()
        self._save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self._as_if_whole(super()._load_from_checkpoint, resume_from_checkpoint)

    def _load_best_model(self, *args, **kwargs) -> None:
        self._as_if_whole(super()._load_best_model, *args, **kwargs)

    def _as_if_whole(self, load, *args, **kwargs) -> None:
        """Let the `Trainer` load into the whole model, then shard its weights."""
        sharded, self.model, self.is_fsdp_enabled = self.model, self.plain, False
        try:
            load(*args, **kwargs)
        finally:
            self.model, self.is_fsdp_enabled = sharded, True
        scatter(self.plain, self.model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        load_optimizer_state(self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
