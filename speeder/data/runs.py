"""Where a run's model and data lie, told by its folder."""

from __future__ import annotations

from pathlib import Path

from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.io.files import read_json


def find_model(run: Path) -> Path:
    """The recommender's folder of a run, of a demo, or the folder itself."""
    for folder in (run / "model", run / "speeder" / "model", run):
        if (folder / "config.json").exists():
            return folder
    raise SpeederError(f"{run}: expected a finished run or a saved recommender, found no model in it")


def data_folder_of(run: Path, given: Path | None) -> Path:
    """Where a run's data lie: as given, or as the run itself says.

    Raises:
        SpeederError: neither tells.
    """
    folder = given or read_json(run / "recipe.json").get("data")
    if folder is None:
        raise SpeederError(f"{run}: does not know where its data lie; evaluate takes --data DIR")
    return Path(folder)


def run_data(run: Path, folder: Path | None = None) -> PreparedData:
    """The prepared data that a run was trained on.

    Args:
        folder: where it lies; by default where the run's `recipe.json` says.

    Raises:
        SpeederError: it is not there, or has changed, or its split is not the run's.
    """
    if not (run / "recipe.json").exists():
        raise SpeederError(f"{run}: expected a run folder, which knows its data, found no recipe.json")
    known = read_json(run / "recipe.json")
    folder = folder or known.get("data")
    if folder is None:
        raise SpeederError(
            f"{run}: was trained without saying where its data lie (train's data_folder); evaluate takes --data DIR"
        )
    if not Path(folder).exists():
        raise SpeederError(
            f"{run}: its data are not in {folder}; if they were moved, evaluate takes --data DIR"
        )
    data = PreparedData.load(folder)
    if (split := data.split.hash()) != known.get("split"):
        raise SpeederError(
            f"{folder}: its split is {split[:12]}…, but {run} was trained on {str(known.get('split'))[:12]}…"
        )
    return data
