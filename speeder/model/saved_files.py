"""The files of a saved recommender: checks that they are complete and belong together, and removal of old ones."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from speeder.data.catalogue import saved_hash
from speeder.errors import SpeederError
from speeder.io.files import read_json


def check_weight_files(folder: Path) -> None:
    """Check the lengths of a folder's safetensors files against their headers.

    Raises:
        SpeederError: naming the first that is missing or incomplete.
    """
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file() and not (folder / "model.safetensors").is_file():  # as transformers looks for them
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict):
            raise SpeederError(f"{index} lists no files of weights")
        names = set(listed.values())
    for name in sorted(names):
        path = folder / name
        if not path.is_file():
            raise SpeederError(f"{path} is missing (pickled weights are not read)")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise SpeederError(f"{path} is no complete safetensors file: {error}") from error


def check_loaded(name_or_path: str | Path, config_class: type, info: dict, **kwargs) -> None:
    """Refuse a model with weights that were in no file and were initialised.

    If the caller changes the configuration, such as to add a task, initialised weights are expected.

    Args:
        info: transformers' loading info.

    Raises:
        SpeederError: naming the first such weight.
    """
    own = {f.name for f in dataclasses.fields(config_class)} - {
        f.name for f in dataclasses.fields(PretrainedConfig)
    }
    missing = sorted(info["missing_keys"])
    if missing and "config" not in kwargs and not own & set(kwargs):
        raise SpeederError(f"{name_or_path}: its files lack the weights {missing[0]} ({len(missing)} in all)")


def check_catalogue_hash(folder: Path, expected: str | None) -> None:
    """Check a saved recommender's catalogue against the hash in its configuration; earlier versions wrote none.

    Raises:
        SpeederError: it is another catalogue.
    """
    if expected is not None and saved_hash(folder) != expected:
        raise SpeederError(
            f"{folder} is not the one that this recommender was saved with: its manifest's SHA-256 is not the"
            " catalogue_hash of config.json; copy the folder again, or pass the catalogue"
            " (from_pretrained(..., catalogue=...))"
        )


_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def remove_other_weights(folder: Path, new: Path) -> None:
    """Remove weight files that are not part of `new`, such as shards of a larger model that was saved there."""
    names = {path.name for path in new.iterdir() if _WEIGHTS.fullmatch(path.name)}
    for path in folder.iterdir() if names else ():
        if _WEIGHTS.fullmatch(path.name) and path.name not in names:
            path.unlink()
