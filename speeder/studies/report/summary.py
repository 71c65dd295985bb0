"""The report's facts: recipe, data, machine and times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from speeder.studies.report.contents import RunContents
from speeder.training.bad_batches import SKIPPED

Facts = list[tuple[str, str]]

_RECIPE = (
    "backbone",
    "layers",
    "baseline",
    "precision",
    "batch_users",
    "supervision",
    "ema_decay",
    "lora",
    "seed",
)
_MACHINE = ("processor", "cores", "threads", "devices", "device", "instruction set", "torch")  # first
_LONG = 12  # printed entries of a list of the manifest


@dataclass(frozen=True)
class StageRow:
    """One stage in the report's table; unknown values are None."""

    name: str
    opens: str
    steps: int | None = None
    loss: float | None = None
    validation: float | None = None  # the best NDCG@10
    seconds: float | None = None
    resumed_from: str | None = None
    skipped: int = 0  # batches that were not finite


def stage_rows(contents: RunContents) -> list[StageRow]:
    """Every stage of the recipe, including those that have not run yet."""
    rows = []
    for stage in contents.recipe.get("stages", [{"name": name} for name in contents.planned]):
        name, opens = stage["name"], ", ".join(stage.get("open", []))
        record = contents.stages.get(name)
        if record is None:
            rows.append(StageRow(name, opens))
            continue
        log = record["log"]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        ranking = [entry["eval_NDCG@10"] for entry in log if "eval_NDCG@10" in entry]
        rows.append(
            StageRow(
                name,
                opens,
                max((entry["step"] for entry in log), default=0),
                losses[-1] if losses else None,
                max(ranking, default=None),
                stage_seconds(record),
                record.get("resumed_from"),
                max((entry.get(SKIPPED, 0) for entry in log), default=0),
            )
        )
    return rows


def stage_seconds(record: Mapping[str, Any]) -> float | None:
    """A stage's time in seconds; older logs have it only in their last entry."""
    noted = [entry["train_runtime"] for entry in record["log"] if "train_runtime" in entry]
    return record.get("seconds", noted[-1] if noted else None)


def recipe_facts(contents: RunContents) -> Facts:
    """The recipe's main settings."""
    recipe = contents.recipe
    facts = [(name, _words(recipe[name])) for name in _RECIPE if recipe.get(name) not in (None, "", 0.0)]
    settings = recipe.get(recipe.get("baseline"), recipe.get("model")) or {}
    return [("model", contents.model_label), *facts, *((name, _words(settings[name])) for name in settings)]


def recipe_yaml(contents: RunContents) -> str:
    """The whole recipe as YAML."""
    return yaml.safe_dump(contents.recipe, sort_keys=False, allow_unicode=True)


def data_facts(contents: RunContents) -> Facts:
    """Sizes and hashes of the data."""
    facts = [("split", contents.split_hash), ("manifest", contents.manifest_hash)]
    data = contents.data
    if data is None:
        return facts
    lengths = np.bincount(data.interactions.user, minlength=len(data.interactions.user_ids))
    sizes = [
        ("data set", str(data.manifest.get("dataset", "unnamed"))),
        ("split rule", data.split.title),
        ("users", f"{len(lengths):,}, {len(data.split.users('test')):,} of them test users"),
        ("items", f"{len(data.catalogue):,}"),
        ("interactions", f"{len(data.interactions):,}"),
        ("history lengths", f"{lengths.min():,} to {lengths.max():,}, median {np.median(lengths):g}"),
    ]
    sources = data.manifest.get("sources")
    sources = sources if isinstance(sources, dict) else {}
    return sizes + facts + [(f"source {name}", str(digest)) for name, digest in sources.items()]


def modality_facts(contents: RunContents) -> list[tuple[str, str, str, str]]:
    """Each modality of the data: name, width, items that have it, and its encoder."""
    data = contents.data
    if data is None:
        return []
    encoders = data.manifest.get("encoders", {})
    rows = []
    for name, width in data.catalogue.modalities.items():
        encoder = encoders.get(name, {})
        count = int(data.catalogue.present[name].sum())
        rows.append(
            (name, f"{width:,}", f"{count:,} of {len(data.catalogue):,}", encoder.get("name", "unknown"))
        )
    return rows


def manifest_yaml(contents: RunContents) -> str:
    """The data's manifest, long lists cut."""
    if contents.data is None:
        return ""
    return yaml.safe_dump(_shortened(contents.data.manifest), sort_keys=True, allow_unicode=True)


def machine_facts(contents: RunContents) -> Facts:
    """The machine of the last stage, and the stages that ran on others."""
    machines = {name: record.get("machine") for name, record in contents.stages.items()}
    known = {name: machine for name, machine in machines.items() if isinstance(machine, dict)}
    if not known:
        return []
    *_, last = known.values()
    names = [*(name for name in _MACHINE if name in last), *(name for name in last if name not in _MACHINE)]
    facts = [(name, _words(last[name])) for name in names if last[name] is not None]
    others = [name for name, machine in known.items() if machine != last]
    return facts + ([("other machines", f"stages {', '.join(others)}")] if others else [])


def duration(seconds: float | None) -> str:
    """Seconds as readable text."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _shortened(value: object) -> object:
    if isinstance(value, dict):
        cut = dict(list(value.items())[:200])
        return {str(key): _shortened(each) for key, each in cut.items()}
    if isinstance(value, list):
        more = [f"... {len(value) - _LONG} more"] if len(value) > _LONG else []
        return [_shortened(each) for each in value[:_LONG]] + more
    return value
