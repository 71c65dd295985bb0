"""What can be evaluated: a model that scores items, or one that writes titles."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch


class Scorer(Protocol):
    """What can be evaluated. One that is asked for candidates alone may offer ``score_candidates`` instead."""

    def score(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """Histories of item indices, oldest first -> (n, I) floating scores, higher being better."""


class TitleGenerator(Protocol):
    """What answers with a text."""

    def generate_titles(self, histories: Sequence[Sequence[int]], candidates: np.ndarray) -> list[str]:
        """Histories and (n, C) items to choose from, in the order in which a prompt lists them -> n texts."""
