"""Loads recipes from YAML files: your own, or bundled ones."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from speeder.errors import SpeederError
from speeder.recipes.bsarec import BSARecConfig, BSARecRecipe
from speeder.recipes.checked import build
from speeder.recipes.neighbours import NeighboursRecipe
from speeder.recipes.sasrec import SASRecConfig, SASRecRecipe
from speeder.recipes.schema import Recipe, Stage

AnyRecipe = Recipe | SASRecRecipe | BSARecRecipe | NeighboursRecipe
_BASELINES = {
    "sasrec": SASRecRecipe,
    "bsarec": BSARecRecipe,
    "neighbours": NeighboursRecipe,
}  # without stages
AUTO_RECIPE = "auto"
_SHORT_HISTORY = 20  # Amazon's median is 4 in training, MovieLens' above 60


def bundled_recipe(name: str) -> Path:
    """The file of a bundled recipe, by its name without suffix."""
    return Path(str(files("speeder") / "recipes" / f"{name}.yaml"))


def recipe_file(name: str | Path) -> Path:
    """The file of a recipe: the given path, or the file of a bundled recipe by its name.

    Raises:
        SpeederError: neither a YAML file nor a bundled recipe.
    """
    if Path(name).suffix in (".yaml", ".yml") or Path(name).exists():
        return Path(name)
    file = bundled_recipe(str(name))
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise SpeederError(f"recipe: expected a YAML file or one of {known}, got {str(name)!r}")
    return file


def load_recipe(path: str | Path) -> AnyRecipe:
    """Read and check a recipe; `baseline: sasrec`, `bsarec` or `neighbours` makes it that baseline's.

    Args:
        path: a YAML file, or the name of a bundled recipe, such as `"ml-100k"`.

    Raises:
        SpeederError: the file is missing, is not YAML, or has an unknown key or value.
    """
    path = recipe_file(path)
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpeederError(f"recipe {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpeederError(f"recipe {path}: not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return recipe_from_dict(data)
    except SpeederError as error:
        raise SpeederError(f"{path}: {error}") from error


def recipe_from_dict(data: Any) -> AnyRecipe:
    """A recipe from plain data.

    Raises:
        SpeederError: a key is unknown, or a value has the wrong type or range.
    """
    name = data.get("baseline") if isinstance(data, dict) else None
    if isinstance(name, str) and name in _BASELINES:
        return build(_BASELINES[name], data, "recipe")
    if not isinstance(data, dict) or not isinstance(data.get("stages"), list):
        raise SpeederError("recipe: expected a mapping with a list of 'stages'")
    stages = [build(Stage, stage, _place(stage, number)) for number, stage in enumerate(data["stages"], 1)]
    return build(Recipe, {**data, "stages": stages}, "recipe")


def _place(stage: Any, number: int) -> str:
    name = stage.get("name") if isinstance(stage, dict) else None
    return f"stage {name!r}" if isinstance(name, str) and 0 < len(name) <= 100 else f"stage {number}"


def recipe_name_for(training_sequences: Sequence[Sequence[int]]) -> str:
    """The bundled recipe for the data, by the median history length: for short or for long histories."""
    return "beauty" if _short(training_sequences) else "ml-100k"


def settings_for(training_sequences: Sequence[Sequence[int]]) -> SASRecConfig:
    """The bundled SASRec settings for the data, by the median history length: for short or for long histories."""
    return load_recipe(
        bundled_recipe("sasrec-beauty" if _short(training_sequences) else "sasrec-ml-100k")
    ).config


def bsarec_settings_for(training_sequences: Sequence[Sequence[int]]) -> BSARecConfig:
    """The bundled BSARec settings for the data, chosen as by `settings_for`."""
    return load_recipe(bundled_recipe("bsarec" if _short(training_sequences) else "bsarec-ml-100k")).config


def _short(training_sequences: Sequence[Sequence[int]]) -> bool:
    return np.median([len(items) for items in training_sequences]) < _SHORT_HISTORY
