"""Finds a run's model and its data, from the run's folder."""

from __future__ import annotations

from pathlib import Path

from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.io.files import read_json
from speeder.io.places import find_recorded


def find_model(run: Path) -> Path:
    """The folder of the recommender of a run or a demo; or `run` itself, if it is a saved recommender."""
    for folder in (run / "model", run / "speeder" / "model", run):
        if (folder / "config.json").exists():
            return folder
    raise SpeederError(f"{run}: expected a finished run or a saved recommender, found no model in it")


def recorded_data(run: Path) -> Path | None:
    """The data's folder by a run's `recipe.json`, also if both were moved together; None if it records none."""
    known = read_json(run / "recipe.json")
    folder = known.get("data")
    return None if folder is None else find_recorded(run, folder, known.get("data_from_run"))


def data_folder_of(run: Path, given: Path | None) -> Path:
    """The folder of a run's data: `given`, or the run's record.

    Raises:
        SpeederError: there is neither.
    """
    folder = given or recorded_data(run)
    if folder is None:
        raise SpeederError(f"{run}: the run has no record of its data's folder; use evaluate --data DIR")
    return Path(folder)


def run_data(run: Path, folder: Path | None = None) -> PreparedData:
    """The prepared data that a run was trained on.

    Args:
        folder: the data's folder; by default the one in the run's `recipe.json`.

    Raises:
        SpeederError: the data are missing or have changed, or their split is not the run's.
    """
    if not (run / "recipe.json").exists():
        raise SpeederError(f"{run}: expected a run folder, found no recipe.json")
    known = read_json(run / "recipe.json")
    folder = folder or recorded_data(run)
    if folder is None:
        raise SpeederError(
            f"{run}: the run has no record of its data's folder (train's data_folder); use evaluate --data DIR"
        )
    if not Path(folder).exists():
        raise SpeederError(
            f"{run}: its data are not in {folder}; if they were moved, use evaluate --data DIR"
        )
    data = PreparedData.load(folder)
    if data.split.hash() != known.get("split"):
        raise SpeederError(
            f"{folder}: the data have changed since {run} was trained, or are others; prepare the earlier ones "
            "into a new folder (evaluate --data DIR), or train again"
        )
    return data
