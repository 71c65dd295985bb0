"""SASRec by a recipe: its settings in a YAML file, and a run folder as every other training has."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speeder.baselines.sasrec import SASRec, SASRecConfig
from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.evaluation.leaks import check_split
from speeder.recipe import build, bundled_recipe, load_recipe
from speeder.run_folder import begin_run, finish_stage, read_state, stage_folder, write_stage_log

_SHORT_HISTORY = 20  # Amazon's median is 4 in training, MovieLens' above 60
_STAGE = "sasrec"


@dataclass
class SASRecRecipe:
    """What a YAML file with `baseline: sasrec` holds.

    Attributes:
        sasrec: arguments of `SASRecConfig`.
        seed: of weights, dropout and order.
        baseline: "sasrec".
    """

    sasrec: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    baseline: str = "sasrec"

    @property
    def config(self) -> SASRecConfig:
        return build(SASRecConfig, self.sasrec, "recipe: sasrec")

    def __post_init__(self) -> None:
        self.sasrec = asdict(self.config)  # checked, and with every setting written out

    def for_modalities(self, available: list[str]) -> tuple[SASRecRecipe, list[str]]:
        """The recipe as it is: SASRec knows items by their numbers alone."""
        return self, []

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as YAML holds it."""
        return asdict(self)


def settings_for(training_sequences: Sequence[Sequence[int]]) -> SASRecConfig:
    """The bundled settings that suit the data, by the median length: for many short histories, or for few long ones."""
    short = np.median([len(items) for items in training_sequences]) < _SHORT_HISTORY
    return load_recipe(bundled_recipe("sasrec-beauty" if short else "sasrec-ml-100k")).config


def fit_on_split(
    data: PreparedData,
    config: SASRecConfig,
    checkpoint: Path,
    *,
    seed: int = 0,
    log: Callable[[dict], None] | None = None,
) -> SASRec:
    """Fit on the split's training part and stop by the ranking of its validation items; see `SASRec.fit`."""
    return SASRec.fit(
        data.split.training(),
        len(data.catalogue),
        config,
        validation=(data.split.histories("validation"), data.split.targets("validation")),
        seed=seed,
        log=log,
        checkpoint=checkpoint,
    )


def train_sasrec(
    recipe: SASRecRecipe,
    data: PreparedData,
    run: str | Path,
    *,
    resume: bool = False,
    data_folder: str | Path | None = None,
) -> SASRec:
    """Train SASRec in a run folder, which `speeder evaluate` and `compare` then take as any other.

    Training stops by the validation NDCG@10. Arguments and errors are those of `speeder.training.train`.
    """
    run = Path(run)
    check_split(data.split, data.interactions)
    state = read_state(run, recipe, data, resume)
    begin_run(run, recipe, data, data_folder)
    if state["model"]:
        return SASRec.load(run / state["model"])
    folder, records = stage_folder(run, 0, _STAGE), []
    checkpoint = folder / "checkpoint.safetensors"
    resumed_from, started = checkpoint.name if checkpoint.exists() else None, time.monotonic()
    try:
        model = fit_on_split(data, recipe.config, checkpoint, seed=recipe.seed, log=records.append)
    except ValueError as error:
        raise SpeederError(f"sasrec: {error}") from error
    entries = [
        {"step": record["epoch"], "loss": record["loss"], "eval_NDCG@10": record["NDCG@10"]}
        for record in records
    ]
    write_stage_log(folder, _STAGE, entries, time.monotonic() - started, resumed_from)
    finish_stage(run, state, _STAGE, model.save)
    checkpoint.unlink(missing_ok=True)
    return model
