"""Hashes of what a model or a feature was fitted on, and of features themselves, for records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from speeder.data.item_indices import item_array

if TYPE_CHECKING:
    import torch

FITTED_ON_NOTHING = "no interactions"  # a record's word for features that come from items alone
_CHUNK_BYTES = 1 << 24


def training_hash(sequences: Sequence[Sequence[int]]) -> str:
    """SHA-256 over sequences of item indices, users in order: what a model or a feature was fitted on."""
    digest = hashlib.sha256(b"speeder training sequences v1")
    for sequence in sequences:
        items = item_array("sequences", sequence).astype("<i8", copy=False)
        digest.update(len(items).to_bytes(8, "little"))
        digest.update(items.tobytes())
    return digest.hexdigest()


def ids_hash(ids: Sequence[str]) -> str:
    """SHA-256 over external ids in order."""
    digest = hashlib.sha256(b"speeder ids v1")
    for external in ids:
        encoded = external.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def features_hash(features: torch.Tensor, present: torch.Tensor) -> str:
    """SHA-256 over `(I, F)` features as float32 and `(I,)` presence.

    Features are read a few rows at a time, so memory-mapped ones need not fit into memory.
    """
    count, width = features.shape
    digest = hashlib.sha256(b"speeder features v1")
    digest.update(np.array([count, width], dtype="<i8").tobytes())
    rows = max(1, _CHUNK_BYTES // (4 * width))
    for start in range(0, count, rows):
        chunk = features[start : start + rows].detach().cpu().float().numpy()
        digest.update(np.ascontiguousarray(chunk, dtype="<f4"))
    digest.update(present.cpu().numpy().astype(np.uint8))
    return digest.hexdigest()
