"""Builds the report: reads a run folder, draws its charts, and writes one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speeder.evaluation.cold_split import COLD, ColdItems
from speeder.evaluation.result import COLD_ITEMS
from speeder.io.files import write_text
from speeder.studies.report.charts import save_all
from speeder.studies.report.contents import RunContents, read_run
from speeder.studies.report.items import Gates, read_gates
from speeder.studies.report.page import Page, render
from speeder.studies.report.sections import evaluation_section, gate_charts, training_charts
from speeder.studies.report.thumbnails import Thumbnails
from speeder.studies.report.users import show_users

REPORT = "report.html"


def write_report(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    data_folder: str | Path | None = None,
    pictures: str | Path | None = None,
    users: int = 4,
    model: Any = None,
) -> Path:
    """Write a run's report as one HTML file that loads no other, atomically.

    Args:
        folder: a run's, or a demo's.
        out: the file; by default `report.html` in the folder.
        data_folder: the run's data; by default the folder that the run names.
        pictures: a folder for every chart as PNG and SVG.
        users: number of test users to show.
        model: the run's model, if it is loaded already.

    Returns:
        the file.

    Raises:
        SpeederError: it is no run folder, a file is broken, or its data have changed.
    """
    folder = Path(folder)
    out = Path(out) if out is not None else folder / REPORT
    contents = read_run(folder, Path(data_folder) if data_folder else None, model)
    sections = [evaluation_section(kind, rows) for kind, rows in contents.evaluations.items()]
    gates, thumbnails = _gates(contents), Thumbnails()
    training = training_charts(contents, list(gates.weights) if gates else [])
    page = Page(contents, training, sections, gates, gate_charts(gates), [], thumbnails)
    _show_users(page, users)
    if model is None:
        _add_cold_items(page)
    if pictures is not None:
        charts = [*page.training, *page.items, *(chart for section in sections for chart in section.charts)]
        save_all(charts, Path(pictures))
    write_text(out, render(page))
    return out


def _gates(contents: RunContents) -> Gates | None:
    model, data = contents.model, contents.data
    if model is None or not hasattr(model, "mrc") or not model.gates():
        return None
    return read_gates(model.eval(), data.split if data else None, data.catalogue if data else None)


def _show_users(page: Page, count: int) -> None:
    contents = page.contents
    if contents.model is None or contents.data is None or count < 1:
        return
    if not getattr(contents.model, "ranks_catalogue", True):
        page.notes.append(f"Recommendations: {contents.model_label} cannot rank a whole catalogue.")
        return
    weights = page.gates.weights if page.gates else None
    page.users = show_users(contents.model, contents.data, page.thumbnails, count, gates=weights)
    if not any(contents.data.catalogue.images):
        page.notes.append("Pictures: the catalogue has none.")


def _add_cold_items(page: Page) -> None:
    """Add held-out items as a group to the gate's charts, if the run was evaluated on them."""
    contents, data = page.contents, page.contents.data
    if COLD_ITEMS not in {each.protocol for rows in contents.evaluations.values() for each in rows.values()}:
        return
    if page.gates is None or data is None or not (contents.data_folder.resolve().parent / COLD).is_dir():
        return
    if len(contents.model.catalogue) != len(data.catalogue):
        return
    cold = ColdItems.beside(contents.data_folder, data)
    contents.model.add_items(cold.catalogue)
    page.gates = read_gates(contents.model, data.split, data.catalogue, added="held out")
    page.items = gate_charts(page.gates)
