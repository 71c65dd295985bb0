"""What can be evaluated: a model that scores items, or one that writes titles."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch


class Scorer(Protocol):
    """A model that scores items. One that only ranks candidates may have ``score_candidates`` instead."""

    def score(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """Histories of item indices, oldest first -> (n, I) floating scores, higher is better."""


class TitleGenerator(Protocol):
    """A model that answers with a text."""

    def generate_titles(self, histories: Sequence[Sequence[int]], candidates: np.ndarray) -> list[str]:
        """Histories and (n, C) candidates, in the order of the prompt -> n texts."""
