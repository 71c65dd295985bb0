"""Markdown tables that compare evaluations over one split."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from speeder.evaluation.bootstrap import Interval
from speeder.evaluation.metrics import METRICS

if TYPE_CHECKING:
    from speeder.evaluate import Evaluation

_TITLES = {"masked": "Seen items masked", "allowed": "Seen items allowed"}
_SLICE_METRIC = "NDCG@10"


def comparison_table(evaluations: "Mapping[str, Evaluation]") -> str:
    """Markdown tables: both protocols with 95 % intervals, NDCG@10 by slice, and how it was measured.

    Raises:
        ValueError: nothing to compare, or the evaluations are over different splits or catalogues.
    """
    if not evaluations:
        raise ValueError("evaluations: expected at least one, got none")
    first_name, first = next(iter(evaluations.items()))
    for name, other in evaluations.items():
        for field in ("split", "split_hash", "num_items"):
            ours, theirs = getattr(first, field), getattr(other, field)
            if ours != theirs:
                raise ValueError(
                    f"evaluations: {field} of {first_name!r} is {ours}, but of {name!r} it is {theirs}"
                )
    parts = []
    for seen, title in _TITLES.items():
        rows = {
            name: [each.metrics[seen][metric] for metric in METRICS] for name, each in evaluations.items()
        }
        parts.append(f"**{title}**\n\n{_table(METRICS, rows)}")
    for kind, slices in first.slices.items():
        labels = [f"{label} ({part['users']} users)" for label, part in slices.items()]
        rows = {
            name: [part["metrics"]["masked"][_SLICE_METRIC] for part in each.slices[kind].values()]
            for name, each in evaluations.items()
        }
        parts.append(f"**{_SLICE_METRIC} by {kind}, seen items masked**\n\n{_table(labels, rows)}")
    parts.append(
        f"Leave one out, {first.split} targets, {len(first):,} users, all {first.num_items:,} items ranked. "
        f"In brackets: 95 % bootstrap interval over users, {first.resamples:,} resamples. "
        f"The best of each column is bold. Ties count against the target. Split `{first.split_hash}`."
    )
    return "\n\n".join(parts) + "\n"


def _table(columns: "list[str] | tuple[str, ...]", rows: dict[str, list[Interval]]) -> str:
    best = [
        max(column) for column in zip(*([cell.value for cell in row] for row in rows.values()), strict=True)
    ]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [
            _cell(cell, len(rows) > 1 and cell.value == top) for cell, top in zip(row, best, strict=True)
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(interval: Interval, bold: bool) -> str:
    value = f"**{interval.value:.4f}**" if bold else f"{interval.value:.4f}"
    return f"{value} [{interval.low:.4f}, {interval.high:.4f}]"
