"""Renders the page: the collected facts and charts in the template, which escapes every text."""

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
    """One figure at the top of the page."""

    label: str
    value: str
    detail: str


@dataclass
class Page:
    """The content of the page; `users` is empty without data, or without a model that ranks."""

    contents: RunContents
    training: list[Chart]
    sections: list[EvaluationSection]
    gates: Gates | None
    items: list[Chart]
    users: list[ShownUser]
    thumbnails: Thumbnails
    notes: list[str] = field(default_factory=list)


def render(page: Page) -> str:
    """The page as HTML; it loads nothing."""
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
        detail = several + (", without the time before a stop" if resumed else "")
        tiles.append(Tile("Training", summary.duration(sum(known)), detail))
    if contents.data is not None:
        data = contents.data
        detail = f"{len(data.interactions.user_ids):,} users, {len(data.catalogue):,} items"
        tiles.append(Tile("Interactions", f"{len(data.interactions):,}", detail))
    return tiles


def _short(backbone: str) -> str:
    """A backbone's name; for a folder, the last part of its path."""
    return Path(backbone).name if Path(backbone).is_absolute() else backbone


def _own(contents: RunContents, rows: dict) -> str | None:
    """The row of the run's own model; in a demo it is named by its last stage."""
    names = (contents.model_label, f"Speeder after {contents.planned[-1]}")
    return next((name for name in names if name in rows), None)


def _picture_notes(thumbnails: Thumbnails) -> list[str]:
    notes = []
    if thumbnails.broken:
        path, reason = next(iter(thumbnails.broken.items()))
        notes.append(f"{len(thumbnails.broken)} pictures are not readable, the first: {path}: {reason}")
    if thumbnails.left_out:
        limit = f"{thumbnails.budget / 1e6:g} MB"
        notes.append(f"{thumbnails.left_out} pictures, because of the limit of {limit}.")
    return notes


def _interval(cell: Interval) -> str:
    return f"95 %: {cell.low:.4f} to {cell.high:.4f}"


def _marks(text: str) -> Markup:
    """Escaped text, with `code` marked up."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _number(value: float | None, digits: int = 4) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"


def _version() -> str:
    try:
        return version("speeder")
    except PackageNotFoundError:  # run from a source tree
        return "from source"
