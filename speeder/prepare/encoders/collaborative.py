"""Collaborative features: one vector per item from users' sequences, fitted on the training part only."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from speeder.baselines.sasrec.fit import fit_sasrec
from speeder.data.fingerprints import training_hash
from speeder.data.item_indices import item_array
from speeder.recipes.load import settings_for
from speeder.recipes.sasrec import SASRecConfig


class CollaborativeFeatures(NamedTuple):
    """Features of every item, and the hash of what they were fitted on.

    Attributes:
        features: (I, dim) float32, with mean 0 and variance 1 in each dimension over present items; zeros elsewhere.
        present: (I,) bool, whether the item occurs in training.
        training_hash: for ``speeder.evaluation.leaks.check_training_hash``.
    """

    features: torch.Tensor
    present: torch.Tensor
    training_hash: str


def collaborative_features(
    training_sequences: Sequence[Sequence[int]],
    num_items: int,
    dim: int = 64,
    seed: int = 0,
    epochs: int = 10,
    config: SASRecConfig | None = None,
) -> CollaborativeFeatures:
    """Item embeddings of a cross-entropy SASRec, trained for a fixed number of epochs.

    There is no early stopping, so no held-out interaction affects the features, not even through the number of epochs.

    Args:
        training_sequences: every user's training part, oldest first, as from ``Split.training``.
        num_items: I, the catalogue's size.
        dim: the width of the features; a multiple of ``config.heads``.
        seed: fixes the result.
        epochs: number of training epochs.
        config: SASRec's other sizes and rates; by default those for the data (`settings_for`). Its hidden size, epochs
            and patience are not used.

    Raises:
        ValueError: no sequence has two items.
        IndexError: an item outside ``0..num_items-1``.
    """
    config = replace(config or settings_for(training_sequences), hidden_size=dim)
    model = fit_sasrec(
        training_sequences,
        num_items,
        config,
        epochs=epochs,
        seed=seed,
        description="collaborative features",
    )
    present = torch.zeros(num_items, dtype=torch.bool)
    present[
        torch.from_numpy(
            np.concatenate([item_array("training_sequences", row) for row in training_sequences])
        )
    ] = True
    known = model.items.weight.detach().float().cpu()[present]
    deviation = known.std(dim=0, correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    features = torch.zeros(num_items, dim)
    features[present] = (known - known.mean(dim=0)) / deviation
    return CollaborativeFeatures(features, present, training_hash(training_sequences))
