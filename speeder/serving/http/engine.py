"""What the batcher's thread does with the model: recommend for several users at once, explain for one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from speeder.model.explain import Explanation, explain
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.recommend import Recommendation


@dataclass(frozen=True)
class RecommendJob:
    """A checked request: item indices of a history, oldest first, and how many items are asked for.

    The catalogue has at least `k` items, less those of the history where `exclude_seen`.
    """

    history: tuple[int, ...]
    k: int
    exclude_seen: bool


@dataclass(frozen=True)
class ExplainJob:
    """A checked request: item indices of a history, and of the items that are to be explained."""

    history: tuple[int, ...]
    items: tuple[int, ...]


class Engine:
    """A model at work. After it was made, one thread alone may use it."""

    def __init__(self, model: SpeederForCausalLM, threads: int | None = None):
        self.model, self._threads = model.eval(), threads

    def warm_up(self) -> None:
        """Compute what is kept between requests, in the thread that will serve them."""
        if self._threads is not None:  # OpenMP counts threads for each thread that starts some
            torch.set_num_threads(self._threads)
        self.model.recommend([[0]], k=1, exclude_seen=False)

    @torch.no_grad()
    def recommend(self, jobs: Sequence[RecommendJob]) -> list[list[Recommendation]]:
        """The results of several requests by one pass through the backbone.

        Raises:
            ValueError: a score is no number.
        """
        model, vectors = self.model, self.model._vectors()
        states = torch.cat(list(model.user_states([job.history for job in jobs], batch_size=len(jobs))))
        seen = [sorted(set(job.history)) if job.exclude_seen else [] for job in jobs]
        results: list[list[Recommendation]] = [[] for _ in jobs]
        for k, rows in _by_k(jobs, seen, len(model.catalogue)):
            found = model._best(states[rows], vectors, k, [seen[row] for row in rows])
            for row, items in zip(rows, found, strict=True):
                results[row] = items[: jobs[row].k]
        if not all(math.isfinite(item.score) for items in results for item in items):
            raise ValueError("the model gave a score that is no finite number")
        return results

    def explain(self, jobs: Sequence[ExplainJob]) -> list[list[Explanation]]:
        """Explanations, one request after the other: each is a batch of histories by itself."""
        return [explain(self.model, job.history, job.items) for job in jobs]


def _by_k(jobs: Sequence[RecommendJob], seen: list[list[int]], items: int) -> list[tuple[int, list[int]]]:
    """Rows to rank together, and how deep: the deepest request's, for all that have so many items left."""
    deepest = max(job.k for job in jobs)
    together = [row for row in range(len(jobs)) if items - len(seen[row]) >= deepest]
    alone = [(jobs[row].k, [row]) for row in range(len(jobs)) if items - len(seen[row]) < deepest]
    return ([(deepest, together)] if together else []) + alone
