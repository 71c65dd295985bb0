"""Histories that a sequence model must learn."""

import numpy as np

NUM_ITEMS = 24


def cycle_histories() -> list[np.ndarray]:
    """Each item is followed by the next modulo 24, from random starts and of random lengths."""
    rng = np.random.default_rng(1)
    starts, lengths = rng.integers(0, NUM_ITEMS, 300), rng.integers(2, 20, 300)
    return [(start + np.arange(length)) % NUM_ITEMS for start, length in zip(starts, lengths, strict=True)]
