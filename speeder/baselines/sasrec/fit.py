"""Trains SASRec."""

from collections.abc import Sequence
from typing import Any

from speeder.baselines.sasrec.model import SASRec
from speeder.baselines.sequential.fit import fit_sequential
from speeder.recipes.sasrec import SASRecConfig


def fit_sasrec(
    training_sequences: Sequence[Sequence[int]],
    num_items: int,
    config: SASRecConfig | None = None,
    **options: Any,
) -> SASRec:
    """A trained SASRec; arguments and errors are those of `fit_sequential`."""
    return fit_sequential(SASRec, training_sequences, num_items, config, **options)
