"""The bench as one picture: speed against the length of histories and of item texts."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, ScalarFormatter

from speeder.studies.bench.rates import best_peak, row
from speeder.studies.bench.systems import SYSTEMS
from speeder.studies.charts import colours, saved_figure

_MARKERS = "osD^"


def plot_bench(results: dict, path: Path) -> None:
    """Training targets and users a second (upper and lower) as histories (left) and item texts (right) grow.

    Args:
        results: as `run.bench` returns them.
        path: the PNG to write, atomically.
    """
    with saved_figure(path, 10, 7) as figure:
        grid = figure.subplots(2, 2, sharey="row", sharex="col")
        points = results["points"].values()
        titled = [point for point in points if point["workload"]["text"] is None]
        columns = (
            ("history", "items in a history (titles)", [p for p in titled if p["workload"]["history"]]),
            (
                "text",
                "tokens of an item's text (histories of 50)",
                [p for p in points if p["workload"]["text"]],
            ),
        )
        for column, (length, label, chosen) in enumerate(columns):
            chosen = sorted(chosen, key=lambda point, length=length: point["workload"][length])
            _panel(grid[0, column], results, chosen, length, "targets")
            _panel(grid[1, column], results, chosen, length, "users")
            grid[1, column].set_xlabel(label)
        grid[0, 0].set_ylabel("training: targets a second")
        grid[1, 0].set_ylabel("inference: users a second")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)


def _panel(axes: Axes, results: dict, points: list[dict], length: str, figure: str) -> None:
    peak = best_peak(results)
    names = results["settings"]["systems"]
    for name, marker, colour in zip(names, _MARKERS, colours(len(names)), strict=False):
        found = [
            (point["workload"][length], getattr(row(point["systems"][name], peak), figure))
            for point in points
        ]
        found = [(at, value) for at, value in found if value is not None]
        label = SYSTEMS[name][0].split(":")[0].split(",")[0]
        axes.plot(
            [at for at, _ in found], [value for _, value in found], marker=marker, color=colour, label=label
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted({point["workload"][length] for point in points}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,g}")
    )  # not as powers: no formulas are set
