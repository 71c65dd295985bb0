"""Whitening: features in which no direction counts more than another, so that a cosine tells likeness.

Features of a pretrained encoder lie in a narrow cone: any two items look alike. Without their mean, and with every
direction scaled to the same variance, what tells items apart counts most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 1 << 14  # converted at once, so that memory-mapped features need not fit into memory


@dataclass(frozen=True)
class Whitening:
    """A mean and a scaling of directions.

    Attributes:
        mean: `(F,)` float64.
        matrix: `(F, F)` float64; symmetric, so whitened features stay as near to the given ones as they can.
    """

    mean: Tensor
    matrix: Tensor

    @classmethod
    def fit(cls, features: Tensor, present: Tensor) -> Whitening:
        """Fit on the items that have the features.

        With `n` items, a direction of variance v is divided by the root of v + r, r being the sum of all variances
        over n. That is about what chance adds to an estimated variance, so few items are not whitened into equal
        distances; with many, r vanishes. A direction without variance becomes 0.

        Args:
            features: `(I, F)`, any floating dtype.
            present: `(I,)` bool.
        """
        rows = present.nonzero().flatten().split(_ROWS)
        count, width = max(1, int(present.sum())), features.shape[1]
        mean = torch.zeros(width, dtype=torch.float64)
        covariance = torch.zeros(width, width, dtype=torch.float64)
        for part in rows:
            mean += features[part].double().sum(dim=0) / count
        for part in rows:
            centred = features[part].double() - mean
            covariance += centred.T @ centred / count
        variances, directions = torch.linalg.eigh(covariance)
        variances = variances.clamp_min(0)
        # what rounding leaves of a direction without variance, by the measure of numpy.linalg.matrix_rank
        spans = (
            variances > variances.max() * width * torch.finfo(torch.float64).eps if width else variances > 0
        )
        ridge = variances.sum() / count
        scales = torch.where(spans, (variances + ridge).rsqrt(), 0.0)
        return cls(mean, directions * scales @ directions.T)

    def __call__(self, features: Tensor, present: Tensor) -> Tensor:
        """`(I, F)` features and `(I,)` presence -> `(I, F)` float32 rows of length 1; zeros where absent, and for an
        item that is the mean."""
        parts = [
            F.normalize((part.double() - self.mean) @ self.matrix, dim=1).float()
            for part in features.split(_ROWS)
        ]
        rows = torch.cat(parts) if parts else torch.zeros(features.shape)
        return rows * present[:, None]
