"""Pictures of training and evaluation, drawn without a display: on a figure (`draw_…`), or as a file (`plot_…`).

A file is a PNG, or an SVG with text as text if its name ends in .svg. On a narrow figure, for phones, labels and
legends are placed so that the drawing has room.
"""

import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from speeder.io.files import atomic_path

if TYPE_CHECKING:
    from speeder.evaluation.result import Evaluation

Curve = Sequence[tuple[int, float]]  # (global step, value)
Stages = Mapping[str, tuple[int, int]]  # stage -> its first and last global step

# Okabe and Ito's palette, for colour-blind readers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SHADES = ("#F1F4F8", "#FFFFFF")
_DPI = 150
_NARROW = 6  # inches
# the same drawing gives the same bytes; letters stay letters; `$` in a title is no formula
_SETTINGS = {"svg.hashsalt": "speeder", "svg.fonttype": "none", "text.parse_math": False}


def plot_training(curves_by_stage: Mapping[str, Mapping[str, Curve]], path: str | os.PathLike) -> None:
    """Write what `draw_training` draws to a file, atomically."""
    with saved_figure(path, 8, 5) as figure:
        draw_training(figure, curves_by_stage)


def draw_training(figure: Figure, curves_by_stage: Mapping[str, Mapping[str, Curve]]) -> None:
    """Training loss above and validation NDCG@10 below, against the global step, stages shaded and named.

    Args:
        curves_by_stage: stage, in order -> "loss" and optionally "NDCG@10" -> points (global step, value).

    Raises:
        ValueError: no stage, a stage without a loss, or a curve of another name.
    """
    if not curves_by_stage:
        raise ValueError("curves_by_stage: expected at least one stage, got none")
    for stage, curves in curves_by_stage.items():
        if not curves.get("loss") or set(curves) - {"loss", "NDCG@10"}:
            raise ValueError(
                f'curves_by_stage: {stage!r} must have "loss" and may have "NDCG@10", has {list(curves)}'
            )
    upper, lower = figure.subplots(2, 1, sharex=True)
    stages = _spans(curves_by_stage)
    for axes, metric, colour, marker in (
        (upper, "loss", _COLOURS[0], None),
        (lower, "NDCG@10", _COLOURS[1], "o"),
    ):
        points = [point for curves in curves_by_stage.values() for point in curves.get(metric, ())]
        axes.plot(*_columns(points), color=colour, marker=marker, markersize=4, linewidth=1.5)
        _shade(axes, stages)
    _name_stages(upper, stages)
    upper.set_ylabel("Training loss (nats)")
    lower.set_ylabel("Validation NDCG@10")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("Optimizer step")


def plot_gates(gates: Mapping[str, Curve], path: str | os.PathLike, stages: Stages | None = None) -> None:
    """Write what `draw_gates` draws to a file, atomically."""
    with saved_figure(path, 8, 3.6) as figure:
        draw_gates(figure, gates, stages)


def draw_gates(figure: Figure, gates: Mapping[str, Curve], stages: Stages | None = None) -> None:
    """Each modality's mean gate weight against the global step.

    Args:
        gates: modality -> points (global step, mean weight over items in 0..1).
        stages: stage -> (first step, last step), to shade and name.
    """
    _not_empty("gates", gates)
    axes = figure.subplots()
    ends = []
    for (modality, curve), colour in zip(gates.items(), colours(len(gates)), strict=True):
        axes.plot(*_columns(curve), color=colour, linewidth=2, label=modality)
        ends.append(curve[-1][1])
    if stages:
        _shade(axes, stages)
        _name_stages(axes, stages)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("Mean gate weight")
    axes.set_xlabel("Optimizer step")
    handles, labels = axes.get_legend_handles_labels()
    order = np.argsort(ends)[::-1]  # as the curves end, from top to bottom
    handles, labels = [handles[index] for index in order], [labels[index] for index in order]
    if is_narrow(figure):
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    else:
        axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def plot_gate_distribution(weights: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """Write what `draw_gate_distribution` draws to a file, atomically."""
    with saved_figure(path, 1.2 + 1.6 * max(2, len(weights)), 3.6) as figure:
        draw_gate_distribution(figure, weights)


def draw_gate_distribution(figure: Figure, weights: Mapping[str, np.ndarray]) -> None:
    """The distribution of gate weights over items: one violin per modality, with its median and quartiles.

    Args:
        weights: modality -> (n,) weights in 0..1 of the items that have it.
    """
    _not_empty("weights", weights)
    axes = figure.subplots()
    columns = [np.asarray(column, dtype=float).ravel() for column in weights.values()]
    places = np.arange(len(columns))
    bodies = axes.violinplot(columns, positions=places, showextrema=False, widths=0.8)["bodies"]
    for body, column, place, colour in zip(bodies, columns, places, colours(len(columns)), strict=True):
        body.set(facecolor=colour, edgecolor="none", alpha=0.35)
        low, median, high = np.percentile(column, [25, 50, 75])
        axes.vlines(place, low, high, color=colour, linewidth=6)
        axes.plot(place, median, "o", color="white", markeredgecolor=colour, markersize=6)
    labels = [f"{name}\n{len(column):,} items" for name, column in zip(weights, columns, strict=True)]
    slanted = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_narrow(figure) else {}
    axes.set_xticks(places, labels, **slanted)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("Gate weight of an item")


def plot_comparison(
    evaluations: "Mapping[str, Evaluation]", path: str | os.PathLike, metric: str = "NDCG@10"
) -> None:
    """Write what `draw_comparison` draws to a file, atomically."""
    with saved_figure(path, 8, 1.5 + 0.55 * len(evaluations)) as figure:
        draw_comparison(figure, evaluations, metric)


def draw_comparison(figure: Figure, evaluations: "Mapping[str, Evaluation]", metric: str = "NDCG@10") -> None:
    """One row per model: the metric with its 95 % interval, seen items masked and allowed, in the given order.

    Args:
        evaluations: name -> evaluation, all over one split.
        metric: one of their protocol's.
    """
    _not_empty("evaluations", evaluations)
    known = next(iter(evaluations.values())).metric_names
    if metric not in known:
        raise ValueError(f"metric: expected one of {', '.join(known)}, got {metric!r}")
    axes = figure.subplots()
    narrow, rows = is_narrow(figure), np.arange(len(evaluations))
    protocols = (
        ("masked", -0.12, "o", "Seen items masked"),
        ("allowed", 0.12, "s", "Seen items allowed"),
    )
    for (seen, offset, marker, label), colour in zip(protocols, colours(2), strict=True):
        value, low, high = np.array([each.metrics[seen][metric] for each in evaluations.values()]).T
        axes.errorbar(
            value, rows + offset, xerr=(value - low, high - value), color=colour, fmt=marker, ms=6,
            capsize=3, linewidth=1.5, label=label,
        )  # fmt: skip
    first = next(iter(evaluations.values()))
    axes.set_yticks(rows, [textwrap.fill(name, 16) if narrow else name for name in evaluations])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#E3E3E3")
    users = f"{metric}, {first.split} targets, {len(first):,} users"
    axes.set_xlabel(users + ("\n" if narrow else " ") + "(bars: 95 % interval)")
    if narrow:
        figure.legend(loc="outside upper left", frameon=False)
    else:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2)


@contextmanager
def saved_figure(path: str | os.PathLike, width: float, height: float) -> Iterator[Figure]:
    """A figure in the common style, written to ``path`` once drawn; an error leaves an earlier file alone."""
    figure = Figure(
        figsize=(width, height), layout="constrained"
    )  # never pyplot: no global state, no display
    FigureCanvasAgg(figure)
    kind = "svg" if str(path).endswith(".svg") else "png"
    undated = {"metadata": {"Date": None}} if kind == "svg" else {}
    with rc_context(_SETTINGS):
        yield figure
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_axisbelow(True)
            if not any(line.get_visible() for line in axes.get_xgridlines()):
                axes.grid(axis="y", color="#E3E3E3")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=_DPI, format=kind, **undated)


def is_narrow(figure: Figure) -> bool:
    """Whether a figure is made for a narrow screen."""
    return figure.get_figwidth() < _NARROW


def _spans(curves_by_stage: Mapping[str, Mapping[str, Curve]]) -> dict[str, tuple[int, int]]:
    """Each stage's span of steps; a stage begins where the one before it ended."""
    spans, start = {}, None
    for stage, curves in curves_by_stage.items():
        steps = [step for curve in curves.values() for step, _ in curve]
        spans[stage] = (min(steps) if start is None else start, max(steps))
        start = max(steps)
    return spans


def _shade(axes: Axes, stages: Stages) -> None:
    for number, (first, last) in enumerate(stages.values()):
        axes.axvspan(first, last, color=_SHADES[number % 2], zorder=0, linewidth=0)
        if number:
            axes.axvline(first, color="#9AA3AD", linewidth=0.8, linestyle="--", zorder=1)
    axes.set_xlim(min(first for first, _ in stages.values()), max(last for _, last in stages.values()))


def _name_stages(axes: Axes, stages: Stages) -> None:
    """Stages' names above the axes, in two rows where one would be too narrow for them."""
    start, end = axes.get_xlim()
    room = (end - start) / (10 * axes.figure.get_figwidth())  # the width of about one letter
    crowded = any(room * len(stage) > last - first for stage, (first, last) in stages.items())
    for number, (stage, (first, last)) in enumerate(stages.items()):
        place = ((first + last) / 2, 1.10 if crowded and number % 2 else 1.02)
        transform = axes.get_xaxis_transform()
        axes.text(*place, stage, transform=transform, ha="center", va="bottom", color="#444444")


def _columns(points: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def colours(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _not_empty(name: str, values: Mapping[str, object]) -> None:
    if not values:
        raise ValueError(f"{name}: expected at least one entry, got none")
    for key, value in values.items():
        if not len(value):
            raise ValueError(f"{name}: expected at least one value for {key!r}, got none")
