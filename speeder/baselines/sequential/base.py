"""What the sequential baselines share: scores, files, and the checks of what comes in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from speeder.data.item_indices import item_array
from speeder.errors import SpeederError
from speeder.io.files import read_json
from speeder.io.tensors import load_tensors, save_tensors
from speeder.recipes.sasrec import SASRecConfig


class SequentialModel(nn.Module):
    """A model whose state after a history is compared with every item's embedding. `fit_sequential` trains one.

    A kind of model says what it reads (`examples`, `states`) and the state after each history (`last_states`).

    Attributes:
        name: of its recipe (`baseline: …`) and of its folder. label: of its row in tables.
        config_class: of its settings.
        training_hash: hash of what it was fitted on, for the leak check; None if it was not fitted.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    config_class: ClassVar[type[SASRecConfig]]

    def __init__(self, num_items: int, config: SASRecConfig | None = None) -> None:
        super().__init__()
        if num_items < 1:
            raise ValueError(f"num_items: expected at least 1, got {num_items}")
        config = config or self.config_class()
        if type(config) is not self.config_class:
            wanted, got = self.config_class.__name__, type(config).__name__
            raise TypeError(f"config: expected {wanted}, got {got}")
        self.num_items, self.config = num_items, config
        self.training_hash: str | None = None
        self.items = nn.Embedding(num_items, config.hidden_size)

    def examples(self, windows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The training examples of windows of histories, each of at most ``max_length + 1`` items."""
        raise NotImplementedError

    def states(self, examples: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """A batch of examples -> states (n, hidden_size) and the items (n,) int64 that these are to predict."""
        raise NotImplementedError

    def last_states(self, items_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Histories (B, L) int64, padded on the right with any item -> (B, hidden_size), their last states."""
        raise NotImplementedError

    @torch.inference_mode()
    def score(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Histories of item indices, oldest first -> (n, I) float32 scores on the CPU.

        Raises:
            ValueError: an empty history.
            TypeError: an item is not an integer.
            IndexError: an item outside the catalogue.
        """
        if not len(histories):
            return torch.empty(0, self.num_items)
        device = self.items.weight.device
        tails = [item_array("histories", history)[-self.config.max_length :] for history in histories]
        check_sequences("histories", tails, self.num_items)
        lengths = torch.tensor([len(tail) for tail in tails], device=device)
        if not lengths.all():
            raise ValueError(
                f"histories: expected at least one item each, number {int(lengths.argmin())} is empty"
            )
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            last = self.last_states(pad(tails).to(device), lengths)
        finally:
            for module, mode in modes:
                module.training = mode
        return (last @ self.items.weight.T).float().cpu()

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``model.safetensors`` and ``config.json`` into a folder, each atomically.

        The configuration has the weights' SHA-256, so that an interrupted save is noticed on loading.
        """
        weights = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        config = {
            "baseline": self.name,
            "num_items": self.num_items,
            "training_hash": self.training_hash,
            "config": asdict(self.config),
        }
        save_tensors(Path(folder), weights, config, "weights")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self:
        """Read what ``save`` wrote, in evaluation mode on the CPU.

        Raises:
            SpeederError: a file is missing or damaged, the two do not belong together, or another kind of model.
        """
        folder = Path(folder)
        saved = read_json(folder / "config.json")
        try:
            cls._check_kind(saved)
            weights = load_tensors(folder, saved["weights"])
            model = cls(saved["num_items"], cls.config_class(**saved["config"]))
            model.load_state_dict(weights)
            model.training_hash = saved["training_hash"]
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise SpeederError(f"{folder}: not a saved {cls.__name__}: {error}") from error
        return model.eval()

    @classmethod
    def _check_kind(cls, saved: dict[str, Any]) -> None:
        kind = saved.get("baseline", "sasrec")  # 0.1.0 had SASRec alone, and did not write it
        if kind != cls.name:
            raise ValueError(f"baseline: expected {cls.name!r}, got {kind!r}")


def pad(sequences: Sequence[np.ndarray]) -> Tensor:
    """Sequences of items -> (n, longest) int64, padded on the right with item 0, which nothing reads."""
    return nn.utils.rnn.pad_sequence([torch.from_numpy(sequence) for sequence in sequences], batch_first=True)


def check_sequences(name: str, sequences: Sequence[np.ndarray], num_items: int) -> None:
    """Raise IndexError unless every item of every sequence lies in ``0..num_items-1``."""
    for number, sequence in enumerate(sequences):
        if len(sequence) and not 0 <= sequence.min() <= sequence.max() < num_items:
            raise IndexError(
                f"{name}: expected items in 0..{num_items - 1}, "
                f"number {number} has {sequence.min()}..{sequence.max()}"
            )
