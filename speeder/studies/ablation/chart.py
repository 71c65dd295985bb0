"""The picture of a study: each variant's difference from the base, with its interval."""

import os
from collections.abc import Mapping

import numpy as np

from speeder.evaluation.bootstrap import Interval
from speeder.studies.charts import colours, saved_figure


def plot_differences(
    differences: Mapping[str, tuple[str, Interval]], path: str | os.PathLike, label: str
) -> None:
    """One row per variant, one colour per group; the line at 0 is the base.

    Args:
        differences: variant -> its group, and its difference from the base with the interval.
        path: the PNG to write, atomically.
        label: of the axis.

    Raises:
        ValueError: there is no variant.
    """
    if not differences:
        raise ValueError("differences: expected at least one entry, got none")
    groups = list(dict.fromkeys(group for group, _ in differences.values()))
    with saved_figure(path, 8, 1.4 + 0.36 * len(differences)) as figure:
        axes = figure.subplots()
        names = list(differences)
        for group, colour in zip(groups, colours(len(groups)), strict=True):
            rows = [row for row, name in enumerate(names) if differences[name][0] == group]
            value, low, high = np.array([differences[names[row]][1] for row in rows]).T
            axes.errorbar(
                value, rows, xerr=np.maximum(0, (value - low, high - value)), color=colour, fmt="o", ms=6,
                capsize=3, linewidth=1.5, label=group,
            )  # fmt: skip
        axes.axvline(0, color="#444444", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color="#E3E3E3")
        axes.set_xlabel(f"{label} (bars: 95 % interval over users)")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, borderaxespad=0.2)
