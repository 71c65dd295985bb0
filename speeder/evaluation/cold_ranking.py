"""Protocol "cold-items": targets that no model was trained on, ranked among all items and among the cold ones.

The recommender gets the cold items through `add_items`, without training. See `speeder/evaluation/cold_split.py`.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.evaluation.cold_split import ColdItems
from speeder.evaluation.leaks import (
    LeakError,
    check_features,
    check_model_features,
    check_model_training,
    check_split,
)
from speeder.evaluation.metrics import target_ranks
from speeder.evaluation.result import COLD_ITEMS, COLD_ONLY, NOT_TOLD, TRAINING_PART, Evaluation
from speeder.evaluation.scorer import Scorer
from speeder.evaluation.users import Columns, UserMap, Users, in_this_process


def check_cold_items(cold: ColdItems, warm: PreparedData) -> None:
    """Check that training had no access to cold items, nor to interactions after them.

    Raises:
        LeakError: a cold item is also a warm one, or has features that were fitted on interactions; a training part
            has interactions after its user's target; or the warm set itself leaks.
    """
    check_split(warm.split, warm.interactions)
    check_features(warm)
    both = sorted(set(cold.catalogue.ids) & set(warm.catalogue.ids))
    if both:
        raise LeakError(f"cold items: {both[0]!r} is also in the training catalogue ({len(both)} in all)")
    records = warm.manifest.get("encoders", {})
    for name in cold.catalogue.features:
        if records.get(name, {}).get("training_hash") is not None:
            raise LeakError(f"cold items: their {name} features were fitted on interactions")
    sequences, training = warm.interactions.sequences(), warm.split.training()
    for user, length in zip(cold.users.tolist(), cold.lengths.tolist(), strict=True):
        if not len(training[user]) <= length <= len(sequences[user]):
            raise LeakError(
                f"user {user}: {len(training[user])} items are in training, but only {length} precede the cold item"
            )


def check_never_saw(model: object, cold: ColdItems, warm: PreparedData) -> None:
    """Check that a model was trained on the warm set, with a catalogue without the cold items.

    Raises:
        LeakError: its catalogue has other items or features, or it was fitted on other interactions.
    """
    catalogue = getattr(model, "catalogue", None)
    if catalogue is not None and catalogue.ids != warm.catalogue.ids:
        known = set(catalogue.ids) & set(cold.catalogue.ids)
        what = f"has {len(known)} of the cold items" if known else "is not the warm data's"
        raise LeakError(f"{type(model).__name__}: its training catalogue {what}")
    check_model_features(model, warm)
    check_model_training(model, warm.split)


def evaluate_cold(
    model: Scorer,
    cold: ColdItems,
    warm: PreparedData,
    batch_size: int = 256,
    *,
    resamples: int = 1000,
    seed: int = 0,
    ask: UserMap = in_this_process,
) -> dict[str, Evaluation]:
    """Rank each user's cold target among all items, and among the cold items alone.

    Args:
        model: scores `(n, W + C)` items, the warm ones first, for histories of warm items; check it first with
            `check_never_saw`.
        batch_size: users per batch.
        resamples, seed: of the bootstrap.
        ask: runs the model over the users, in this process or in others.

    Returns:
        `COLD_ITEMS` -> among all items, `COLD_ONLY` -> among the cold ones.

    Raises:
        LeakError: see `check_cold_items`.
        ValueError: the scores have another shape, or NaN.
    """
    check_cold_items(cold, warm)
    histories = cold.histories(warm)
    num_warm, num_all = len(warm.catalogue), len(warm.catalogue) + len(cold.catalogue)
    rank = partial(_cold_ranks, num_warm=num_warm, num_all=num_all)
    made = ask(rank, model, Users(histories, cold.targets), batch_size, "evaluate (cold items)")
    ranks = {
        COLD_ITEMS: {seen: made[seen] for seen in ("masked", "allowed")},
        # none of them is in a history
        COLD_ONLY: dict.fromkeys(("masked", "allowed"), made["among_cold"]),
    }
    fitted_on = NOT_TOLD if getattr(model, "training_hash", None) is None else TRAINING_PART
    return {
        protocol: Evaluation(
            split="test",
            split_hash=cold.hash(warm),
            num_items=num_all,
            users=cold.users,
            targets=cold.targets + num_warm,
            history_lengths=np.array([len(history) for history in histories], dtype=np.int64),
            target_counts=_training_counts(warm.split.training(), cold.targets + num_warm, num_all),
            ranks=found,
            resamples=resamples,
            seed=seed,
            protocol=protocol,
            num_ranked=num_all if protocol == COLD_ITEMS else len(cold.catalogue),
            fitted_on=fitted_on,
        )
        for protocol, found in ranks.items()
    }


def _cold_ranks(model: Scorer, users: Users, num_warm: int, num_all: int) -> Columns:
    """Ranks of cold targets among all items, "masked" and "allowed", and "among_cold" items only."""
    scores = model.score(users.histories)
    if scores.shape != (len(users), num_all):
        raise ValueError(f"scores: expected {(len(users), num_all)}, got {tuple(scores.shape)}")
    targets = torch.from_numpy(users.targets)
    return {
        "masked": target_ranks(scores, targets + num_warm, users.histories).numpy(),
        "allowed": target_ranks(scores, targets + num_warm).numpy(),
        "among_cold": target_ranks(scores[:, num_warm:], targets).numpy(),
    }


def _training_counts(training: Sequence[np.ndarray], targets: np.ndarray, num_items: int) -> np.ndarray:
    """Occurrences of each target in training, which must all be 0.

    Raises:
        LeakError: one does.
    """
    counts = np.bincount(np.concatenate(training), minlength=num_items)[targets].astype(np.int64)
    if counts.any():
        raise LeakError(f"cold items: {int((counts > 0).sum())} targets occur in training")
    return counts


def with_cold_items(model: object, cold: ColdItems, warm: PreparedData) -> object:
    """The recommender with the cold items added, after a check that it was not trained on them.

    Raises:
        SpeederError: it does not support new items, or reads none of their features.
        LeakError: see `check_never_saw`.
    """
    if not hasattr(model, "add_items"):
        raise SpeederError(
            f"{type(model).__name__} does not support new items, so the protocol 'cold-items' cannot evaluate it"
        )
    check_never_saw(model, cold, warm)
    model.add_items(cold.catalogue)
    return model
