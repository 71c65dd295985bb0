"""What the batcher's thread runs: recommendations for several users at once, and explanations one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from speeder.model.choice import EVERYTHING, Choice
from speeder.model.content import reading_once
from speeder.model.explain import Explanation, explain
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.queries import Queries
from speeder.model.recommend import Recommendation


@dataclass(frozen=True)
class RecommendJob:
    """A checked request: item indices of a history, oldest first, and the number of items to recommend.

    There are at least `k` items that may be chosen, less those of the history where `exclude_seen`. A job without a
    history gets the items most frequent in training.
    """

    history: tuple[int, ...]
    k: int
    exclude_seen: bool
    choice: Choice = EVERYTHING

    def hidden(self) -> list[int]:
        """The items that are not recommended, rising."""
        return self.choice.hidden(self.history if self.exclude_seen else ())


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
    @reading_once(lambda self: self.model)
    def recommend(self, jobs: Sequence[RecommendJob]) -> list[list[Recommendation]]:
        """The results of several requests by one pass through the backbone.

        Raises:
            ValueError: a score is NaN or infinite.
        """
        results = [[] if job.history else self.model.popular(job.k, job.hidden(), job.choice) for job in jobs]
        read = [row for row, job in enumerate(jobs) if job.history]
        if read:
            for row, items in zip(read, self._read([jobs[row] for row in read]), strict=True):
                results[row] = items
        if not all(math.isfinite(item.score) for items in results for item in items):
            raise ValueError("the model gave a score that is not finite")
        return results

    def _read(self, jobs: Sequence[RecommendJob]) -> list[list[Recommendation]]:
        """The results of jobs with a history."""
        model, vectors = self.model, self.model.scoring_table()
        queries = Queries.cat(model.user_states([job.history for job in jobs], batch_size=len(jobs)))
        hidden = [job.hidden() for job in jobs]
        results: list[list[Recommendation]] = [[] for _ in jobs]
        everything = [row for row, job in enumerate(jobs) if job.choice.allowed is None]
        for k, rows in _by_k(jobs, everything, hidden, len(model.catalogue)):
            found = model.best_items(queries[rows], vectors, k, [hidden[row] for row in rows])
            for row, items in zip(rows, found, strict=True):
                results[row] = items[: jobs[row].k]
        for row in set(range(len(jobs))).difference(everything):
            job = jobs[row]
            results[row] = model.best_items(
                queries[row : row + 1], vectors, job.k, [hidden[row]], job.choice.allowed
            )[0]
        return results

    def explain(self, jobs: Sequence[ExplainJob]) -> list[list[Explanation]]:
        """Explanations, one request after the other: each is a batch of histories of its own."""
        return [explain(self.model, job.history, job.items) for job in jobs]


def _by_k(
    jobs: Sequence[RecommendJob], rows: list[int], hidden: list[list[int]], items: int
) -> list[tuple[int, list[int]]]:
    """Pairs of `k` and the rows to rank with it: the largest `k` for all of `rows` that have that many items left."""
    deepest = max((jobs[row].k for row in rows), default=0)
    together = [row for row in rows if items - len(hidden[row]) >= deepest]
    alone = [(jobs[row].k, [row]) for row in rows if items - len(hidden[row]) < deepest]
    return ([(deepest, together)] if together else []) + alone
