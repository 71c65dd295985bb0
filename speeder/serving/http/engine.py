"""What the batcher's thread runs: recommendations for several users at once, and explanations one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from speeder.model.content import read_once
from speeder.model.explain import Explanation, explain
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.recommend import Recommendation


@dataclass(frozen=True)
class RecommendJob:
    """A checked request: item indices of a history, oldest first, and the number of items to recommend.

    The catalogue has at least `k` items, less those of the history where `exclude_seen`.
    """

    history: tuple[int, ...]
    k: int
    exclude_seen: bool


@dataclass(frozen=True)
class ExplainJob:
    """A checked request: item indices of a history, and of the items to explain."""

    history: tuple[int, ...]
    items: tuple[int, ...]


class Engine:
    """Runs the model. Once made, it must be used by one thread only."""

    def __init__(self, model: SpeederForCausalLM, threads: int | None = None):
        self.model, self._threads = model.eval(), threads

    def warm_up(self) -> None:
        """Compute what is kept between requests, in the serving thread."""
        if self._threads is not None:  # OpenMP has a thread count for each calling thread
            torch.set_num_threads(self._threads)
        self.model.recommend([[0]], k=1, exclude_seen=False)

    @torch.no_grad()
    @read_once()
    def recommend(self, jobs: Sequence[RecommendJob]) -> list[list[Recommendation]]:
        """The results of several requests by one pass through the backbone.

        Raises:
            ValueError: a score is NaN or infinite.
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
            raise ValueError("the model gave a score that is not finite")
        return results

    def explain(self, jobs: Sequence[ExplainJob]) -> list[list[Explanation]]:
        """Explanations, one request after the other: each is a batch of histories of its own."""
        return [explain(self.model, job.history, job.items) for job in jobs]


def _by_k(jobs: Sequence[RecommendJob], seen: list[list[int]], items: int) -> list[tuple[int, list[int]]]:
    """Pairs of `k` and the rows to rank with it: the largest `k` for all rows that have that many unseen items."""
    deepest = max(job.k for job in jobs)
    together = [row for row in range(len(jobs)) if items - len(seen[row]) >= deepest]
    alone = [(jobs[row].k, [row]) for row in range(len(jobs)) if items - len(seen[row]) < deepest]
    return ([(deepest, together)] if together else []) + alone
