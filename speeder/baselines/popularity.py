"""Popularity: every user gets the items that occur most often in training."""

from collections.abc import Sequence

import numpy as np
import torch

from speeder.data.fingerprints import training_hash
from speeder.data.item_indices import item_array


class Popularity:
    """Scores an item by its count in the training sequences, independent of the history.

    Attributes:
        label: the name of its row in tables.
        counts: (I,) float32.
        training_hash: hash of what it was fitted on, for the leak check.
    """

    label = "popularity"

    def __init__(self, training_sequences: Sequence[Sequence[int]], num_items: int) -> None:
        flat = np.concatenate(
            [item_array("training_sequences", sequence) for sequence in training_sequences] or [[]]
        )
        if len(flat) and not 0 <= flat.min() <= flat.max() < num_items:
            raise IndexError(
                f"training_sequences: expected items in 0..{num_items - 1}, got {flat.min()}..{flat.max()}"
            )
        counts = np.bincount(flat.astype(np.int64), minlength=num_items)
        self.counts = torch.from_numpy(counts).to(torch.float32)
        self.training_hash = training_hash(training_sequences)

    def score(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """(n, I) float32: the same counts in every row."""
        return self.counts.expand(len(histories), -1)
