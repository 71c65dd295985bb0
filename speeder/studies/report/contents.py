"""Reads a run folder for its report. What is missing becomes a note; what is broken is an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speeder.baselines.auto import baseline_class
from speeder.baselines.bsarec.model import BSARec
from speeder.baselines.neighbours import Neighbours
from speeder.baselines.sasrec.model import SASRec
from speeder.data.find_run import recorded_data, run_data
from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.evaluation.result import Evaluation, evaluation_file
from speeder.evaluation.tables import check_same_task
from speeder.io.files import read_json
from speeder.model.title_writer import TitleWriter
from speeder.studies.evaluate_run import EVALUATIONS
from speeder.training.run_folder import stage_records

_DEMO_RUN = "speeder"  # a demo's folder holds its run under this name, and its evaluations itself
# the first rows of a table
_FIRST = ("popularity", "content neighbours", Neighbours.label, SASRec.label, BSARec.label)


@dataclass
class RunContents:
    """A run folder as its report shows it.

    Attributes:
        folder: the requested folder.
        run: the folder of the run's own files: `folder`, or of a demo a folder in it.
        recipe: the content of `recipe.json`.
        split_hash, manifest_hash: the run's record of its data.
        planned: names of the recipe's stages.
        stages: name -> `log.json` of each finished stage, in order.
        evaluations: kind ("test", "test-vhr", ...) -> row's name -> evaluation, all of a kind over one task.
        model: the recommender of the last finished stage, or None.
        data, data_folder: the run's data and their folder, or None.
        notes: what is missing, in sentences.
    """

    folder: Path
    run: Path
    recipe: dict[str, Any]
    split_hash: str
    manifest_hash: str
    planned: list[str]
    stages: dict[str, dict] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Evaluation]] = field(default_factory=dict)
    model: Any = None
    data: PreparedData | None = None
    data_folder: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def model_label(self) -> str:
        """The run's model in tables."""
        return label_of(self.recipe)


def read_run(folder: Path, data_folder: Path | None = None, model: Any = None) -> RunContents:
    """Read a run's folder, or a demo's.

    Args:
        data_folder: the run's data; by default the folder that the run names.
        model: the run's model, if it is loaded already.

    Raises:
        SpeederError: it is no run folder; or a file is broken, or its data have changed (the message names it).
    """
    run = next((each for each in (folder, folder / _DEMO_RUN) if (each / "recipe.json").exists()), None)
    if run is None:
        raise SpeederError(f"{folder}: expected a run folder, found no recipe.json in it")
    contents = _begin(folder, run)
    if (run / "state.json").exists():
        contents.stages = stage_records(run)
    if len(contents.stages) < len(contents.planned):
        contents.notes.append(
            f"Training has not finished: {len(contents.stages)} of {len(contents.planned)} stages are finished."
        )
    contents.data = _data(contents, data_folder)
    contents.model = model if model is not None else _model(contents)
    _read_evaluations(contents)
    return contents


def label_of(recipe: dict[str, Any]) -> str:
    """The model of a recipe in tables."""
    name = recipe.get("baseline")
    if name is None:
        return "Speeder"
    labels = {kind.name: kind.label for kind in (SASRec, BSARec)} | {"neighbours": Neighbours.label}
    return labels[name] if name in labels else baseline_class(name).label


def _begin(folder: Path, run: Path) -> RunContents:
    path = run / "recipe.json"
    known = read_json(path)
    recipe = known.get("recipe")
    if not isinstance(recipe, dict) or not isinstance(known.get("split"), str):
        raise SpeederError(f"{path}: expected a recipe and the split's hash")
    try:
        planned = [stage["name"] for stage in recipe.get("stages", [{"name": recipe.get("baseline")}])]
    except (KeyError, TypeError) as error:
        raise SpeederError(f"{path}: expected stages with names") from error
    return RunContents(folder, run, recipe, known["split"], str(known.get("manifest", "")), planned)


def _data(contents: RunContents, folder: Path | None) -> PreparedData | None:
    place = folder or recorded_data(contents.run)
    if folder is None and (place is None or not Path(place).exists()):
        where = f"they are no longer in {place}" if place else "the run has no record of their folder"
        contents.notes.append(f"Items and users: the run's data were not found, {where} (use --data DIR).")
        return None
    contents.data_folder = Path(folder or place)
    return run_data(contents.run, folder)


def _model(contents: RunContents) -> Any:
    from speeder.baselines.auto import load_model

    name = read_json(contents.run / "state.json").get("model") if contents.stages else None
    if name is None or not (contents.run / name / "config.json").exists():
        contents.notes.append("Gate weights and recommendations: the run has no model.")
        return None
    return load_model(contents.run / name)


def _read_evaluations(contents: RunContents) -> None:
    roots = dict.fromkeys([contents.folder, contents.run])
    paths = [path for root in roots for path in sorted((root / EVALUATIONS).glob("*/*.json"))]
    names = _names(contents, list(roots))
    kinds: dict[str, dict[str, Evaluation]] = {}
    for path in paths:
        rows = kinds.setdefault(path.parent.name, {})
        if path.name not in rows:
            rows[path.name] = _whole(path)
    for kind in sorted(kinds, key=_kind_order):
        rows = {names.get(file, Path(file).stem): each for file, each in kinds[kind].items()}
        contents.evaluations[kind] = _of_one_task(contents, kind, _in_order(contents, rows))
    if not paths:
        contents.notes.append(f"Evaluations: there are none yet; run speeder evaluate {contents.folder}")


def _whole(path: Path) -> Evaluation:
    evaluation = Evaluation.load(path)
    try:
        _ = evaluation.metrics
    except (KeyError, ValueError, IndexError) as error:
        raise SpeederError(f"{path}: not a readable evaluation: {error}") from error
    return evaluation


def _names(contents: RunContents, roots: list[Path]) -> dict[str, str]:
    """File -> the row's name, as far as the run's recipe and its tables of results tell it."""
    names = [
        _FIRST[0],
        Neighbours.label,
        SASRec.label,
        BSARec.label,
        *(f"Speeder after {stage}" for stage in contents.planned),
    ]
    for root in roots:
        for path in sorted(root.glob("results*.json")):
            names += read_json(path)
    known = {evaluation_file(name): name for name in names}
    own = {"model": contents.model_label, "model-titles": TitleWriter.label}
    return known | {evaluation_file(file): name for file, name in own.items()}


def _in_order(contents: RunContents, rows: dict[str, Evaluation]) -> dict[str, Evaluation]:
    """Baselines first, then the stages in the order of training, the run's model last."""
    stages = [f"Speeder after {stage}" for stage in contents.planned]
    last = [contents.model_label, TitleWriter.label]

    def place(name: str) -> tuple[int, int, str]:
        for number, first in enumerate(_FIRST):
            if name.startswith(first) and name not in last:
                return 0, number, name
        for group, known in ((1, stages), (3, last)):
            if name in known:
                return group, known.index(name), name
        return 2, 0, name

    return {name: rows[name] for name in sorted(rows, key=place)}


def _of_one_task(contents: RunContents, kind: str, rows: dict[str, Evaluation]) -> dict[str, Evaluation]:
    """Rows that can be compared in one table: those of the same task as the last one, the run's own model."""
    *_, last = rows.values()
    kept = {}
    for name, each in rows.items():
        try:
            check_same_task({"the model": last, name: each})
            kept[name] = each
        except ValueError:
            contents.notes.append(f"{kind}: {name} was measured on other users, items or candidates.")
    return kept


def _kind_order(kind: str) -> tuple[bool, int, str]:
    known = ["", "-vhr", "-sampled", "-cold-items", "-cold-only"]
    split, dash, rest = kind.partition("-")
    found = [place for place, ending in enumerate(known) if ending and (dash + rest).startswith(ending)]
    return split != "test", found[0] if found else 0, kind
