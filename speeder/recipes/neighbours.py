"""The settings of neighbours, and their recipe: a YAML file with `baseline: neighbours`."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from speeder.recipes.baseline import BaselineRecipe
from speeder.recipes.checked import Arguments, Count, NotNegative, Share, build, checked


@checked(ValueError, frozen=True)
class ItemPairsConfig:
    """Which pairs of items are counted, and how much of a history is looked up among them.

    Attributes:
        window: two items of a user count as a pair if they are at most so many places apart.
        window_decay: a pair's weight is this to the power of its distance - 1.
        backward: weight of a pair for predicting the earlier item from the later one, beside 1 for the other way.
        pair_history, pair_decay: how many of a history's newest items are looked up among the pairs; an item's weight
            is the decay to the power of the number of newer ones.
    """

    window: Count = 8
    window_decay: Share = 0.8
    backward: NotNegative = 0.7
    pair_history: Count = 10
    pair_decay: Share = 0.8


@checked(ValueError, frozen=True)
class NeighboursConfig(ItemPairsConfig):
    """What is counted, and how much of a history is read. Weights are no settings: validation items choose them.

    Attributes:
        content_history, content_decay: as `pair_history` and `pair_decay`, for the likeness of contents.
    """

    content_history: Count = 8
    content_decay: Share = 0.7


@checked()
class NeighboursRecipe(BaselineRecipe):
    """The content of a YAML file with `baseline: neighbours`.

    Attributes:
        neighbours: arguments of `NeighboursConfig`.
        baseline: "neighbours".
    """

    neighbours: Arguments = field(default_factory=dict)
    baseline: Literal["neighbours"] = "neighbours"

    @property
    def config(self) -> NeighboursConfig:
        return build(NeighboursConfig, self.neighbours, "neighbours")
