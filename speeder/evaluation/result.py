"""The result of an evaluation: every user's rank, and what is computed from it."""

import json
import os
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from speeder.data.interactions import LeaveOneOut
from speeder.errors import SpeederError
from speeder.evaluation.bootstrap import Interval, bootstrap_intervals
from speeder.evaluation.metrics import METRICS, metric_values
from speeder.evaluation.slices import quantile_slices
from speeder.io.files import safe_name, write_json

SEEN = ("masked", "allowed")
TRAINING_PART, NOT_TOLD = "the split's training part", "not told"  # as saved in evaluation files

COLD_ITEMS, COLD_ONLY = (
    "cold-items",
    "cold-only",
)  # one protocol's two rankings: among all items, among the cold ones

# Each protocol's metrics, in the order of its tables' columns.
PROTOCOLS = {
    "full": METRICS,
    "vhr": ("VHR@1", "ValidRatio", "HR@1"),
    "sampled": ("HR@3", "HR@5", "HR@10", "NDCG@3", "NDCG@5", "NDCG@10", "MRR", "AUC"),
    COLD_ITEMS: METRICS,
    COLD_ONLY: METRICS,
}


@dataclass(frozen=True)
class Evaluation:
    """Every user's rank, and what is computed from it.

    Arrays have one entry per user. ``ranks`` maps "masked" and "allowed" to (n,) int64 ranks in
    ``1..num_ranked``. For generated titles the rank is 1 if the target was named, and the worst otherwise.
    ``fitted_on`` is `TRAINING_PART` if the model's record says so, and `NOT_TOLD` if it has no record.
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
    protocol: str = "full"
    num_ranked: int | None = None  # target and negatives, in the protocols over candidates
    candidates_hash: str | None = None
    candidates_seed: int | None = None
    ties: dict[str, np.ndarray] = field(default_factory=dict)  # other candidates with the target's score
    valid: np.ndarray | None = None  # 1 if a generated title named one candidate; None for rankings
    fitted_on: str = NOT_TOLD
    split_title: str = LeaveOneOut.title  # evaluations of earlier versions tell none

    def __len__(self) -> int:
        return len(self.users)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The protocol's metrics."""
        return PROTOCOLS[self.protocol]

    @property
    def main_metric(self) -> str:
        """The metric of slices and comparisons."""
        return "VHR@1" if self.protocol == "vhr" else "NDCG@10"

    @property
    def task(self) -> dict:
        """What must be equal for two evaluations to be compared."""
        names = ("protocol", "split", "split_hash", "num_items", "num_ranked", "candidates_hash")
        return {name: getattr(self, name) for name in names}

    def values(self, metric: str, seen: str = "masked") -> np.ndarray:
        """Each user's value of a metric, (n,) float64, for paired tests between two models."""
        if seen not in SEEN:
            raise ValueError(f"seen: expected one of {SEEN}, got {seen!r}")
        ranks = self.ranks[seen]
        if metric == "ValidRatio":
            return self._valid()
        if metric == "VHR@1":  # an invalid answer is no hit
            return metric_values(ranks, "HR@1")
        if metric == "AUC":
            if seen not in self.ties:
                raise ValueError("metric: AUC needs candidates, and the full ranking has none")
            below = self.num_ranked - ranks + self.ties[seen] / 2  # by definition a tie is half a win
            return below / (self.num_ranked - 1)
        return metric_values(ranks, metric)

    def mean(self, metric: str, seen: str = "masked") -> float:
        """The metric's mean over users (HR@1 of generated titles: over those with a valid one)."""
        values, weights = self.values(metric, seen), self._weights(metric)
        return float((values * weights).sum() / max(weights.sum(), 1e-12))

    @cached_property
    def metrics(self) -> dict[str, dict[str, Interval]]:
        """ "masked" and "allowed" -> metric -> mean with its 95 % bootstrap interval over users."""
        return self._intervals(np.ones(len(self), dtype=bool))

    @cached_property
    def slices(self) -> dict[str, dict[str, dict]]:
        """History length in quartiles, target popularity in terciles: name -> label -> users and metrics."""
        groups = {"history length": quantile_slices(self.history_lengths, 4, "items")}
        if self.protocol not in (COLD_ITEMS, COLD_ONLY):  # no cold item is in training
            groups["target popularity"] = quantile_slices(self.target_counts, 3, "in training")
        return {
            name: {
                label: {"users": int(member.sum()), "metrics": self._intervals(member)}
                for label, member in members.items()
            }
            for name, members in groups.items()
        }

    def _check_whole(self) -> None:
        """Raise `ValueError` if the protocol is unknown or an array does not have one entry per user."""
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {self.protocol!r}")
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        arrays |= {f"ranks {seen}": self.ranks[seen] for seen in SEEN}
        arrays |= {f"ties {seen}": values for seen, values in self.ties.items()}
        for name, values in arrays.items():
            if values.shape != (len(self),):
                raise ValueError(
                    f"{name}: expected one entry for each of {len(self)} users, got {values.shape}"
                )

    def _valid(self) -> np.ndarray:
        return np.ones(len(self)) if self.valid is None else self.valid.astype(np.float64)

    def _weights(self, metric: str) -> np.ndarray:
        """LLaRA's HitRatio@1 is over the valid answers; every other metric is over all users."""
        return self._valid() if metric == "HR@1" else np.ones(len(self))

    def _intervals(self, member: np.ndarray) -> dict[str, dict[str, Interval]]:
        names = self.metric_names
        columns = [self.values(metric, seen)[member] for seen in SEEN for metric in names]
        weights = [self._weights(metric)[member] for _ in SEEN for metric in names]
        drawn = bootstrap_intervals(
            np.stack(columns, axis=1), self.resamples, self.seed, np.stack(weights, axis=1)
        )
        intervals = iter(drawn)
        return {seen: {metric: next(intervals) for metric in names} for seen in SEEN}

    def summary(self) -> dict:
        """Task, metrics and slices as JSON values, without each user's ranks."""
        return {
            **self.task,
            "candidates_seed": self.candidates_seed,
            "fitted_on": self.fitted_on,
            "split_title": self.split_title,
            "num_users": len(self),
            "resamples": self.resamples,
            "seed": self.seed,
            "metrics": _plain(self.metrics),
            "slices": _plain(self.slices),
        }

    def to_dict(self) -> dict:
        """The summary and each user's ranks, as JSON values which ``from_dict`` reads."""
        arrays = {name: value.tolist() for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        for name in ("ranks", "ties"):
            values = getattr(self, name)
            arrays[name] = {seen: values[seen].tolist() for seen in SEEN if seen in values}
        return self.summary() | {"per_user": arrays}

    @classmethod
    def from_dict(cls, value: dict) -> "Evaluation":
        """Build an evaluation from what ``to_dict`` gave; metrics are computed again from the ranks."""
        per_user = {
            name: {seen: np.array(row, dtype=np.int64) for seen, row in rows.items()}
            if isinstance(rows, dict)
            else np.array(rows, dtype=np.int64)
            for name, rows in value["per_user"].items()
        }
        known = cls.__dataclass_fields__.keys() - per_user.keys()
        return cls(**{name: value[name] for name in known if name in value}, **per_user)

    def save(self, path: str | os.PathLike) -> None:
        """Write ``to_dict`` as a JSON file, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Evaluation":
        """Read what ``save`` wrote.

        Raises:
            OSError: the file cannot be opened.
            SpeederError: it is damaged, or not an evaluation.
        """
        try:
            with open(path, encoding="utf-8") as file:
                loaded = cls.from_dict(json.load(file))
            loaded._check_whole()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SpeederError(f"{path}: not a readable evaluation: {error}") from error
        return loaded


def evaluation_file(name: str) -> str:
    """The file name of the evaluation of a model with this name."""
    return f"{safe_name(name.lower(), keep='-+')}.json"


def _plain(value: object) -> object:
    """Intervals as dictionaries, recursively."""
    if isinstance(value, Interval):
        return value._asdict()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
