"""The files of a run folder: its recipe and data, its finished stages, and each stage's log.

A run folder has `recipe.json`, `state.json`, `stages/<stage>/` and `model/`. Every file that is needed for a resume is
written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from speeder.data.find_run import recorded_data
from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.io.disk_full import WriteError, writing
from speeder.io.files import read_json, safe_name, write_json
from speeder.io.machine import describe
from speeder.io.places import path_from

_PLACE = ("data", "data_from_run", "precision")  # in recipe.json, but not of the run's identity


class AnyRecipe(Protocol):
    """A recipe of Speeder, of a text baseline, of SASRec, or of neighbours."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as YAML holds it."""


def run_identity(recipe: AnyRecipe, data: PreparedData) -> dict:
    """The identity of a run: recipe and hashes of the data. A resumed run must have the same."""
    manifest = json.dumps(data.manifest, sort_keys=True).encode()
    return {
        "recipe": recipe.to_dict(),
        "split": data.split.hash(),
        "modalities": data.catalogue.modalities,
        "manifest": hashlib.sha256(manifest).hexdigest(),
    }


def begun_identity(run: Path) -> dict:
    """The identity of a run that has begun, for comparison with `run_identity`."""
    began = read_json(run / "recipe.json")
    return {key: value for key, value in began.items() if key not in _PLACE}


def read_state(run: Path, recipe: AnyRecipe, data: PreparedData, resume: bool) -> dict:
    """The state of a run: `{"finished": [stage, ...], "model": folder or None}`, and with item pairs in the end
    `"pairs"`, of `choose_pair_weight`.

    Raises:
        SpeederError: the folder has a run and `resume` is False; or `resume` is True and it has none, or one of another
            recipe or other data.
    """
    path = run / "recipe.json"
    if not resume:
        if path.exists():
            if (run / "state.json").exists() and read_json(run / "state.json").get("model") == "model":
                raise SpeederError(f"{run}: holds a finished run; choose another folder")
            raise SpeederError(
                f"{run}: holds an unfinished run; go on with it (--resume, in Python resume=True), or choose another "
                "folder"
            )
        return {"finished": [], "model": None}
    if not path.exists():
        raise SpeederError(f"{run}: expected a run to resume, found none")
    if _compared(begun_identity(run)) != _compared(run_identity(recipe, data)):
        raise SpeederError(f"{run}: the recipe or the data are not those that this run began with")
    return read_json(run / "state.json") if (run / "state.json").exists() else {"finished": [], "model": None}


def _compared(identity: dict) -> dict:
    """The part of the identity that must agree: everything but `skip_bad_batches`, which may be changed for a
    resume."""
    recipe = identity.get("recipe")
    if not isinstance(recipe, dict):
        return identity
    return identity | {"recipe": {key: value for key, value in recipe.items() if key != "skip_bad_batches"}}


def begun_precision(run: Path) -> str | None:
    """The precision of a run, which a resume keeps on any machine; None before the run has begun."""
    path = run / "recipe.json"
    return read_json(path).get("precision") if path.exists() else None


def begin_run(
    run: Path,
    recipe: AnyRecipe,
    data: PreparedData,
    data_folder: str | Path | None,
    precision: str | None = None,
) -> None:
    """Write the run's `recipe.json`, after all checks; a resumed run keeps its data folder.

    Args:
        precision: the run's precision, if its recipe has `"auto"`.
    """
    if data_folder is None and (run / "recipe.json").exists():
        data_folder = recorded_data(run)
    place: dict[str, str | None] = {"data": None}
    if data_folder is not None:
        place = {"data": str(Path(data_folder).resolve()), "data_from_run": path_from(run, data_folder)}
    place |= {"precision": precision} if precision else {}
    write_json(run / "recipe.json", run_identity(recipe, data) | place)


def stage_folder(run: Path, number: int, name: str) -> Path:
    """The folder of a stage's log and checkpoints; stages are counted from 0."""
    return run / "stages" / f"{number + 1:02d}-{safe_name(name)}"


def write_stage_log(
    folder: Path,
    name: str,
    log: list[dict],
    seconds: float,
    resumed_from: str | None = None,
    num_processes: int = 1,
    skipped_batches: int = 0,
) -> None:
    """Write a stage's `log.json`: the measurements of its steps, and the machine of its end.

    Args:
        log: entries with `step`, and some of `loss`, `eval_NDCG@10`, `gate/<modality>`.
        seconds: time of the stage, since its last resume if it was stopped.
        resumed_from: the checkpoint of that resume.
        skipped_batches: number of skipped steps, from `BadBatches`.
    """
    machine = describe(torch.get_num_threads())
    devices = {"devices": num_processes}
    if torch.cuda.is_available():
        devices["device"] = torch.cuda.get_device_name()
    record = {"stage": name, "log": log, "seconds": round(seconds, 1), "resumed_from": resumed_from}
    record |= {"skipped_batches": skipped_batches, "machine": machine | devices}
    write_json(folder / "log.json", record)


def stage_records(run: str | Path) -> dict[str, dict]:
    """Each finished stage's `log.json`, in order: name -> the content of `write_stage_log`.

    Raises:
        SpeederError: a file is missing, or broken.
    """
    run = Path(run)
    finished = read_json(run / "state.json").get("finished")
    if not isinstance(finished, list) or not all(isinstance(name, str) for name in finished):
        raise SpeederError(f"{run / 'state.json'}: expected a list of finished stages, got {finished!r}")
    records = {}
    for number, name in enumerate(finished):
        path = stage_folder(run, number, name) / "log.json"
        records[name] = read_json(path)
        log = records[name].get("log")
        if not isinstance(log, list) or not log or not all(map(_is_entry, log)):
            raise SpeederError(f"{path}: expected a log of steps with numbers")
    return records


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return False
    return all(
        isinstance(value, int | float)
        for name, value in entry.items()
        if name in ("loss", "eval_NDCG@10", "train_runtime") or name.startswith("gate/")
    )


def stage_logs(run: str | Path) -> dict[str, list[dict]]:
    """The log of each finished stage: name -> entries with `step`, `loss`, `eval_NDCG@10`, `gate/<modality>`."""
    return {name: record["log"] for name, record in stage_records(run).items()}


def finish_stage(
    run: Path, state: dict, name: str, save: Callable[[Path], None], model_folder: str = "model"
) -> None:
    """Save the stage's model by `save(folder)`, then record it in `state.json`."""
    temporary = run / f".{model_folder}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(run / model_folder):
            save(temporary)
    except WriteError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(run / model_folder, ignore_errors=True)
    temporary.rename(run / model_folder)
    state["model"] = model_folder
    state["finished"].append(name)
    write_json(run / "state.json", state)
