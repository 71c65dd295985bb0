"""Trains BSARec."""

from collections.abc import Sequence
from typing import Any

from speeder.baselines.bsarec.model import BSARec
from speeder.baselines.sequential.fit import fit_sequential
from speeder.recipes.bsarec import BSARecConfig


def fit_bsarec(
    training_sequences: Sequence[Sequence[int]],
    num_items: int,
    config: BSARecConfig | None = None,
    **options: Any,
) -> BSARec:
    """A trained BSARec; arguments and errors are those of `fit_sequential`."""
    return fit_sequential(BSARec, training_sequences, num_items, config, **options)
