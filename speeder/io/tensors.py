"""Tensors beside a JSON file that has their hash, so that an interrupted or mixed save is noticed on loading."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from speeder.io.files import atomic_path, sha256_file, write_json

_TENSORS, _CONFIG = "model.safetensors", "config.json"


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], key: str) -> None:
    """Write `model.safetensors`, then `config.json` with the SHA-256 of that file under `key`; each whole or not at
    all."""
    with atomic_path(folder / _TENSORS) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    write_json(folder / _CONFIG, {**config, key: sha256_file(folder / _TENSORS)})


def load_tensors(folder: Path, expected: str) -> dict[str, Tensor]:
    """Read `model.safetensors`; raises `ValueError` if its SHA-256 is not the one in `config.json`."""
    if sha256_file(folder / _TENSORS) != expected:
        raise ValueError(f"{_TENSORS} is not the file that {_CONFIG} was saved with")
    return load_file(folder / _TENSORS)
