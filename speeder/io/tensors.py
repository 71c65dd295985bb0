"""Tensors beside a JSON file that has their hash, so that an interrupted or mixed save is noticed on loading."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from speeder.io.files import atomic_path, sha256_file, write_json

_TENSORS, _CONFIG = "model.safetensors", "config.json"


def save_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    key: str,
    names: tuple[str, str] = (_TENSORS, _CONFIG),
) -> None:
    """Write the tensors, then a JSON file with the SHA-256 of theirs under `key`; each whole or not at all.

    Args:
        names: of the two files.
    """
    file = folder / names[0]
    with atomic_path(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    write_json(folder / names[1], {**config, key: sha256_file(file)})


def load_tensors(
    folder: Path, expected: str, names: tuple[str, str] = (_TENSORS, _CONFIG)
) -> dict[str, Tensor]:
    """Read the tensors; raises `ValueError` if their file's SHA-256 is not the one in the JSON file."""
    if sha256_file(folder / names[0]) != expected:
        raise ValueError(f"{names[0]} is not the file that {names[1]} was saved with")
    return load_file(folder / names[0])
