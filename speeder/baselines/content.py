"""Content neighbours: the items with the features most similar to the history's. Nothing is fitted, so new items count
as much as old ones."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from speeder.data.item_indices import item_array


class ContentNeighbours:
    """Scores an item by the cosine between its features and the mean of the history's, each scaled to length 1.

    Items without the features score -1 and are left out of the mean. If no item of the history has the features, all
    items score the same.

    Args:
        features: `(I, F)`, of one modality.
        present: `(I,)` bool.
        max_history: newest items of a history that are read; None reads all.
        training_hash: of the split that it is evaluated on. Nothing is fitted on interactions, so any will do.
    """

    label = "content neighbours"

    def __init__(
        self,
        features: torch.Tensor,
        present: torch.Tensor,
        max_history: int | None = None,
        training_hash: str | None = None,
    ):
        self.rows = F.normalize(features.float(), dim=1) * present[:, None]
        self.present, self.max_history, self.training_hash = present, max_history, training_hash

    def score(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """`(n, I)` float32 cosines; raises `TypeError` or `IndexError` for what is no item of the catalogue."""
        means = []
        for history in histories:
            read = item_array("histories", history)[-self.max_history if self.max_history else None :]
            if len(read) and not 0 <= read.min() <= read.max() < len(self.rows):
                raise IndexError(
                    f"histories: expected items in 0..{len(self.rows) - 1}, got {read.min()}..{read.max()}"
                )
            means.append(self.rows[torch.from_numpy(read)].sum(dim=0))
        scores = F.normalize(torch.stack(means), dim=1) @ self.rows.T
        return scores.masked_fill(~self.present, -1.0)
