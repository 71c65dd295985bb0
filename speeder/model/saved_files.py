"""The files of a saved recommender: whether they are whole, belong together, and which a new save replaces."""

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
    """Look at the headers of a folder's safetensors files, which tell how long each must be.

    Raises:
        SpeederError: naming the first that is missing, or not whole.
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
            raise SpeederError(f"{path} is no whole safetensors file: {error}") from error


def check_loaded(name_or_path: str | Path, config_class: type, info: dict, **kwargs) -> None:
    """Refuse a model some of whose weights were in no file, so that they were drawn afresh.

    Where the caller changes the configuration, such as to add a task, fresh weights are what is wanted.

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
    """Hold a saved recommender's catalogue to the hash in its configuration; earlier versions wrote none.

    Raises:
        SpeederError: it is another one.
    """
    if expected is not None and saved_hash(folder) != expected:
        raise SpeederError(
            f"{folder} is not the one that this recommender was saved with: its manifest has another SHA-256 than"
            " config.json tells (catalogue_hash); copy the folder again, or give the catalogue that is meant"
            " (from_pretrained(..., catalogue=...))"
        )


_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def remove_other_weights(folder: Path, new: Path) -> None:
    """Remove weights' files that `new` replaces by others, such as shards of a larger model that was saved there."""
    names = {path.name for path in new.iterdir() if _WEIGHTS.fullmatch(path.name)}
    for path in folder.iterdir() if names else ():
        if _WEIGHTS.fullmatch(path.name) and path.name not in names:
            path.unlink()
