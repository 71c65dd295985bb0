"""Real models and data for tests. A test that needs one fails where it cannot be had: it is never skipped."""

from pathlib import Path

import pytest

from speeder.errors import SpeederError
from speeder.io.assets import fetch


def asset_folder(name: str) -> Path:
    """The ready folder of an asset; fails the test, with the reason, where it cannot be fetched."""
    try:
        return fetch(name)
    except SpeederError as error:
        pytest.fail(f"this test needs the asset {name!r}: {error}", pytrace=False)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    return asset_folder("smollm2-135m")


@pytest.fixture(scope="session")
def ml100k_folder() -> Path:
    """MovieLens-100K's raw files."""
    return asset_folder("ml-100k")


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face folder."""
    return asset_folder("minilm")


@pytest.fixture(scope="session")
def efficientnet_folder() -> Path:
    """EfficientNet-Lite0's weights."""
    return asset_folder("efficientnet-lite0")
