"""The report's charts, and its tables of evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from speeder.evaluation.result import COLD_ITEMS, COLD_ONLY, Evaluation
from speeder.evaluation.tables import Table, comparison_tables
from speeder.studies.charts import draw_comparison, draw_gate_distribution, draw_gates, draw_training
from speeder.studies.curves import training_curves
from speeder.studies.report.charts import Chart
from speeder.studies.report.contents import RunContents
from speeder.studies.report.group_charts import draw_gate_groups, draw_slices
from speeder.studies.report.items import Gates

_PROTOCOLS = {
    "full": ("Full ranking", "The rank of each user's next item (the target) among all items."),
    "vhr": ("VHR@1", "Whether the target is ranked first among 20 candidates."),
    "sampled": ("Sampled ranking", "The rank of the target among sampled candidates."),
    COLD_ITEMS: ("New items, among all", "The rank of targets that are not in training, among all items."),
    COLD_ONLY: (
        "New items, among themselves",
        "The rank of targets that are not in training, among the new items alone.",
    ),
}


@dataclass(frozen=True)
class EvaluationSection:
    """One kind of evaluation.

    Attributes:
        kind: its folder's name in `evaluations/`.
        title, description: what is measured, in a few words and in a sentence.
        metric: the main metric.
        tables: means, with seen items masked and allowed.
        slice_tables: the main metric by slice of users.
        charts: comparison, and slices.
        note: how it was measured, with `code` marks.
    """

    kind: str
    title: str
    description: str
    metric: str
    tables: list[Table]
    slice_tables: list[Table]
    charts: list[Chart]
    note: str


def evaluation_section(kind: str, rows: Mapping[str, Evaluation]) -> EvaluationSection:
    """Tables and charts of evaluations of one task."""
    tables, note = comparison_tables(rows)
    first = next(iter(rows.values()))
    title, description = _PROTOCOLS[first.protocol]
    count = len(first.slices)
    suffix = "" if kind == "test" else f"-{kind}"
    best = {name: each.metrics["masked"][first.main_metric] for name, each in rows.items()}
    figures = "; ".join(
        f"{name} {cell.value:.4f} ({cell.low:.4f} to {cell.high:.4f})" for name, cell in best.items()
    )
    comparison = Chart(
        f"comparison{suffix}",
        f"{first.main_metric} by model",
        f"{first.main_metric} with its 95 % interval by model, seen items masked: {figures}.",
        partial(draw_comparison, evaluations=rows, metric=first.main_metric),
        (8, 1.5 + 0.55 * len(rows)),
        1.9 + 0.6 * len(rows),
    )
    kinds = " and by ".join(first.slices)
    slices = Chart(
        f"slices{suffix}",
        f"{first.main_metric} by {kinds}",
        f"{first.main_metric} with its 95 % interval by {kinds}; the figures are in the tables below.",
        partial(draw_slices, evaluations=rows),
        (9.5 if count > 1 else 6.5, 4.2),
        0.6 + 0.22 * len(rows) + 2.7 * count,
    )
    return EvaluationSection(
        kind,
        title if first.split == "test" else f"{title}, {first.split} targets",
        description,
        first.main_metric,
        tables[:-count],
        tables[-count:],
        [comparison, slices],
        note,
    )


def training_charts(contents: RunContents, modalities: Sequence[str] = ()) -> list[Chart]:
    """Loss and validation, and the gate's weights, over the steps of all stages.

    Args:
        modalities: their order, which decides their colours.
    """
    if not contents.stages:
        return []
    curves = training_curves({name: record["log"] for name, record in contents.stages.items()})
    ends = [f"{name}: {stage['loss'][-1][1]:.3f}" for name, stage in curves.stages.items() if stage["loss"]]
    charts = []
    if len(ends) == len(curves.stages):
        charts.append(
            Chart(
                "training",
                "Loss and validation ranking",
                f"Training loss and validation NDCG@10 by step. Loss at the end of {'; '.join(ends)}.",
                partial(draw_training, curves_by_stage=curves.stages),
                (8, 5),
                4.6,
            )
        )
    if curves.gates:
        gates = curves.in_order(modalities).gates
        last = ", ".join(f"{name} {points[-1][1]:.2f}" for name, points in gates.items())
        charts.append(
            Chart(
                "gates",
                "Gate weights in training",
                f"Mean gate weight of each modality by step. At the end: {last}.",
                partial(draw_gates, gates=gates, stages=curves.spans),
                (8, 3.6),
                3.6,
            )
        )
    return charts


def gate_charts(gates: Gates | None) -> list[Chart]:
    """The gate's weights by group of items, and their distribution."""
    if gates is None:
        return []
    groups = {f"{label} ({int(member.sum()):,})": gates.mean(label) for label, member in gates.groups.items()}
    weights = gates.of_present()
    medians = ", ".join(f"{name} {np.median(values):.2f}" for name, values in weights.items())
    return [
        Chart(
            "gate_groups",
            "Gate weights by group of items",
            "Mean gate weight of each modality by the items' frequency in training; the figures are in the table.",
            partial(draw_gate_groups, groups=groups),
            (8, 1.4 + 0.42 * len(groups)),
            1.5 + 0.55 * len(groups),
        ),
        Chart(
            "gate_distribution",
            "Gate weights over items",
            f"Distribution of gate weights over the items that have a modality. Medians: {medians}.",
            partial(draw_gate_distribution, weights=weights),
            (1.2 + 1.6 * max(2, len(weights)), 3.6),
            3.6,
        ),
    ]


def best_row(rows: Mapping[str, Evaluation], names: Sequence[str], metric: str) -> str | None:
    """The row with the highest mean among these names, seen items masked; None if there is none of them."""
    there = [name for name in names if name in rows]
    return max(there, key=lambda name: rows[name].mean(metric), default=None)
