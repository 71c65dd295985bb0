"""Runs a model over users in batches, in this process or in others; the results are columns of numbers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from speeder.evaluation.metrics import candidate_ranks, target_ranks
from speeder.evaluation.written_titles import named_candidate
from speeder.io.progress import showing

if TYPE_CHECKING:
    from speeder.evaluation.scorer import Scorer, TitleGenerator

Columns = dict[str, np.ndarray]
"""Name -> `(n,)` int64, one number per user."""

Rank = Callable[[Any, "Users"], Columns]
"""A model and a batch of users -> columns. A module's function, or a `partial` of one, so that it can be pickled."""


@dataclass(frozen=True)
class Users:
    """Users to evaluate.

    Attributes:
        histories: item indices of each, oldest first.
        targets: `(n,)` int64.
        listed: `(n, C)` int64, each user's candidates; None if the whole catalogue is ranked.
    """

    histories: Sequence[np.ndarray]
    targets: np.ndarray
    listed: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def part(self, rows: slice) -> "Users":
        """The users of some rows."""
        listed = None if self.listed is None else self.listed[rows]
        return Users(self.histories[rows], self.targets[rows], listed)

    def parts(self, size: int) -> Iterator["Users"]:
        """All users, in batches of `size`."""
        return (self.part(slice(start, start + size)) for start in range(0, len(self), size))


class UserMap(Protocol):
    """Runs a model over users, batch by batch."""

    def __call__(self, rank: Rank, model: Any, users: Users, batch_size: int, description: str) -> Columns:
        """The columns of all users, in their order. Batches are those of `users.parts(batch_size)`."""


def in_this_process(rank: Rank, model: Any, users: Users, batch_size: int, description: str) -> Columns:
    """The `UserMap` that runs the model in this process."""
    made = []
    with showing(description, -(-len(users) // batch_size), "batch") as work:
        for batch in users.parts(batch_size):
            made.append(rank(model, batch))
            work.update()
    return {name: np.concatenate([columns[name] for columns in made]) for name in made[0]}


def catalogue_ranks(model: "Scorer", users: Users) -> Columns:
    """Each target's rank in the whole catalogue, "masked" and "allowed", and "items", the number of items.

    Raises:
        TypeError, ValueError, IndexError: wrong scores; see `target_ranks`.
    """
    scores = model.score(users.histories)
    if scores.dim() == 2 and len(scores) != len(users):
        raise ValueError(f"scores: expected {(len(users), scores.shape[1])}, got {tuple(scores.shape)}")
    targets = torch.from_numpy(users.targets)
    return {
        "masked": target_ranks(scores, targets, users.histories).numpy(),
        "allowed": target_ranks(scores, targets).numpy(),
        "items": np.full(len(users), scores.shape[1]),
    }


def listed_ranks(model: "Scorer", users: Users, num_items: int) -> Columns:
    """Each target's "rank" among its candidates, and its number of "ties"; see `candidate_ranks`.

    Raises:
        TypeError, ValueError: wrong scores.
    """
    if hasattr(model, "score_candidates"):
        scores = model.score_candidates(users.histories, users.listed)
    else:
        scores = model.score(users.histories)
        if scores.shape != (len(users), num_items):
            raise ValueError(f"scores: expected {(len(users), num_items)}, got {tuple(scores.shape)}")
        scores = scores.gather(1, torch.from_numpy(users.listed).to(scores.device))
    ranks, ties = candidate_ranks(scores, users.listed == users.targets[:, None])
    return {"rank": ranks, "ties": ties}


def chosen_titles(model: "TitleGenerator", users: Users, titles: Sequence[str]) -> Columns:
    """ "named": the candidate that each written title names; -1 if it names none or several.

    Raises:
        ValueError: the model does not return one text per history.
    """
    texts = model.generate_titles(users.histories, users.listed)
    if len(texts) != len(users):
        raise ValueError(f"texts: expected {len(users)}, one a history, got {len(texts)}")
    named = []
    for text, items in zip(texts, users.listed, strict=True):
        place = named_candidate(text, [titles[item] for item in items])
        named.append(-1 if place is None else int(items[place]))
    return {"named": np.array(named, dtype=np.int64)}
