"""A sequential baseline's training checkpoint: one file to resume from, with the same result."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from speeder.errors import SpeederError
from speeder.io.files import atomic_path


@dataclass
class FitState:
    """The progress of training.

    Attributes:
        epoch, step: finished epochs and steps. best, best_epoch: the highest validation NDCG@10 and its epoch.
        records: the log record of each epoch.
    """

    epoch: int = 0
    step: int = 0
    best: float = -1.0
    best_epoch: int = 0
    records: list[dict] = field(default_factory=list)


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    best_weights: dict[str, Tensor] | None,
    progress: FitState,
    rng: np.random.Generator,
    identity: str,
) -> None:
    """Write everything, random states included, into one safetensors file, whole or not at all.

    Args:
        identity: identifies this training; `load_checkpoint` requires the same.
    """
    groups = {"model": model.state_dict(), "best": best_weights or {}}
    for number, weight in enumerate(model.parameters()):
        groups[f"optimizer/{number}"] = optimizer.state[weight]
    tensors = {
        f"{group}/{name}": value.detach().cpu().contiguous()
        for group, values in groups.items()
        for name, value in values.items()
    }
    tensors["random/cpu"] = torch.get_rng_state()
    device = next(model.parameters()).device
    if device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    state = {"identity": identity, "progress": asdict(progress), "rng": rng.bit_generator.state}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"state": json.dumps(state)})


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
    identity: str,
) -> tuple[FitState, dict[str, Tensor] | None]:
    """Restore a model, an optimizer and both random states from `save_checkpoint`'s file.

    Returns:
        the progress, and the best epoch's weights (None without validation).

    Raises:
        SpeederError: the file is damaged, or of another training.
    """
    try:
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        if state["identity"] != identity:
            raise SpeederError(f"{path}: is a checkpoint of another training (settings, seed or data differ)")
        device = next(model.parameters()).device
        model.load_state_dict(_group(tensors, "model"))
        for number, weight in enumerate(model.parameters()):
            moments = _group(tensors, f"optimizer/{number}")
            optimizer.state[weight] = {name: value.to(weight.device) for name, value in moments.items()}
        torch.set_rng_state(tensors["random/cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random/cuda"], device)
        rng.bit_generator.state = state["rng"]
        best = {name: value.to(device) for name, value in _group(tensors, "best").items()}
        return FitState(**state["progress"]), best or None
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise SpeederError(f"{path}: not a checkpoint of this {type(model).__name__}: {error}") from error


def _group(tensors: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    start = group + "/"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
