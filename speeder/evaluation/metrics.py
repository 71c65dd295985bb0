"""The target's rank among all items, and the metrics that are functions of that rank.

Ties count against the target: its rank is one plus the number of other items that score at least as much. So a scorer
that gives every item the same score gets the worst rank.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch

from speeder.data.item_indices import item_array

CUTOFFS = (5, 10, 20)
METRICS = (*(f"HR@{k}" for k in CUTOFFS), *(f"NDCG@{k}" for k in CUTOFFS), "MRR")


def target_ranks(
    scores: torch.Tensor, targets: torch.Tensor, histories: Sequence[Sequence[int]] | None = None
) -> torch.Tensor:
    """Rank of each row's target over the whole catalogue, 1 being best.

    Args:
        scores: (n, I), any floating dtype. ``-inf`` is a score like any other; NaN is an error.
        targets: (n,) int64 item indices.
        histories: n lists of item indices to leave out of each row's ranking (the "seen" items). A target that is
            itself among them cannot be recommended, so it gets the worst rank, I.

    Returns:
        (n,) int64 ranks in ``1..I``.

    Raises:
        TypeError: scores are not floating point, or items are not integers.
        ValueError: shapes do not agree, or a score is NaN.
        IndexError: a target or a history's item lies outside ``0..I-1``.
    """
    if not scores.is_floating_point():
        raise TypeError(f"scores: expected a floating dtype, got {scores.dtype}")
    if scores.dim() != 2 or targets.shape != scores.shape[:1]:
        raise ValueError(
            f"scores, targets: expected (n, I) and (n,), got {tuple(scores.shape)} and {tuple(targets.shape)}"
        )
    num_rows, num_items = scores.shape
    nan_rows = torch.isnan(scores).any(dim=1).nonzero().flatten()
    if len(nan_rows):
        raise ValueError(
            f"scores: {len(nan_rows)} of {num_rows} rows hold NaN, the first is row {int(nan_rows[0])}"
        )
    _check_items("targets", targets, num_items)
    at_least = scores >= scores.gather(1, targets[:, None])
    if histories is None:
        return at_least.sum(dim=1)
    if len(histories) != num_rows:
        raise ValueError(f"histories: expected {num_rows} of them, one a row of scores, got {len(histories)}")
    lengths = torch.tensor([len(history) for history in histories], dtype=torch.int64)
    rows = torch.arange(num_rows).repeat_interleave(lengths)
    flat = [item_array("histories", history) for history in histories]
    columns = torch.from_numpy(np.concatenate(flat)) if flat else torch.empty(0, dtype=torch.int64)
    _check_items("histories", columns, num_items)
    at_least[rows, columns] = False
    hidden = ~at_least.gather(1, targets[:, None]).squeeze(1)
    return torch.where(hidden, num_items, at_least.sum(dim=1))


def candidate_ranks(scores: torch.Tensor, is_target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each row's target among its candidates, with ties against it, and the number of ties.

    Args:
        scores: (n, C), any floating dtype.
        is_target: (n, C) bool, True once a row.

    Returns:
        (n,) int64 ranks in ``1..C``, and (n,) int64 counts of other candidates with the target's score.

    Raises:
        TypeError: scores are not floating point.
        ValueError: shapes do not agree, or a score is NaN.
    """
    if not scores.is_floating_point():
        raise TypeError(f"scores: expected a floating dtype, got {scores.dtype}")
    if scores.shape != is_target.shape:
        raise ValueError(f"scores: expected {is_target.shape}, got {tuple(scores.shape)}")
    if torch.isnan(scores).any():
        raise ValueError("scores: expected numbers, got NaN")
    scores = scores.cpu()
    own = scores[torch.from_numpy(is_target)][:, None]
    return (scores >= own).sum(dim=1).numpy(), (scores == own).sum(dim=1).numpy() - 1


def hidden_targets(histories: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """(n,) bool: whether the target is in its own history, so that masking seen items hides it."""
    return np.array([target in history for history, target in zip(histories, targets, strict=True)])


def metric_values(ranks: np.ndarray, metric: str) -> np.ndarray:
    """Each user's value of ``metric`` (``HR@k``, ``NDCG@k``, ``MRR``) from ranks (n,): (n,) float64.

    With one relevant item the ideal DCG is 1, so NDCG@k is ``1 / log2(rank + 1)`` within the cutoff and 0
    beyond it.
    """
    ranks = np.asarray(ranks)
    if metric == "MRR":
        return 1.0 / ranks
    match = re.fullmatch(r"(HR|NDCG)@([1-9]\d*)", metric)
    if match is None:
        raise ValueError(f"metric: expected HR@k, NDCG@k or MRR, got {metric!r}")
    hit = (ranks <= int(match[2])).astype(np.float64)
    return hit if match[1] == "HR" else hit / np.log2(ranks + 1.0)


def _check_items(name: str, items: torch.Tensor, num_items: int) -> None:
    if items.numel() and not 0 <= int(items.min()) <= int(items.max()) < num_items:
        raise IndexError(
            f"{name}: expected items in 0..{num_items - 1}, got {int(items.min())}..{int(items.max())}"
        )
