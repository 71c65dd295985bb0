"""Paired tests of whether two models' results differ, over the same users."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from speeder.errors import SpeederError
from speeder.evaluation.bootstrap import Interval, bootstrap_intervals
from speeder.evaluation.result import Evaluation, evaluation_file
from speeder.evaluation.tables import (
    check_same_task,
    comparison_latex,
    comparison_table,
    latex_rows,
    latex_text,
    markdown_rows,
)
from speeder.io.files import write_json, write_text

log = logging.getLogger(__name__)

_CHUNK_CELLS = 4_000_000  # random signs held at once


@dataclass(frozen=True)
class PairedTest:
    """One pair of models.

    Attributes:
        first, second: their names.
        difference: mean over users of first minus second, with its 95 % paired bootstrap interval.
        p_value: of the permutation test, two-sided.
        adjusted: p_value after Holm's correction over all pairs.
    """

    first: str
    second: str
    difference: Interval
    p_value: float
    adjusted: float


def compare(
    evaluations: Mapping[str, Evaluation],
    metric: str | None = None,
    seen: str = "masked",
    *,
    permutations: int = 10_000,
    resamples: int = 10_000,
    seed: int = 0,
) -> list[PairedTest]:
    """Test every pair of models.

    Args:
        evaluations: name -> evaluation, at least two, of one task.
        metric: the protocol's main one by default (NDCG@10; VHR@1 for "vhr").
        seen: "masked" or "allowed".
        permutations, resamples, seed: of the two tests.

    Raises:
        ValueError: fewer than two, different tasks (see ``check_same_task``), or no such metric over all users.
    """
    if len(evaluations) < 2:
        raise ValueError(f"evaluations: expected at least two, got {len(evaluations)}")
    check_same_task(evaluations)
    first = next(iter(evaluations.values()))
    metric = metric or first.main_metric
    if metric not in first.metric_names or (first.protocol == "vhr" and metric == "HR@1"):
        known = ", ".join(name for name in first.metric_names if (first.protocol, name) != ("vhr", "HR@1"))
        raise ValueError(f"metric: expected one of {known}, got {metric!r}")
    values = {name: each.values(metric, seen) for name, each in evaluations.items()}
    found = []
    for one, other in combinations(values, 2):
        gap = values[one] - values[other]
        interval = bootstrap_intervals(gap[:, None], resamples, seed)[0]
        found.append((one, other, interval, sign_flip_p_value(gap, permutations, seed)))
    adjusted = holm([entry[-1] for entry in found])
    return [PairedTest(*entry, p) for entry, p in zip(found, adjusted, strict=True)]


def sign_flip_p_value(differences: np.ndarray, permutations: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a paired permutation test on `(n,)` differences between two models.

    Under the null hypothesis each user's two results are exchangeable; an exchange flips the difference's sign. The
    p-value is the share of random exchanges, including the observed one, whose mean is at least as far from 0.
    """
    if permutations < 1:
        raise ValueError(f"permutations: expected at least 1, got {permutations}")
    moved = differences[differences != 0]  # an exchange does not change zeros
    if not len(moved):
        return 1.0
    rng = np.random.default_rng(seed)
    threshold = abs(moved.sum()) * (1 - 1e-9)  # equal sums in another order of adding count as equal
    extreme, chunk = 1, max(1, _CHUNK_CELLS // len(moved))
    for start in range(0, permutations, chunk):
        size = min(chunk, permutations - start)
        signs = 2.0 * rng.integers(0, 2, (size, len(moved)), dtype=np.int8) - 1.0
        extreme += int((np.abs(signs @ moved) >= threshold).sum())
    return extreme / (permutations + 1)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction: p-values that hold for the whole family of tests, in the given order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for step, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - step) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def load_runs(runs: list[Path], folder: str) -> dict[str, Evaluation]:
    """Evaluations of run folders or of evaluation files, named by the last part of the path if that is unique.

    Args:
        runs: run folders (also of a demo) with `evaluations/`, or files of one.
        folder: the kind of evaluation, such as "test" or "test-vhr".

    Raises:
        SpeederError: one is missing or not readable, or the same was given twice.
    """
    short = [run.stem if run.is_file() else run.name for run in runs]
    names = [name if short.count(name) == 1 else str(run) for name, run in zip(short, runs, strict=True)]
    if len(set(names)) != len(names):
        raise SpeederError("compare: the same run was given twice")
    evaluations = {}
    for name, run in zip(names, runs, strict=True):
        inside = [part / "evaluations" / folder / "model.json" for part in (run, run / "speeder")]
        file = next((path for path in (run, *inside) if path.is_file()), None)
        if file is None:
            raise SpeederError(
                f"{run}: expected a run with the evaluation {folder!r}, found none; run speeder evaluate first"
            )
        evaluations[name] = Evaluation.load(file)
    return evaluations


def load_baselines(
    runs: list[Path], folder: str, task: dict, names: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Evaluation]:
    """Baselines for the tables, each from the first run that evaluated it.

    Left out: a baseline that is itself one of `runs`, and files that are damaged or of another task.

    Args:
        runs, folder: as in `load_runs`.
        task: the `Evaluation.task` that a row must have.
        names: names of the baselines, such as "popularity"; a missing one is a warning.
        optional: names of further ones, which may be missing.
    """
    given = {run.resolve() for run in runs}
    folders = [part / "evaluations" / folder for run in runs for part in (run, run / "speeder")]
    folders += [run.parent for run in runs if run.is_file()]
    rows = {}
    for name in (*names, *optional):
        files = [place / evaluation_file(name) for place in folders]
        if given & {path.resolve() for path in files}:
            continue
        for path in filter(Path.is_file, files):
            try:
                row = Evaluation.load(path)
            except SpeederError as error:
                log.warning("%s; left out", error)
                continue
            if row.task == task:
                rows[name] = row
                break
            log.warning("%s: of another task than the runs; left out", path)
        if name not in rows and name not in optional:
            log.warning("%s: no run has evaluated it, so it is not in the tables; run speeder evaluate", name)
    return rows


def comparison_report(
    evaluations: Mapping[str, Evaluation],
    tests: list[PairedTest],
    metric: str,
    seen: str,
    out: Path | None,
    baselines: Mapping[str, Evaluation] | None = None,
) -> str:
    """The tables and the tests as Markdown; with `out`, also `comparison.md`, `.tex` and `.json` in that folder.

    `baselines` are rows of the tables that are not tested.
    """
    baselines = {name: each for name, each in (baselines or {}).items() if name not in evaluations}
    rows_of_all = baselines | dict(evaluations)
    title = f"Differences in {metric}, seen items {seen}"
    header = ["first", "second", "first - second", "p", "p (Holm)"]
    note = (
        "In brackets: 95 % paired bootstrap interval over users. p: two-sided paired permutation test, "
        f"which exchanges the two models' results user by user; Holm: corrected for {len(tests)} pair(s)."
    )
    if baselines:
        note += f" Shown, but not tested: {', '.join(baselines)}."
    rows = [
        [test.first, test.second, _gap(test.difference), f"{test.p_value:.4f}", f"{test.adjusted:.4f}"]
        for test in tests
    ]
    text = f"{comparison_table(rows_of_all)}\n**{title}**\n\n{markdown_rows(header, rows)}\n\n{note}\n"
    if out is not None:
        latex = latex_rows(title, header, [[latex_text(cell) for cell in row] for row in rows])
        pages = {"md": text, "tex": f"{comparison_latex(rows_of_all)}\n{latex}\n\n{latex_text(note)}\n"}
        for suffix, page in pages.items():
            write_text(out / f"comparison.{suffix}", page)
        models, beside = (
            {name: each.summary() for name, each in part.items()} for part in (evaluations, baselines)
        )
        plain = [asdict(test) | {"difference": test.difference._asdict()} for test in tests]
        found = {"models": models, "baselines": beside, "tests": plain, "metric": metric, "seen": seen}
        write_json(out / "comparison.json", found)
    return text


def _gap(interval: Interval) -> str:
    return f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
