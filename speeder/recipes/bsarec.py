"""BSARec's settings, and its recipe: a YAML file with `baseline: bsarec`."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from speeder.recipes.baseline import BaselineRecipe
from speeder.recipes.checked import (
    Arguments,
    Count,
    NotNegative,
    Seed,
    Share,
    Size,
    build,
    checked,
)
from speeder.recipes.sasrec import SASRecConfig


@checked(ValueError, frozen=True)
class BSARecConfig(SASRecConfig):
    """SASRec's settings and two more. The defaults are those of the authors for Amazon Beauty; for few users with long
    histories there is the recipe ``bsarec-ml-100k``.

    Attributes:
        alpha: share of the filter in a layer; attention has the rest.
        c: frequencies that the low-pass filter keeps, as the authors count them: the ``c // 2 + 1`` lowest of the
            Fourier transform over ``max_length`` places.
    """

    heads: Size = 1
    learning_rate: NotNegative = 5e-4
    weight_decay: NotNegative = 0.0
    batch_size: Count = 256
    epochs: Count = 200
    alpha: Share = 0.7
    c: Count = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.c > self.max_length:
            raise ValueError(f"c: expected at most max_length={self.max_length}, got {self.c}")


@checked()
class BSARecRecipe(BaselineRecipe):
    """The content of a YAML file with `baseline: bsarec`.

    Attributes:
        bsarec: arguments of `BSARecConfig`.
        seed: of weights, dropout and order.
        baseline: "bsarec".
    """

    bsarec: Arguments = field(default_factory=dict)
    seed: Seed = 0
    baseline: Literal["bsarec"] = "bsarec"

    @property
    def config(self) -> BSARecConfig:
        return build(BSARecConfig, self.bsarec, "bsarec")
