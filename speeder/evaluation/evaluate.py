"""Evaluation over a split: ranking the whole catalogue or 1 + N candidates, with leak checks.

A model is anything with ``score(histories) -> (n, I)`` scores. Both variants are always measured: items of the user's
history left in the ranking ("allowed"), and left out of it ("masked").
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from speeder.evaluation.candidates import Candidates
from speeder.evaluation.leaks import check_candidates, check_model_training, check_split
from speeder.evaluation.metrics import hidden_targets
from speeder.evaluation.result import NOT_TOLD, TRAINING_PART, Evaluation
from speeder.evaluation.scorer import Scorer, TitleGenerator
from speeder.evaluation.users import (
    UserMap,
    Users,
    catalogue_ranks,
    chosen_titles,
    in_this_process,
    listed_ranks,
)

if TYPE_CHECKING:
    from speeder.data.interactions import Split


def evaluate(
    model: Scorer,
    split: "Split",
    name: str = "test",
    batch_size: int = 256,
    *,
    resamples: int = 1000,
    seed: int = 0,
    ask: UserMap = in_this_process,
) -> Evaluation:
    """Rank the whole catalogue for every user of a split and keep the target's rank.

    The split's own leak checks run first. The record of what a model was fitted on (``training_hash``) is checked; for
    a model without one, the evaluation's ``fitted_on`` is "not told". The commands, which have the data, check more:
    see docs/protocols.md.

    Args:
        model: anything with ``score``.
        split: leave one out, or temporal.
        name: "test" or "validation".
        batch_size: users per batch.
        resamples, seed: of the bootstrap.
        ask: runs the model over the users, in this process or in others.

    Raises:
        LeakError: the split leaks, or the model was fitted on something other than its training part.
        TypeError, ValueError, IndexError: wrong scores; see ``target_ranks``.
    """
    histories, targets, fitted_on = _checked(model, split, name, batch_size)
    users = Users(histories, targets)
    ranks = ask(catalogue_ranks, model, users, batch_size, _description(name))
    num_items, others = int(ranks["items"][0]), np.unique(ranks.pop("items"))
    if len(others) > 1:
        raise ValueError(f"scores: expected {num_items} items in every batch, got {others.tolist()}")
    return _evaluation(
        split, name, histories, targets, num_items, ranks=ranks, fitted_on=fitted_on,
        resamples=resamples, seed=seed,
    )  # fmt: skip


def evaluate_candidates(
    model: Scorer,
    split: "Split",
    candidates: Candidates,
    protocol: str = "vhr",
    batch_size: int = 256,
    *,
    num_items: int,
    resamples: int = 1000,
    seed: int = 0,
    ask: UserMap = in_this_process,
) -> Evaluation:
    """Rank every user's target among its negatives.

    Args:
        model: anything with ``score``, or with ``score_candidates(histories, (n, C) items) -> (n, C)``.
        candidates: drawn for this very split.
        protocol: "vhr" or "sampled", which decides the metrics.
        num_items: items in the catalogue; the candidates must be drawn over all of them.
        batch_size, resamples, seed, ask: as in ``evaluate``.

    Raises:
        LeakError: as in ``evaluate``, or the candidates are not those of their seed over the catalogue.
        SpeederError: the candidates belong to another split.
        TypeError, ValueError: wrong scores; see ``candidate_ranks``.
    """
    histories, targets, fitted_on = _checked(model, split, candidates.split, batch_size)
    check_candidates(candidates, split, num_items)
    users = Users(histories, targets, candidates.listed(targets))
    rank = partial(listed_ranks, num_items=num_items)
    made = ask(rank, model, users, batch_size, _description(candidates.split))
    return _among_candidates(
        split, candidates, protocol, histories, targets, made["rank"], made["ties"],
        fitted_on=fitted_on, resamples=resamples, seed=seed,
    )  # fmt: skip


def evaluate_titles(
    model: TitleGenerator,
    split: "Split",
    candidates: Candidates,
    titles: Sequence[str],
    batch_size: int = 256,
    *,
    resamples: int = 1000,
    seed: int = 0,
    ask: UserMap = in_this_process,
) -> Evaluation:
    """Let a model choose among each user's candidates by writing a title (protocol "vhr").

    An answer is valid if it names exactly one candidate (see ``named_candidate``), and a hit if that is the target.

    Args:
        titles: of all items of the catalogue; the candidates must be drawn over all of them.
        candidates, batch_size, resamples, seed, ask: as in ``evaluate_candidates``.

    Raises:
        LeakError, SpeederError: as in ``evaluate_candidates``.
        ValueError: the model does not return one text per history.
    """
    histories, targets, fitted_on = _checked(model, split, candidates.split, batch_size)
    check_candidates(candidates, split, len(titles))
    users = Users(histories, targets, candidates.listed(targets))
    rank = partial(chosen_titles, titles=titles)
    named = ask(rank, model, users, batch_size, _description(candidates.split))["named"]
    ranks = np.where(named == targets, 1, users.listed.shape[1])
    return _among_candidates(
        split, candidates, "vhr", histories, targets, ranks, np.zeros_like(ranks),
        valid=(named >= 0).astype(np.int64), fitted_on=fitted_on, resamples=resamples, seed=seed,
    )  # fmt: skip


def _checked(
    model: object, split: "Split", name: str, batch_size: int
) -> tuple[list[np.ndarray], np.ndarray, str]:
    """Check arguments and leaks; return the split's histories and targets, and what the model was fitted on."""
    if name not in ("test", "validation"):
        raise ValueError(f'name: expected "test" or "validation", got {name!r}')
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    check_split(split)
    recorded = check_model_training(model, split)
    histories, targets = split.histories(name), np.asarray(split.targets(name), dtype=np.int64)
    if not len(targets):
        raise ValueError(f"split: no user has a {name} target; {split.requirement}")
    return histories, targets, NOT_TOLD if recorded is None else TRAINING_PART


def _description(name: str) -> str:
    return f"ranking {name} items"


def _among_candidates(
    split: "Split",
    candidates: Candidates,
    protocol: str,
    histories: list[np.ndarray],
    targets: np.ndarray,
    ranks: np.ndarray,
    ties: np.ndarray,
    **more,
) -> Evaluation:
    """The evaluation over candidates; negatives are outside the history, so masking can only hide a target."""
    if protocol not in ("vhr", "sampled"):
        raise ValueError(f'protocol: expected "vhr" or "sampled", got {protocol!r}')
    num_ranked = candidates.negatives.shape[1] + 1
    hidden = hidden_targets(histories, targets)
    return _evaluation(
        split, candidates.split, histories, targets, candidates.num_items,
        ranks={"masked": np.where(hidden, num_ranked, ranks), "allowed": ranks},
        ties={"masked": np.where(hidden, 0, ties), "allowed": ties},
        protocol=protocol, num_ranked=num_ranked,
        candidates_hash=candidates.hash(), candidates_seed=candidates.seed, **more,
    )  # fmt: skip


def _evaluation(
    split: "Split",
    name: str,
    histories: list[np.ndarray],
    targets: np.ndarray,
    num_items: int,
    **more,
) -> Evaluation:
    occurrences = np.bincount(np.concatenate(split.training()), minlength=num_items)
    return Evaluation(
        split=name,
        split_hash=split.hash(),
        split_title=split.title,
        num_items=num_items,
        users=np.asarray(split.users(name), dtype=np.int64),
        targets=targets,
        history_lengths=np.array([len(history) for history in histories], dtype=np.int64),
        target_counts=occurrences[targets].astype(np.int64),
        **more,
    )
