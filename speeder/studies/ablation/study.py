"""A study file: a base recipe and named changes of it, one at a time, read into checked recipes."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from speeder.errors import SpeederError
from speeder.io.files import safe_name
from speeder.model.config import SpeederConfig
from speeder.recipes.load import bundled_recipe, load_recipe, recipe_from_dict
from speeder.recipes.schema import Recipe

BASE = "base"
EVERY_STAGE = "*"


@dataclass(frozen=True)
class Variant:
    """The base recipe with a few changes.

    Attributes:
        name: the name of its folder and its row.
        group: the part of the model that it is about; empty for the base.
        tests: one line on the change.
        changes: dotted key -> value, as in `{"model.dropout": 0.1, "stages.*.epochs": 2}`.
        recipe: the changed recipe; runs set its seed.
    """

    name: str
    group: str
    tests: str
    changes: dict[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Study:
    """Variants by name, in the order of the file, the base first."""

    name: str
    variants: dict[str, Variant]

    def chosen(self, names: list[str]) -> list[Variant]:
        """The base, and the variants and whole groups of these names (none: all), in the study's order.

        Raises:
            SpeederError: a name is neither a variant's nor a group's.
        """
        groups = {variant.group for variant in self.variants.values()} - {""}
        for name in names:
            if name not in {*self.variants, *groups}:
                known = ", ".join([*sorted(groups), *self.variants])
                raise SpeederError(f"only: expected some of {known}, got {name!r}")
        wanted = {BASE, *names} if names else {*self.variants}
        return [each for each in self.variants.values() if wanted & {each.name, each.group}]


def load_study(name: str | Path) -> Study:
    """Read and check a study: a YAML file, or the name of one that comes with the package.

    Raises:
        SpeederError: the file is missing or not YAML, or a key, a recipe or a change in it is wrong; the message
            names the variant and the key.
    """
    path = _study_path(name)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpeederError(f"study {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpeederError(f"study {path}: not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return study_from_dict(data, path.stem, path.parent)
    except SpeederError as error:
        raise SpeederError(f"study {path}: {error}") from error


def study_from_dict(data: Any, name: str, folder: Path = Path()) -> Study:
    """A study from plain data.

    Args:
        folder: the folder that a base recipe's path is relative to.

    Raises:
        SpeederError: a key or a value is wrong.
    """
    if not isinstance(data, dict) or not {"base", "variants"} <= set(data):
        raise SpeederError("expected a mapping with 'base' and 'variants'")
    _check_keys(data, ("base", "common", "variants"), "")
    base = load_recipe(_recipe_path(data["base"], folder))
    if not isinstance(base, Recipe):
        raise SpeederError(f"base: expected a recipe with stages, got a baseline's ({data['base']})")
    recipe = _changed(base, _flat(data.get("common") or {}, "common: "), "common: ")
    variants = {BASE: Variant(BASE, "", "the recipe that variants change", {}, recipe)}
    for group, members in _mapping(data["variants"], "variants: ").items():
        for variant, entry in _mapping(members, f"variants: {group}: ").items():
            where = f"variants: {group}: {variant}: "
            if variant in variants or group == BASE:
                raise SpeederError(f"{where}expected a unique name other than {BASE!r}")
            if safe_name(variant) != variant:
                raise SpeederError(
                    f"{where}expected a name of letters, digits, '-' and '_', since it names a folder"
                )
            _check_keys(_mapping(entry, where), ("tests", "changes"), where)
            if not isinstance(entry.get("tests"), str) or "\n" in entry["tests"]:
                raise SpeederError(f"{where}tests: expected one line of text, got {entry.get('tests')!r}")
            changes = _flat(_mapping(entry.get("changes"), f"{where}changes: "), where)
            changed = _changed(recipe, changes, where)
            if not differing_keys(recipe.to_dict(), changed.to_dict()):
                raise SpeederError(
                    f"{where}changes: expected something else than the base has, got its values"
                )
            variants[variant] = Variant(variant, group, entry["tests"], changes, changed)
    return Study(name, variants)


def differing_keys(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Dotted keys in which two recipes (`to_dict`) differ; `stages` where the stages have other names."""
    first, second = _leaves(one), _leaves(other)
    if [stage["name"] for stage in one["stages"]] != [stage["name"] for stage in other["stages"]]:
        first, second = (
            {key: value for key, value in part.items() if not key.startswith("stages.")}
            | {"stages": part_of["stages"]}
            for part, part_of in ((first, one), (second, other))
        )
    return sorted(key for key in {*first, *second} if first.get(key) != second.get(key))


def _leaves(recipe: dict[str, Any]) -> dict[str, Any]:
    stages = {stage["name"]: stage for stage in recipe["stages"]}
    return _flat(recipe | {"stages": stages}, "")


def _study_path(name: str | Path) -> Path:
    if Path(name).suffix in (".yaml", ".yml") or Path(name).exists():
        return Path(name)
    if not bundled_recipe(str(name)).exists():
        known = ", ".join(sorted(path.stem for path in bundled_recipe("").parent.glob("ablations-*.yaml")))
        raise SpeederError(f"study: expected a YAML file or one of {known}, got {str(name)!r}")
    return bundled_recipe(str(name))


def _recipe_path(name: Any, folder: Path) -> Path:
    if not isinstance(name, str):
        raise SpeederError(f"base: expected a recipe's name or path, got {name!r}")
    return folder / name if Path(name).suffix in (".yaml", ".yml") else bundled_recipe(name)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise SpeederError(f"{where}expected a mapping that is not empty, got {value!r}")
    for key in value:
        if not isinstance(key, str):
            raise SpeederError(f"{where}expected names as keys, got {key!r}")
    return value


def _check_keys(data: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = sorted(map(str, set(data) - set(known)))
    if unknown:
        raise SpeederError(f"{where}unknown key {unknown[0]!r}; known: {', '.join(known)}")


def _flat(changes: dict[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; both may be mixed."""
    flat: dict[str, Any] = {}
    for key, value in changes.items():
        if not isinstance(key, str):
            raise SpeederError(f"{where}{prefix or 'changes'}: expected names as keys, got {key!r}")
        deeper = _flat(value, where, f"{prefix}{key}.") if isinstance(value, dict) and value else None
        for name, leaf in (deeper or {f"{prefix}{key}": value}).items():
            if name in flat:
                raise SpeederError(f"{where}changes: {name!r} is given twice")
            flat[name] = leaf
    return flat


def _changed(recipe: Recipe, changes: dict[str, Any], where: str) -> Recipe:
    """The recipe with each dotted key's value; whole `stages` are replaced before single ones are changed."""
    data = copy.deepcopy(recipe.to_dict())
    for key, value in sorted(changes.items(), key=lambda entry: entry[0] != "stages"):
        path = key.split(".")
        if path[0] == "seed":
            raise SpeederError(f"{where}changes: {key!r}: seeds are the study's own")
        if path[0] == "stages" and len(path) > 1:
            _change_stages(data["stages"], path[1:], value, f"{where}changes: {key!r}: ")
            continue
        place = data
        for part in path[:-1]:
            place[part] = {} if place.get(part) is None else place[part]
            place = place[part]
            if not isinstance(place, dict):
                raise SpeederError(f"{where}changes: {key!r}: the base has no mapping of that name")
        place[path[-1]] = value
    try:
        changed = recipe_from_dict(data)
        known = {entry.name for entry in dataclasses.fields(SpeederConfig)}
        unknown = sorted(set(changed.model) - known) if changed.baseline is None else []
        if unknown:
            raise SpeederError(f"recipe: model: unknown key {unknown[0]!r}")
    except SpeederError as error:
        raise SpeederError(f"{where}{error}") from error
    return changed


def _change_stages(stages: Any, path: list[str], value: Any, where: str) -> None:
    """`[name or "*", key]` of stages."""
    if len(path) != 2 or not isinstance(stages, list):
        raise SpeederError(f"{where}expected stages.STAGE.KEY, STAGE being a stage's name or '*'")
    matched = [stage for stage in stages if path[0] in (EVERY_STAGE, stage["name"])]
    if not matched:
        names = ", ".join(stage["name"] for stage in stages)
        raise SpeederError(f"{where}no such stage; the base has {names}")
    for stage in matched:
        stage[path[1]] = copy.deepcopy(value)
