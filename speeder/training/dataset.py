"""Training examples: windows of users' histories, and their next items."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch.utils.data import Dataset

from speeder.data.interactions import Split
from speeder.errors import SpeederError
from speeder.model.config import SpeederConfig
from speeder.model.sequences import TokenSequence, build_sequence


class TrainingSequences(Dataset):
    """Users' training parts, cut from the newest end into windows of `max_history` items and the next one.

    Args:
        sequences: item indices by user, oldest first; those with fewer than two items have no target and are left out.
        example: makes one example from the window, the example's number and the user's whole sequence; by default
            `build_sequence`.
        per_window: examples per window.
    """

    def __init__(
        self,
        sequences: list[np.ndarray],
        config: SpeederConfig,
        supervision: str,
        example: Callable[[list[int], int, np.ndarray], TokenSequence] | None = None,
        per_window: int = 1,
    ):
        self.config, self.supervision = config, supervision
        self.example, self.per_window = example, per_window
        self.windows: list[np.ndarray] = []
        self.whole: list[np.ndarray] = []  # of the user of each window
        for sequence in sequences:
            if supervision == "last":  # one example per item with a history
                ends = range(len(sequence), 1, -1)
            else:  # windows share one item, so that each item but a user's first is a target once
                ends = range(len(sequence), 1, -config.max_history)
            self.windows += [sequence[max(0, end - config.max_history - 1) : end] for end in ends]
            self.whole += [sequence] * len(ends)
        if not self.windows:
            raise SpeederError(
                "training data: expected a user with at least two training interactions, got none"
            )

    def __len__(self) -> int:
        return len(self.windows) * self.per_window

    def __getitem__(self, index: int) -> TokenSequence:
        window = index // self.per_window
        *history, target = self.windows[window].tolist()
        if self.example is not None:
            return self.example([*history, target], index, self.whole[window])
        return build_sequence(history, self.config, target, self.supervision)

    def num_tokens(self, index: int) -> int:
        """Length of an example in tokens."""
        if self.example is not None:
            return len(self[index].ids)
        config = self.config
        text = len(config.prompt_prefix) + len(config.prompt_suffix)
        return text + config.tokens_per_item * len(self.windows[index // self.per_window])


def occurs(sequences: list[np.ndarray], num_items: int) -> np.ndarray:
    """Whether each item is in any of users' training parts, as a target or before one: `(num_items,)` bool."""
    read = [sequence for sequence in sequences if len(sequence) > 1]  # a single event has nothing to predict
    return np.bincount(np.concatenate([np.zeros(0, dtype=np.int64), *read]), minlength=num_items) > 0


def check_users(split: Split) -> None:
    """Raise `SpeederError` unless there are users to train on and users to validate on."""
    if not any(len(sequence) > 1 for sequence in split.training()):
        raise SpeederError(
            "training data: expected a user with at least two training interactions, got none; the split is"
            f" {split.rule}"
        )
    if not len(split.users("validation")):
        raise SpeederError(
            "training data: expected a user with a validation item, which is ranked at each checkpoint, got none;"
            f" {split.requirement}"
        )


def target_counts(sequences: list[np.ndarray], num_items: int) -> np.ndarray:
    """How often each item is a target in an epoch over users' training parts: `(num_items,)` int64."""
    return np.bincount(np.concatenate([sequence[1:] for sequence in sequences]), minlength=num_items)
