"""Gate weights by group of items: rare and frequent, new and old."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from speeder.data.catalogue import ItemCatalogue
from speeder.data.interactions import Split
from speeder.evaluation.slices import quantile_slices
from speeder.model.modeling import SpeederForCausalLM

_PARTS = 4
ALL, NEVER = "all items", "never in training"


@dataclass(frozen=True)
class Gates:
    """Gate weights of a model's items.

    Attributes:
        weights: modality -> `(I,)` float32, 0 where an item lacks it; they sum to 1 for each item.
        present: modality -> `(I,)` bool.
        groups: label -> `(I,)` bool: all items, those that never occur in training, and the others by frequency.
    """

    weights: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    groups: dict[str, np.ndarray]

    def mean(self, group: str) -> dict[str, float]:
        """Modality -> mean weight over a group's items."""
        member = self.groups[group]
        return {name: float(weights[member].mean()) for name, weights in self.weights.items()}

    def share(self, group: str, modality: str) -> float:
        """The share of a group's items that have a modality."""
        return float(self.present[modality][self.groups[group]].mean())

    def of_present(self) -> dict[str, np.ndarray]:
        """Modality -> weights of the items that have it; without modalities that no item has."""
        found = {name: weights[self.present[name]] for name, weights in self.weights.items()}
        return {name: weights for name, weights in found.items() if len(weights)}


def read_gates(
    model: SpeederForCausalLM,
    split: Split | None,
    catalogue: ItemCatalogue | None,
    added: str = "added after training",
) -> Gates:
    """The gate weights of a model's items, grouped by the training part of a split.

    Args:
        split, catalogue: of the run's data; without them all items are one group.
        added: label of the model's items that are not in that catalogue.
    """
    weights = {name: column.numpy() for name, column in model.gates().items()}
    present = {name: mask.numpy() for name, mask in model.mrc.presence().items()}
    count = len(model.catalogue)
    groups = {ALL: np.ones(count, dtype=bool)}
    if split is not None and catalogue is not None:
        groups |= item_groups(_counts(split, count), len(catalogue), added)
    return Gates(weights, present, groups)


def item_groups(counts: np.ndarray, num_known: int, added: str) -> dict[str, np.ndarray]:
    """Groups of items by their frequency in training, from new items to the most frequent.

    Args:
        counts: `(I,)` occurrences in training.
        num_known: number of items, from the first on, that existed at training time.
        added: label of the others.

    Returns:
        label -> `(I,)` bool; disjoint, and every item is in one.
    """
    is_new = np.arange(len(counts)) >= num_known
    groups = {added: is_new, NEVER: (counts == 0) & ~is_new}
    seen = np.flatnonzero((counts > 0) & ~is_new)
    if len(seen):
        for label, member in quantile_slices(counts[seen], _PARTS, "times").items():
            groups[label] = np.zeros(len(counts), dtype=bool)
            groups[label][seen[member]] = True
    return {label: member for label, member in groups.items() if member.any()}


def _counts(split: Split, num_items: int) -> np.ndarray:
    training = split.training()
    flat = np.concatenate(training) if training else np.zeros(0, dtype=np.int64)
    return np.bincount(flat, minlength=num_items)
