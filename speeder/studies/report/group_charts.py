"""Drawings of the report (others are in `studies/charts.py`): slices of users, and gate weights by group of items."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from speeder.evaluation.result import Evaluation
from speeder.studies.charts import colours, is_narrow

_LIGHT = ("#CC79A7", "#E69F00", "#56B4E9")  # light colours of the palette
# letters on the palette's dark colours, and on its light ones; the page replaces both
ON_DEEP, ON_LIGHT = "#FEFEFE", "#010101"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw_slices(figure: Figure, evaluations: Mapping[str, Evaluation]) -> None:
    """The main metric in each slice of users with its 95 % interval: one panel per kind of slice, one colour per row.

    Args:
        evaluations: name -> evaluation, all of one task.
    """
    first = next(iter(evaluations.values()))
    kinds = list(first.slices)
    narrow = is_narrow(figure)
    shape = (len(kinds), 1) if narrow else (1, len(kinds))
    panels = figure.subplots(*shape, sharey=True, squeeze=False).ravel()
    for axes, kind in zip(panels, kinds, strict=True):
        _draw_slice_kind(axes, kind, evaluations, first.main_metric)
    for axes in panels if narrow else panels[:1]:
        axes.set_ylabel(first.main_metric)
    panels[0].set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = 1 if narrow else min(len(labels), 3)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False)


def _draw_slice_kind(axes: Axes, kind: str, evaluations: Mapping[str, Evaluation], metric: str) -> None:
    labels = list(next(iter(evaluations.values())).slices[kind])
    offsets = (np.arange(len(evaluations)) - (len(evaluations) - 1) / 2) * min(0.14, 0.8 / len(evaluations))
    styles = zip(offsets, colours(len(evaluations)), strict=True)
    for number, ((name, each), (offset, colour)) in enumerate(zip(evaluations.items(), styles, strict=True)):
        cells = [part["metrics"]["masked"][metric] for part in each.slices[kind].values()]
        value, low, high = np.array(cells).T
        axes.errorbar(
            np.arange(len(labels)) + offset, value, yerr=np.maximum(0, (value - low, high - value)), color=colour,
            fmt=_MARKERS[number % len(_MARKERS)], ms=5, capsize=2, linewidth=1.3, label=name,
        )  # fmt: skip
    axes.set_xticks(range(len(labels)), [textwrap.fill(label, 10) for label in labels])
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel(kind[0].upper() + kind[1:])


def draw_gate_groups(figure: Figure, groups: Mapping[str, Mapping[str, float]]) -> None:
    """One stacked bar per group of items: the mean gate weight of each modality.

    Args:
        groups: label -> modality -> mean weight; they sum to 1 in each group.
    """
    axes = figure.subplots()
    modalities = list(next(iter(groups.values())))
    rows, left = np.arange(len(groups)), np.zeros(len(groups))
    for name, colour in zip(modalities, colours(len(modalities)), strict=True):
        widths = np.array([group[name] for group in groups.values()])
        axes.barh(rows, widths, left=left, color=colour, height=0.7, label=name)
        for row, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width >= (0.12 if is_narrow(figure) else 0.06):  # else the number would not fit in
                percent = f"{100 * width:.0f} %"
                ink = ON_LIGHT if colour in _LIGHT else ON_DEEP
                axes.text(start + width / 2, row, percent, ha="center", va="center", color=ink, weight="bold")
        left += widths
    narrow = is_narrow(figure)
    axes.set_yticks(rows, [textwrap.fill(label, 14) if narrow else label for label in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#E3E3E3")
    axes.set_xlabel("Mean gate weight")
    figure.legend(loc="outside upper left", ncols=2 if narrow else len(modalities), frameon=False)
