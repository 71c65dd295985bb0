"""Neighbours by a recipe: nothing is trained, but the run folder is an ordinary one."""

from __future__ import annotations

import time
from pathlib import Path

from speeder.baselines.fit_neighbours import content_modalities, fit_neighbours
from speeder.baselines.neighbours import Neighbours
from speeder.data.prepared import PreparedData
from speeder.evaluation.leaks import check_features, check_split
from speeder.recipes.neighbours import NeighboursRecipe
from speeder.training.run_folder import begin_run, finish_stage, read_state, stage_folder, write_stage_log

_STAGE = "neighbours"


def train_neighbours(
    recipe: NeighboursRecipe,
    data: PreparedData,
    run: str | Path,
    *,
    resume: bool = False,
    data_folder: str | Path | None = None,
) -> Neighbours:
    """Fit neighbours in a run folder, for `speeder evaluate` and `compare`.

    The stage's log has one step for each choice of weights that was tried. Arguments and errors are those of
    `speeder.training.train.train`.
    """
    run = Path(run)
    check_split(data.split, data.interactions)
    check_features(data)
    state = read_state(run, recipe, data, resume)
    begin_run(run, recipe, data, data_folder)
    if state["model"]:
        return Neighbours.load(run / state["model"])
    folder, tried, started = stage_folder(run, 0, _STAGE), [], time.monotonic()
    names = content_modalities(data)
    model = fit_neighbours(data.split, data.catalogue, names, recipe.config, log=tried.append)
    entries = [
        {"step": step, "eval_NDCG@10": record["NDCG@10"], "weights": record["weights"]}
        for step, record in enumerate(tried, 1)
    ]
    write_stage_log(folder, _STAGE, entries, time.monotonic() - started)
    finish_stage(run, state, _STAGE, model.save)
    return model
