"""SASRec's settings, and its recipe: a YAML file with `baseline: sasrec`."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from speeder.recipes.baseline import BaselineRecipe
from speeder.recipes.checked import (
    Arguments,
    Count,
    NotNegative,
    Seed,
    ShareBelowOne,
    Size,
    build,
    checked,
)


@checked(ValueError, frozen=True)
class SASRecConfig:
    """Sizes and rates. The defaults suit MovieLens-100K: few users, long histories. For many short ones there is the
    recipe ``sasrec-beauty``; ``speeder.recipes.load.settings_for`` picks by the data.

    Attributes:
        max_length: number of newest items of a history that are read.
        learning_rate: peak rate; linear warm-up over the first twentieth of the steps, then linear decay to zero.
        weight_decay: of AdamW, for every matrix parameter.
        patience: epochs without a better validation NDCG@10 before training stops.
    """

    hidden_size: Size = 64
    layers: Size = 2
    heads: Size = 2
    max_length: Size = 50
    dropout: ShareBelowOne = 0.5
    learning_rate: NotNegative = 4e-3
    weight_decay: NotNegative = 0.5
    batch_size: Count = 32
    epochs: Count = 20
    patience: Count = 10

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise ValueError(
                f"hidden_size: expected a multiple of heads={self.heads}, got {self.hidden_size}"
            )


@checked()
class SASRecRecipe(BaselineRecipe):
    """The content of a YAML file with `baseline: sasrec`.

    Attributes:
        sasrec: arguments of `SASRecConfig`.
        seed: of weights, dropout and order.
        baseline: "sasrec".
    """

    sasrec: Arguments = field(default_factory=dict)
    seed: Seed = 0
    baseline: Literal["sasrec"] = "sasrec"

    @property
    def config(self) -> SASRecConfig:
        return build(SASRecConfig, self.sasrec, "sasrec")
