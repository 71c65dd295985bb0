"""Example test users: their history, their recommendations, and their next item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from speeder.data.catalogue import ItemCatalogue
from speeder.data.prepared import PreparedData
from speeder.evaluation.metrics import target_ranks
from speeder.studies.report.thumbnails import Thumbnails


@dataclass(frozen=True)
class ShownItem:
    """One item on a user's card.

    Attributes:
        title: its title, or its id.
        picture: a `data:` address, or None.
        is_target: whether it is the user's next item.
        gates: modality -> share of the item's token; None if the model has no gates.
    """

    title: str
    picture: str | None
    is_target: bool = False
    gates: dict[str, float] | None = None


@dataclass(frozen=True)
class ShownUser:
    """A user's card.

    Attributes:
        name: the user's external id.
        length: items in the whole history.
        history: its newest items, newest first.
        recommended: best first, without items of the history.
        target: the user's next item.
        rank: the target's rank among the `num_ranked` items that are not in the history; None if the history has it.
    """

    name: str
    length: int
    history: list[ShownItem]
    recommended: list[ShownItem]
    target: ShownItem
    rank: int | None
    num_ranked: int

    @property
    def items(self) -> list[ShownItem]:
        """All items on the card."""
        return [*self.history, *self.recommended, self.target]

    @property
    def is_hit(self) -> bool:
        """Whether the target is among those recommended."""
        return any(item.is_target for item in self.recommended)


def choose_users(lengths: Sequence[int], count: int) -> list[int]:
    """Rows of users in the middle of `count` equal parts of all, from the shortest history to the longest.

    The choice does not depend on their recommendations.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")
    count = min(count, len(order))
    return [int(order[int((part + 0.5) * len(order) / count)]) for part in range(count)]


def show_users(
    model: Any,
    data: PreparedData,
    thumbnails: Thumbnails,
    count: int = 4,
    k: int = 6,
    history: int = 6,
    gates: dict[str, np.ndarray] | None = None,
) -> list[ShownUser]:
    """Cards of test users.

    Args:
        model: its `score(histories)` returns `(n, I)` scores; items beyond the data's were added later.
        count, k, history: number of users, of recommended items, and of shown history items.
        gates: modality -> `(I,)` weights of the model's items.
    """
    histories, targets = data.split.histories("test"), data.split.targets("test")
    rows = choose_users([len(each) for each in histories], count)
    if not rows:
        return []
    scores = model.score([histories[row].tolist() for row in rows]).float()
    seen = [histories[row] for row in rows]
    ranks = target_ranks(scores, torch.as_tensor(targets[rows]), seen).tolist()
    catalogue = getattr(model, "catalogue", None) or data.catalogue
    users, k = data.split.users("test"), min(k, len(catalogue))

    def shown(item: int, target: int | None = None) -> ShownItem:
        shares = None if gates is None else {name: float(weights[item]) for name, weights in gates.items()}
        picture = thumbnails.address(_picture(catalogue, data.catalogue, item))
        title = catalogue.titles[item] or f"item {catalogue.ids[item]}"
        return ShownItem(title, picture, item == target, shares)

    cards = []
    for row, line, rank in zip(rows, scores, ranks, strict=True):
        items, target = histories[row].tolist(), int(targets[row])
        line = line.clone()
        line[items] = -torch.inf
        best = [item for item in line.topk(k).indices.tolist() if line[item] > -torch.inf]
        cards.append(
            ShownUser(
                name=data.interactions.user_ids[users[row]],
                length=len(items),
                history=[shown(item) for item in items[: -history - 1 : -1]],
                recommended=[shown(item, target) for item in best],
                target=shown(target, target),
                rank=None if target in items else rank,
                num_ranked=len(catalogue) - len(set(items)),
            )
        )
    return cards


def _picture(own: ItemCatalogue, prepared: ItemCatalogue, item: int) -> str | None:
    """The path of an item's picture: the recommender's, or else the data's."""
    return own.images[item] or (prepared.images[item] if item < len(prepared) else None)
