"""SASRec's settings, and its recipe: a YAML file with `baseline: sasrec`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from speeder.recipes.build import build


@dataclass(frozen=True)
class SASRecConfig:
    """Sizes and rates. The defaults suit MovieLens-100K: few users, long histories. For many short ones there is the
    recipe ``sasrec-beauty``; ``speeder.recipes.load.settings_for`` picks by the data.

    Attributes:
        max_length: number of newest items of a history that are read.
        learning_rate: peak rate; linear warm-up over the first twentieth of the steps, then linear decay to zero.
        weight_decay: of AdamW, for every matrix parameter.
        patience: epochs without a better validation NDCG@10 before training stops.
    """

    hidden_size: int = 64
    layers: int = 2
    heads: int = 2
    max_length: int = 50
    dropout: float = 0.5
    learning_rate: float = 4e-3
    weight_decay: float = 0.5
    batch_size: int = 32
    epochs: int = 20
    patience: int = 10

    def __post_init__(self) -> None:
        for name, kind in (("dropout", float), ("learning_rate", float), ("weight_decay", float)):
            if not isinstance(getattr(self, name), kind | int) or getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)!r}")
        for name in ("hidden_size", "layers", "heads", "max_length", "batch_size", "epochs", "patience"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: expected a whole number of at least 1, got {getattr(self, name)!r}"
                )
        if self.dropout >= 1:
            raise ValueError(f"dropout: expected less than 1, got {self.dropout}")
        if self.hidden_size % self.heads:
            raise ValueError(
                f"hidden_size: expected a multiple of heads={self.heads}, got {self.hidden_size}"
            )


@dataclass
class SASRecRecipe:
    """The content of a YAML file with `baseline: sasrec`.

    Attributes:
        sasrec: arguments of `SASRecConfig`.
        seed: of weights, dropout and order.
        baseline: "sasrec".
    """

    sasrec: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    baseline: str = "sasrec"

    @property
    def config(self) -> SASRecConfig:
        return build(SASRecConfig, self.sasrec, "recipe: sasrec")

    def __post_init__(self) -> None:
        self.sasrec = asdict(self.config)  # checked, and with every setting written out

    def for_modalities(self, available: list[str]) -> tuple[SASRecRecipe, list[str]]:
        """The recipe itself: SASRec uses no modality."""
        return self, []

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML."""
        return asdict(self)
