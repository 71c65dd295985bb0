"""The base of title generation and yes/no: they train on candidates, and are validated on candidates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from speeder.baselines.text.base import TextBaseline
from speeder.data.interactions import Split
from speeder.data.item_indices import item_indices
from speeder.errors import SpeederError
from speeder.evaluation.candidates import Candidates, draw_items
from speeder.evaluation.metrics import metric_values

VALIDATION_USERS = 100  # of those that checkpoints are chosen by: one user costs these baselines many passes


class CandidateBaseline(TextBaseline):
    """A text baseline that ranks candidates, not a whole catalogue."""

    ranks_catalogue = False

    def training_negatives(self, number: int, count: int, whole: np.ndarray) -> list[int]:
        """Negatives of a training example, by its number: the same in every epoch and after a resume.

        They are outside the user's training part. A held-out item may be among them: leaving it out would reveal it.
        """
        known = set(whole.tolist())
        count = min(count, len(self.catalogue) - len(known))
        return draw_items(0, "training", number, count, len(self.catalogue), known)

    def validation_metrics(self, split: Split) -> dict[str, float]:
        """NDCG@10 and HR@10 among 1 + 19 candidates, for evenly spaced validation users."""
        targets, histories = np.asarray(split.targets("validation")), split.histories("validation")
        count = min(self.config.num_candidates - 1, len(self.catalogue) - max(map(len, histories)) - 1)
        if count < 1:
            raise SpeederError("validation: a user has seen all items, which leaves no negatives")
        rows = np.unique(np.linspace(0, len(targets) - 1, min(VALIDATION_USERS, len(targets))).astype(int))
        drawn = Candidates.draw(split, "validation", len(self.catalogue), count, rows=rows)
        histories, targets = [histories[row] for row in rows], targets[rows]
        ranks = self.target_places(histories, drawn.listed(targets), targets)
        return {name: float(metric_values(ranks, name).mean()) for name in ("NDCG@10", "HR@10")}

    def target_places(
        self, histories: Sequence[np.ndarray], candidates: np.ndarray, targets: np.ndarray
    ) -> np.ndarray:
        """Each target's rank among its candidates, `(n,)` int64."""
        raise NotImplementedError

    def _check_histories(self, histories: Sequence[Sequence[int | str]], may_be_empty: bool = False) -> None:
        raise SpeederError(f"{self.name} ranks candidates alone, not a whole catalogue")

    def _newest(self, history: Sequence[int]) -> list[int]:
        return item_indices("history", history)[-self.config.max_history :]
