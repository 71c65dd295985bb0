"""Leave-one-out evaluation by ranking the whole catalogue, and the checks that guard it.

A model is anything with ``score(histories) -> (n, I)`` scores. Both protocols in use are always measured:
items of the user's history left in the ranking ("allowed"), and left out of it ("masked").
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from tqdm import tqdm

from speeder.data.files import write_json
from speeder.evaluation.bootstrap import Interval, bootstrap_intervals
from speeder.evaluation.leaks import LeakError, check_split, check_training_hash, training_hash
from speeder.evaluation.metrics import METRICS, metric_values, target_ranks
from speeder.evaluation.slices import quantile_slices
from speeder.evaluation.tables import comparison_table

if TYPE_CHECKING:
    from speeder.data.interactions import LeaveOneOut

__all__ = [
    "METRICS",
    "Evaluation",
    "Interval",
    "LeakError",
    "Scorer",
    "check_split",
    "check_training_hash",
    "comparison_table",
    "evaluate",
    "training_hash",
]

SEEN = ("masked", "allowed")


class Scorer(Protocol):
    """What can be evaluated."""

    def score(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """Histories of item indices, oldest first -> (n, I) floating scores, higher being better."""


@dataclass(frozen=True)
class Evaluation:
    """Every user's rank, and what can be computed from it.

    Arrays have one entry a user. ``ranks`` maps "masked" and "allowed" to (n,) int64 ranks in
    ``1..num_items``.
    """

    split: str
    split_hash: str
    num_items: int
    users: np.ndarray
    targets: np.ndarray
    history_lengths: np.ndarray
    target_counts: np.ndarray  # how often the target occurs in the training parts
    ranks: dict[str, np.ndarray]
    resamples: int = 1000
    seed: int = 0

    def __len__(self) -> int:
        return len(self.users)

    def values(self, metric: str, seen: str = "masked") -> np.ndarray:
        """Each user's value of a metric, (n,) float64: what a paired test between two models takes."""
        if seen not in SEEN:
            raise ValueError(f"seen: expected one of {SEEN}, got {seen!r}")
        return metric_values(self.ranks[seen], metric)

    def mean(self, metric: str, seen: str = "masked") -> float:
        """The metric's mean over users."""
        return float(self.values(metric, seen).mean())

    @cached_property
    def metrics(self) -> dict[str, dict[str, Interval]]:
        """ "masked" and "allowed" -> metric -> mean with its 95 % bootstrap interval over users."""
        return self._intervals(np.ones(len(self), dtype=bool))

    @cached_property
    def slices(self) -> dict[str, dict[str, dict]]:
        """History length in quartiles, target popularity in terciles: name -> label -> users and metrics."""
        groups = {
            "history length": quantile_slices(self.history_lengths, 4, "items"),
            "target popularity": quantile_slices(self.target_counts, 3, "in training"),
        }
        return {
            name: {
                label: {"users": int(member.sum()), "metrics": self._intervals(member)}
                for label, member in members.items()
            }
            for name, members in groups.items()
        }

    def _intervals(self, member: np.ndarray) -> dict[str, dict[str, Interval]]:
        columns = [self.values(metric, seen)[member] for seen in SEEN for metric in METRICS]
        intervals = iter(bootstrap_intervals(np.stack(columns, axis=1), self.resamples, self.seed))
        return {seen: {metric: next(intervals) for metric in METRICS} for seen in SEEN}

    def to_dict(self) -> dict:
        """All of it as JSON values: metrics, slices, and each user's ranks, which ``from_dict`` reads."""
        arrays = {name: value.tolist() for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return {
            "split": self.split,
            "split_hash": self.split_hash,
            "num_users": len(self),
            "num_items": self.num_items,
            "resamples": self.resamples,
            "seed": self.seed,
            "metrics": _plain(self.metrics),
            "slices": _plain(self.slices),
            "per_user": arrays | {"ranks": {seen: ranks.tolist() for seen, ranks in self.ranks.items()}},
        }

    @classmethod
    def from_dict(cls, value: dict) -> "Evaluation":
        """Build an evaluation from what ``to_dict`` gave; metrics are computed again from the ranks."""
        arrays = dict(value["per_user"])
        ranks = {seen: np.array(arrays["ranks"][seen], dtype=np.int64) for seen in SEEN}
        del arrays["ranks"]
        arrays = {name: np.array(items, dtype=np.int64) for name, items in arrays.items()}
        scalars = {name: value[name] for name in ("split", "split_hash", "num_items", "resamples", "seed")}
        return cls(**scalars, **arrays, ranks=ranks)

    def save(self, path: str | os.PathLike) -> None:
        """Write ``to_dict`` as a JSON file, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Evaluation":
        """Read what ``save`` wrote."""
        with open(path, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))


def evaluate(
    model: Scorer,
    split: "LeaveOneOut",
    name: str = "test",
    batch_size: int = 256,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Rank the whole catalogue for every user of a split and keep where the target came.

    The split's leak checks run first. A model that records what it was fitted on (``training_hash``) is held
    to it.

    Args:
        model: anything with ``score``.
        split: a leave-one-out split.
        name: "test" or "validation".
        batch_size: users scored at once.
        resamples, seed: of the bootstrap.

    Raises:
        LeakError: the split leaks, or the model was fitted on something other than its training part.
        TypeError, ValueError, IndexError: wrong scores; see ``target_ranks``.
    """
    if name not in ("test", "validation"):
        raise ValueError(f'name: expected "test" or "validation", got {name!r}')
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    check_split(split)
    if getattr(model, "training_hash", None) is not None:
        check_training_hash(model.training_hash, split, type(model).__name__)
    histories, targets = split.histories(name), np.asarray(split.targets(name), dtype=np.int64)
    if not len(targets):
        raise ValueError(f"split: no user has a {name} target; leave one out needs users with 3 interactions")
    shape, masked, allowed = None, [], []
    for start in tqdm(
        range(0, len(targets), batch_size), desc=f"evaluate ({name})", unit="batch", disable=None
    ):
        batch = histories[start : start + batch_size]
        scores = model.score(batch)
        shape = shape or scores.shape[1:]
        if scores.shape != (len(batch), *shape):
            raise ValueError(f"scores: expected {(len(batch), *shape)}, got {tuple(scores.shape)}")
        batch_targets = torch.from_numpy(targets[start : start + batch_size])
        masked.append(target_ranks(scores, batch_targets, batch))
        allowed.append(target_ranks(scores, batch_targets))
    num_items = int(shape[0])
    occurrences = np.bincount(np.concatenate(split.training()), minlength=num_items)
    return Evaluation(
        split=name,
        split_hash=split.hash(),
        num_items=num_items,
        users=np.asarray(split.users(name), dtype=np.int64),
        targets=targets,
        history_lengths=np.array([len(history) for history in histories], dtype=np.int64),
        target_counts=occurrences[targets].astype(np.int64),
        ranks={"masked": torch.cat(masked).numpy(), "allowed": torch.cat(allowed).numpy()},
        resamples=resamples,
        seed=seed,
    )


def _plain(value: object) -> object:
    """Intervals as dictionaries, all the way down."""
    if isinstance(value, Interval):
        return value._asdict()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
