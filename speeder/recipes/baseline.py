"""What the recipes of baselines that read no modalities share."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Self


class BaselineRecipe:
    """A recipe whose settings are under its own name; `config` makes them a checked configuration."""

    baseline: str
    config: Any

    def __post_init__(self) -> None:
        setattr(self, self.baseline, asdict(self.config))  # checked, and with every setting written out

    def for_modalities(self, available: list[str]) -> tuple[Self, list[str]]:
        """The recipe itself, and no note: it opens no modality."""
        return self, []

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML."""
        return asdict(self)
