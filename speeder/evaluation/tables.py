"""Tables that compare evaluations over one split, as Markdown and LaTeX."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from speeder.evaluation.bootstrap import Interval
from speeder.evaluation.result import COLD_ITEMS, COLD_ONLY, NOT_TOLD

if TYPE_CHECKING:
    from speeder.evaluation.result import Evaluation

_TITLES = {"masked": "Seen items masked", "allowed": "Seen items allowed"}


@dataclass(frozen=True)
class Table:
    """A title, column names, and row name -> cells: means with intervals, the best of each column bold."""

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[Interval]]

    def bold(self) -> dict[str, list[bool]]:
        """Whether each cell is the best of its column; none is in a table of one row."""
        best = [max(cell.value for cell in column) for column in zip(*self.rows.values(), strict=True)]
        several = len(self.rows) > 1
        return {
            name: [several and cell.value == top for cell, top in zip(row, best, strict=True)]
            for name, row in self.rows.items()
        }


def check_same_task(evaluations: "Mapping[str, Evaluation]") -> None:
    """Refuse evaluations that must not be in one table.

    Raises:
        ValueError: there are none, or they are over different splits, catalogues, protocols or candidates.
    """
    if not evaluations:
        raise ValueError("evaluations: expected at least one, got none")
    first_name, first = next(iter(evaluations.items()))
    for name, other in evaluations.items():
        for field, ours in first.task.items():
            if ours != other.task[field]:
                raise ValueError(
                    f"evaluations: {field} of {first_name!r} is {ours}, but of {name!r} it is {other.task[field]}"
                )
        if not np.array_equal(first.users, other.users):
            raise ValueError(f"evaluations: {first_name!r} and {name!r} are over different users")


def comparison_tables(evaluations: "Mapping[str, Evaluation]") -> tuple[list[Table], str]:
    """All tables of a comparison, and one paragraph on how it was measured.

    Tables with seen items masked and allowed (one table if they cannot differ), and the main metric by slice of users.

    Raises:
        ValueError: see ``check_same_task``.
    """
    check_same_task(evaluations)
    first = next(iter(evaluations.values()))
    tables = []
    titles = _TITLES
    if first.protocol != "full" and all(
        np.array_equal(each.ranks["masked"], each.ranks["allowed"]) for each in evaluations.values()
    ):
        titles = {"masked": "Seen items masked or allowed (the same: no target is in its own history)"}
    for seen, title in titles.items():
        rows = {
            name: [each.metrics[seen][metric] for metric in each.metric_names]
            for name, each in evaluations.items()
        }
        tables.append(Table(title, first.metric_names, rows))
    for kind, slices in first.slices.items():
        labels = [f"{label} ({part['users']} users)" for label, part in slices.items()]
        rows = {
            name: [part["metrics"]["masked"][first.main_metric] for part in each.slices[kind].values()]
            for name, each in evaluations.items()
        }
        tables.append(Table(f"{first.main_metric} by {kind}, seen items masked", labels, rows))
    return tables, _how_measured(first) + _untold(evaluations)


def comparison_table(evaluations: "Mapping[str, Evaluation]") -> str:
    """The comparison as Markdown; see ``comparison_tables``."""
    tables, note = comparison_tables(evaluations)
    return "\n\n".join([*(f"**{table.title}**\n\n{_markdown(table)}" for table in tables), note]) + "\n"


def terminal_table(evaluations: "Mapping[str, Evaluation]") -> str:
    """The comparison in few columns, for a terminal: every metric with seen items masked, and the interval of the main
    one.

    Raises:
        ValueError: see ``check_same_task``.
    """
    tables, _ = comparison_tables(evaluations)
    first, main = next(iter(evaluations.values())), tables[0]
    place = list(main.columns).index(first.main_metric)
    header = ["", *main.columns, f"{first.main_metric}, 95 % interval"]
    rows = [
        [name, *(f"{cell.value:.4f}" for cell in cells), f"{cells[place].low:.4f} to {cells[place].high:.4f}"]
        for name, cells in main.rows.items()
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in [header, *rows]
    ]
    head = f"{len(first):,} users, their {first.split} items, {_ranked(first)}. {main.title}."
    return "\n".join([head + _untold(evaluations), "", *lines])


def comparison_latex(evaluations: "Mapping[str, Evaluation]") -> str:
    """The comparison as LaTeX tables, for the package booktabs; see ``comparison_tables``."""
    tables, note = comparison_tables(evaluations)
    return "\n\n".join([*(_latex(table) for table in tables), latex_text(note)]) + "\n"


def markdown_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of formatted cells."""
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    lines[0] = "|" + "|".join(f" {name} " if name else " " for name in header) + "|"
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def latex_rows(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A LaTeX table of formatted cells, for booktabs."""
    body = "\n".join("    " + " & ".join(row) + r" \\" for row in rows)
    return (
        "\\begin{table}\n  \\centering\n"
        f"  \\caption{{{latex_text(caption)}}}\n"
        f"  \\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}\n    \\toprule\n"
        f"    {' & '.join(map(latex_text, header))} \\\\\n    \\midrule\n{body}\n"
        "    \\bottomrule\n  \\end{tabular}\n\\end{table}"
    )


def latex_text(text: str) -> str:
    """Text with LaTeX's special characters escaped, and without Markdown's code marks."""
    text = text.replace("`", "").replace("\\", r"\textbackslash ")
    for letter in "&%$#_{}":
        text = text.replace(letter, "\\" + letter)
    return text.replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ").replace("…", r"\dots ")


def _markdown(table: Table) -> str:
    bold = table.bold()
    rows = [
        [name, *(_cell(cell, "**" if mark else "") for cell, mark in zip(row, bold[name], strict=True))]
        for name, row in table.rows.items()
    ]
    return markdown_rows(["", *table.columns], rows)


def _cell(cell: Interval, mark: str) -> str:
    return f"{mark}{cell.value:.4f}{mark} [{cell.low:.4f}, {cell.high:.4f}]"


def _latex(table: Table) -> str:
    bold = table.bold()

    def cell(interval: Interval, mark: bool) -> str:
        value = f"\\textbf{{{interval.value:.4f}}}" if mark else f"{interval.value:.4f}"
        return f"{value} {{\\scriptsize [{interval.low:.4f}, {interval.high:.4f}]}}"

    rows = [
        [latex_text(name), *(cell(*pair) for pair in zip(row, bold[name], strict=True))]
        for name, row in table.rows.items()
    ]
    return latex_rows(table.title, ["", *table.columns], rows)


def _untold(evaluations: "Mapping[str, Evaluation]") -> str:
    """A sentence about the models without a record of what they were fitted on."""
    names = [name for name, each in evaluations.items() if each.fitted_on == NOT_TOLD]
    return f" Fitted on: unknown for {', '.join(names)}." if names else ""


def _ranked(first: "Evaluation") -> str:
    if first.protocol in ("full", COLD_ITEMS):
        return f"all {first.num_items:,} items ranked"
    if first.protocol == COLD_ONLY:
        return f"the {first.num_ranked:,} cold items alone ranked"
    return f"{first.num_ranked} candidates each: the target and {first.num_ranked - 1} uniform negatives"


def _how_measured(first: "Evaluation") -> str:
    drawn = ""
    if first.protocol not in ("full", COLD_ITEMS, COLD_ONLY):
        drawn = f" Candidates `{first.candidates_hash}`, seed {first.candidates_seed}."
    how = first.split_title
    if first.protocol in (COLD_ITEMS, COLD_ONLY):
        how = "Cold items, never seen in training"
    return (
        f"{how}, {first.split} targets, {len(first):,} users, {_ranked(first)}. "
        f"In brackets: 95 % bootstrap interval over users, {first.resamples:,} resamples. "
        f"The best of each column is bold. Ties count against the target"
        f"{' (half in AUC)' if 'AUC' in first.metric_names else ''}. Split `{first.split_hash}`.{drawn}"
    )
