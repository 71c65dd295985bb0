"""An exponential moving average (EMA) of the weights, which is evaluated and saved instead of the last step's weights.

The average of the weights over the steps generalises better than the weights of any one step (Polyak averaging). On
small data, where the last steps of an epoch still change the ranking, the gain is large.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from speeder.training.fsdp import local, shard_like, whole

AVERAGE_FILE = "average.safetensors"  # beside a checkpoint's weights, which are those of its step


class WeightAverage(TrainerCallback):
    """Keeps the moving average of the weights that a stage trains, updated after every optimizer step.

    Args:
        decay: share of the average that a step keeps. Early steps keep less, `(1 + t) / (10 + t)` after `t` steps, so
            that the average does not depend on the initial weights for long.

    Attributes:
        skipped_steps: steps that changed no weight, and do not change the average (`BadBatches`).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.skipped_steps: set[int] = set()
        self.average = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def _parameters(self) -> list[torch.Tensor]:
        """The weights, or this process's shards of them; the average is sharded in the same way."""
        parameters = dict(self.model.named_parameters())
        for name, average in self.average.items():
            if type(parameters[name].data) is not type(average):
                self.average[name] = shard_like(average, parameters[name].data)
        return [local(parameters[name].detach()) for name in self.average]

    def _averages(self) -> list[torch.Tensor]:
        return [local(average) for average in self.average.values()]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.skipped_steps:
            return
        keep = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        parameters = self._parameters()
        torch._foreach_lerp_(self._averages(), parameters, 1.0 - keep)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Make the average the model's weights."""
        parameters = self._parameters()
        for parameter, average in zip(parameters, self._averages(), strict=True):
            parameter.copy_(average)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The average as the model's weights in this context, the weights of the last step afterwards."""
        weights = [parameter.clone() for parameter in self._parameters()]
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in zip(self._parameters(), weights, strict=True):
                    parameter.copy_(weight)

    def save(self, folder: str | Path, write: bool = True) -> None:
        """Write the average beside a checkpoint; all processes must call it, and one writes."""
        tensors = {name: whole(tensor).contiguous() for name, tensor in self.average.items()}
        if write:
            save_file(tensors, Path(folder) / AVERAGE_FILE)

    def load(self, folder: str | Path) -> None:
        """Load the average from a checkpoint.

        Raises:
            FileNotFoundError: the checkpoint has none. KeyError: it lacks a trained weight.
        """
        saved = load_file(Path(folder) / AVERAGE_FILE)
        for name, tensor in self.average.items():
            local(tensor).copy_(local(shard_like(saved[name].reshape(tensor.shape), tensor)))
