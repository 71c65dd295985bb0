"""For every test: a fixed seed, as many threads as before it, and NaN in memory that was allocated and never written.

Where there is no GPU, Triton's kernels run in its interpreter, also in the processes that tests start.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined: before anything imports triton

from tests.assets_fixture import efficientnet_folder, minilm_folder, ml100k_folder, smollm2_folder
from tests.kernels.compile_summary import pytest_terminal_summary

__all__ = [
    "efficientnet_folder",
    "minilm_folder",
    "ml100k_folder",
    "pytest_terminal_summary",
    "smollm2_folder",
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """A test that takes other threads leaves none of that to the next, whose sums would round otherwise."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fresh_tensors_hold_nan() -> Iterator[None]:
    """`torch.empty` gives NaN (or the largest integer), so a result that was never written shows itself.

    torch fills fresh memory only in its deterministic mode; here that mode warns where it has no
    deterministic kernel, and raises nothing.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture
def damaged_exif() -> bytes:
    """EXIF data with one wrong byte, at which Pillow raises neither `OSError` nor `ValueError`."""
    told = Image.Exif()
    told.update({0x0112: 6, 0x010E: "at home"})
    damaged = bytearray(told.tobytes())
    damaged[17] = 0  # the type of the description
    return bytes(damaged)
