"""Content neighbours: the items whose texts are most like the history's. Fitted on nothing, so new items are as old."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F


class ContentNeighbours:
    """Scores an item by the cosine between its features and the mean of the history's, each scaled to length 1.

    Items without the features score as -1, and are left out of the mean; a history with none scores all items alike.

    Args:
        features: `(I, F)`, of one modality.
        present: `(I,)` bool.
        max_history: items of a history that are read, the newest ones; None reads all.
        training_hash: of the split that it is measured on. It learned from no interaction, so any will do.
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
        """`(n, I)` float32 cosines."""
        means = []
        for history in histories:
            read = np.asarray(history, dtype=np.int64)[-self.max_history if self.max_history else None :]
            means.append(self.rows[torch.from_numpy(read)].sum(dim=0))
        scores = F.normalize(torch.stack(means), dim=1) @ self.rows.T
        return scores.masked_fill(~self.present, -1.0)
