"""The Hugging Face `Trainer` of every stage: its optimizer, its evaluation by ranking, its checkpoints."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback

from speeder.averaging import WeightAverage
from speeder.data.interactions import LeaveOneOut

COMPLETE = "COMPLETE"  # marker file of a checkpoint that was written to its end


class SpeederTrainer(Trainer):
    """A `Trainer` whose evaluation is the model's own ranking of the validation items.

    Args:
        split: whose validation items are ranked.
        parameter_groups: AdamW's.
        average: the moving average of the weights, which is what is evaluated and chosen by; None: the weights are.
    """

    def __init__(
        self,
        *args,
        split: LeaveOneOut,
        parameter_groups: list[dict],
        average: WeightAverage | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.split, self.parameter_groups, self.average = split, parameter_groups, average
        if average is not None:
            self.add_callback(average)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.parameter_groups, betas=(0.9, 0.98), fused=True)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Every line about the loss also tells each modality's mean gate weight."""
        if "loss" in logs:
            gates = self.accelerator.unwrap_model(self.model).gates()
            logs |= {f"gate/{name}": float(weights.mean()) for name, weights in gates.items()}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model)
        weights = contextlib.nullcontext() if self.average is None else self.average.in_model()
        with weights, self.autocast_smart_context_manager():
            found = model.validation_metrics(self.split)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # the catalogue lies in the prepared data and with the finished model; a checkpoint needs the weights alone
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(output_dir, state_dict=state_dict, save_catalogue=False)
        if self.average is not None:
            self.average.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average is not None:
            self.average.load(self.state.best_model_checkpoint)


class CheckpointMarker(TrainerCallback):
    """Marks a checkpoint as whole after its last file was written."""

    def on_save(self, args, state, control, **kwargs):
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()
