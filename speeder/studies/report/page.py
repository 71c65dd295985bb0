"""The page itself: what was collected, put into the template; every text is escaped there."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from speeder.evaluation.bootstrap import Interval
from speeder.studies.report import summary
from speeder.studies.report.charts import Chart
from speeder.studies.report.contents import RunContents
from speeder.studies.report.items import Gates
from speeder.studies.report.sections import EvaluationSection, best_row
from speeder.studies.report.thumbnails import Thumbnails
from speeder.studies.report.users import ShownUser

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Tile:
    """One figure at the top."""

    label: str
    value: str
    told: str


@dataclass
class Page:
    """All that the page shows; `users` is empty where there are neither data nor a model that ranks."""

    contents: RunContents
    training: list[Chart]
    sections: list[EvaluationSection]
    gates: Gates | None
    items: list[Chart]
    users: list[ShownUser]
    thumbnails: Thumbnails
    notes: list[str] = field(default_factory=list)


def render(page: Page) -> str:
    """The page as HTML, which loads nothing."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": summary.duration, "marks": _marks, "number": _number}
    facts: dict[str, Callable] = {
        "stages": summary.stage_rows,
        "recipe": summary.recipe_facts,
        "recipe_yaml": summary.recipe_yaml,
        "data": summary.data_facts,
        "modalities": summary.modality_facts,
        "manifest_yaml": summary.manifest_yaml,
        "machine": summary.machine_facts,
    }
    return environment.get_template("report.html.j2").render(
        page=page,
        backbone=_short(str(page.contents.recipe.get("backbone", ""))),
        pictured=any(item.picture for user in page.users for item in user.items),
        name=page.contents.folder.resolve().name,
        css=Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),
        tiles=_tiles(page),
        notes=[*page.contents.notes, *page.notes, *_picture_notes(page.thumbnails)],
        colours={name: f"c{number % 6}" for number, name in enumerate(page.gates.weights)}
        if page.gates
        else {},
        version=_version(),
        **{name: gather(page.contents) for name, gather in facts.items()},
    )


def _tiles(page: Page) -> list[Tile]:
    tiles = []
    contents = page.contents
    kind = next((kind for kind, rows in contents.evaluations.items() if _own(contents, rows)), None)
    if kind is not None:
        rows = contents.evaluations[kind]
        own = rows[_own(contents, rows)]
        for metric in dict.fromkeys([own.main_metric, "HR@10" if own.protocol != "vhr" else "ValidRatio"]):
            cell = own.metrics["masked"][metric]
            others = [name for name in rows if not name.startswith("Speeder") and rows[name] is not own]
            best = best_row(rows, others, metric)
            beside = "" if best is None else f"; {best}: {rows[best].mean(metric):.4f}"
            tiles.append(Tile(f"{metric}, {kind}", f"{cell.value:.4f}", f"{_interval(cell)}{beside}"))
    known = [
        seconds for seconds in map(summary.stage_seconds, contents.stages.values()) if seconds is not None
    ]
    if known:
        several = f"{len(contents.stages)} of {len(contents.planned)} stages"
        resumed = any(record.get("resumed_from") for record in contents.stages.values())
        told = several + (", without what was done before a stop" if resumed else "")
        tiles.append(Tile("Training", summary.duration(sum(known)), told))
    if contents.data is not None:
        data = contents.data
        told = f"{len(data.interactions.user_ids):,} users, {len(data.catalogue):,} items"
        tiles.append(Tile("Interactions", f"{len(data.interactions):,}", told))
    return tiles


def _short(backbone: str) -> str:
    """A backbone's name: of a folder its last part."""
    return Path(backbone).name if Path(backbone).is_absolute() else backbone


def _own(contents: RunContents, rows: dict) -> str | None:
    """The row of the run's own model as it is now: a demo calls it by its last stage."""
    names = (contents.model_label, f"Speeder after {contents.planned[-1]}")
    return next((name for name in names if name in rows), None)


def _picture_notes(thumbnails: Thumbnails) -> list[str]:
    notes = []
    if thumbnails.broken:
        path, reason = next(iter(thumbnails.broken.items()))
        notes.append(f"{len(thumbnails.broken)} pictures could not be shown, the first: {path}: {reason}")
    if thumbnails.left_out:
        limit = f"{thumbnails.budget / 1e6:g} MB"
        notes.append(f"{thumbnails.left_out} pictures are left out, so that they stay within {limit}.")
    return notes


def _interval(cell: Interval) -> str:
    return f"95 %: {cell.low:.4f} to {cell.high:.4f}"


def _marks(text: str) -> Markup:
    """Escaped text, in which `this` is code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _number(value: float | None, digits: int = 4) -> str:
    return "not known" if value is None else f"{value:.{digits}f}"


def _version() -> str:
    try:
        return version("speeder")
    except PackageNotFoundError:  # run from a source tree
        return "from source"
