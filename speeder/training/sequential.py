"""SASRec and BSARec by a recipe: settings in a YAML file, and an ordinary run folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from speeder.baselines.bsarec.model import BSARec
from speeder.baselines.sasrec.model import SASRec
from speeder.baselines.sequential.base import SequentialModel
from speeder.baselines.sequential.fit import fit_sequential
from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.evaluation.leaks import check_split
from speeder.recipes.bsarec import BSARecRecipe
from speeder.recipes.sasrec import SASRecConfig, SASRecRecipe
from speeder.training.dataset import check_users
from speeder.training.run_folder import begin_run, finish_stage, read_state, stage_folder, write_stage_log

_KINDS: dict[str, type[SequentialModel]] = {kind.name: kind for kind in (SASRec, BSARec)}


def fit_on_split(
    kind: type[SequentialModel],
    data: PreparedData,
    config: SASRecConfig,
    checkpoint: Path,
    *,
    seed: int = 0,
    log: Callable[[dict], None] | None = None,
) -> SequentialModel:
    """Fit on the split's training part and stop by the ranking of its validation items; see `fit_sequential`."""
    return fit_sequential(
        kind,
        data.split.training(),
        len(data.catalogue),
        config,
        validation=(data.split.histories("validation"), data.split.targets("validation")),
        seed=seed,
        log=log,
        checkpoint=checkpoint,
    )


def train_sequential(
    recipe: SASRecRecipe | BSARecRecipe,
    data: PreparedData,
    run: str | Path,
    *,
    resume: bool = False,
    data_folder: str | Path | None = None,
) -> SequentialModel:
    """Train SASRec or BSARec in a run folder, for `speeder evaluate` and `compare`.

    Training stops by the validation NDCG@10. Arguments and errors are those of `speeder.training.train.train`.
    """
    run, kind = Path(run), _KINDS[recipe.baseline]
    check_split(data.split, data.interactions)
    check_users(data.split)
    state = read_state(run, recipe, data, resume)
    begin_run(run, recipe, data, data_folder)
    if state["model"]:
        return kind.load(run / state["model"])
    folder, records = stage_folder(run, 0, kind.name), []
    checkpoint = folder / "checkpoint.safetensors"
    resumed_from, started = checkpoint.name if checkpoint.exists() else None, time.monotonic()
    try:
        model = fit_on_split(kind, data, recipe.config, checkpoint, seed=recipe.seed, log=records.append)
    except ValueError as error:
        raise SpeederError(f"{kind.name}: {error}") from error
    entries = [
        {"step": record["epoch"], "loss": record["loss"], "eval_NDCG@10": record["NDCG@10"]}
        for record in records
    ]
    write_stage_log(folder, kind.name, entries, time.monotonic() - started, resumed_from)
    finish_stage(run, state, kind.name, model.save)
    checkpoint.unlink(missing_ok=True)
    return model
