"""The results of a study: each variant's means over seeds, and its paired differences from the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speeder.evaluation.bootstrap import Interval, bootstrap_intervals
from speeder.evaluation.compare import holm, sign_flip_p_value
from speeder.evaluation.result import SEEN, Evaluation
from speeder.evaluation.slices import quantile_slices
from speeder.evaluation.tables import check_same_task, markdown_rows
from speeder.io.files import write_json, write_text
from speeder.studies.ablation.chart import plot_differences
from speeder.studies.ablation.study import BASE, Study

REPORTED = ("HR@10", "NDCG@10")
MAIN = "NDCG@10"
TOOK = ("seconds", "cpu_seconds")
COLD = 10  # interactions in the training part up to which a target is called cold
_RESAMPLES = 10_000
_SLICE_RESAMPLES = 2_000


@dataclass
class Finished:
    """The finished runs of a study: variant -> seed -> evaluation, and how it was trained.

    `took` holds `precision`, `processor` and, unless the run was interrupted, the times named in `TOOK`.
    """

    study: Study
    evaluations: dict[str, dict[int, Evaluation]] = field(default_factory=dict)
    took: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)

    def add(self, variant: str, seed: int, evaluation: Evaluation, took: dict[str, Any]) -> None:
        """Add one run."""
        self.evaluations.setdefault(variant, {})[seed] = evaluation
        self.took.setdefault(variant, {})[seed] = took

    def names(self) -> list[str]:
        """Variants with a finished run, in the study's order."""
        return [name for name in self.study.variants if name in self.evaluations]

    def values(self, variant: str, metric: str, seen: str, seeds: set[int] | None = None) -> np.ndarray:
        """Each user's value, the mean over seeds (None: all that are finished): `(n,)`."""
        runs = self.evaluations[variant]
        return np.mean([runs[seed].values(metric, seen) for seed in sorted(seeds or runs)], axis=0)

    def gap(self, variant: str, metric: str, seen: str) -> np.ndarray | None:
        """Each user's value minus the base's, over the seeds of both: `(n,)`; None if they share no seed."""
        shared = set(self.evaluations[variant]) & set(self.evaluations.get(BASE, ()))
        if variant == BASE or not shared:
            return None
        return self.values(variant, metric, seen, shared) - self.values(BASE, metric, seen, shared)


def summarise(finished: Finished, baselines: Mapping[str, Evaluation]) -> dict[str, Any]:
    """All figures of the report as JSON values.

    Raises:
        ValueError: runs are of different tasks (see `check_same_task`).
    """
    every = {
        f"{name}, seed {seed}": run
        for name, runs in finished.evaluations.items()
        for seed, run in runs.items()
    }
    check_same_task(every | dict(baselines))
    one = next(iter(every.values()))
    variants = {name: _variant(finished, name) for name in finished.names()}
    for seen in SEEN:
        for metric in REPORTED:
            _add_differences(variants, finished, metric, seen)
    rows = {name: Finished(finished.study, {name: {0: each}}) for name, each in baselines.items()}
    return {
        "study": finished.study.name,
        "task": one.task,
        "split_title": one.split_title,
        "num_users": len(one),
        "cold": COLD,
        "variants": variants,
        "baselines": {
            name: {"metrics": _means(row, name), "slices": _slices(row, name)} for name, row in rows.items()
        },
    }


def _variant(finished: Finished, name: str) -> dict[str, Any]:
    variant, runs = finished.study.variants[name], finished.evaluations[name]
    took = {key: [run[key] for run in finished.took[name].values() if key in run] for key in TOOK}
    return {
        "group": variant.group,
        "tests": variant.tests,
        "changes": variant.changes,
        "seeds": sorted(runs),
        **{key: float(np.mean(values)) if values else None for key, values in took.items()},
        "took_by_seed": {str(seed): each for seed, each in sorted(finished.took[name].items())},
        "by_seed": {
            str(seed): {seen: {metric: runs[seed].mean(metric, seen) for metric in REPORTED} for seen in SEEN}
            for seed in sorted(runs)
        },
        "metrics": _means(finished, name),
        "slices": _slices(finished, name),
    }


def _means(finished: Finished, name: str) -> dict[str, dict[str, dict]]:
    """ "masked" and "allowed" -> metric -> mean with its interval over users, and the standard deviation over seeds."""
    pairs = [(seen, metric) for seen in SEEN for metric in REPORTED]
    columns = np.stack([finished.values(name, metric, seen) for seen, metric in pairs], axis=1)
    found: dict[str, dict[str, dict]] = {seen: {} for seen in SEEN}
    for (seen, metric), interval in zip(pairs, bootstrap_intervals(columns, _RESAMPLES), strict=True):
        means = [run.mean(metric, seen) for run in finished.evaluations[name].values()]
        deviation = float(np.std(means, ddof=1)) if len(means) > 1 else None
        found[seen][metric] = interval._asdict() | {"deviation": deviation}
    return found


def _add_differences(variants: dict[str, Any], finished: Finished, metric: str, seen: str) -> None:
    """Add `differences[seen][metric]` to each variant, tested as in `compare`; Holm's family is all variants."""
    gaps = {name: gap for name in variants if (gap := finished.gap(name, metric, seen)) is not None}
    if not gaps:
        return
    intervals = bootstrap_intervals(np.stack(list(gaps.values()), axis=1), _RESAMPLES)
    p_values = [sign_flip_p_value(gap) for gap in gaps.values()]
    for name, interval, p, adjusted in zip(gaps, intervals, p_values, holm(p_values), strict=True):
        part = variants[name].setdefault("differences", {}).setdefault(seen, {})
        part[metric] = interval._asdict() | {"p_value": p, "adjusted": adjusted}


def slices_of(evaluation: Evaluation) -> dict[str, dict[str, np.ndarray]]:
    """Users by history length (quartiles), target popularity (terciles), and cold or warm targets."""
    counts = evaluation.target_counts
    cold = {f"cold (≤ {COLD} in training)": counts <= COLD, f"warm (> {COLD})": counts > COLD}
    return {
        "history length": quantile_slices(evaluation.history_lengths, 4, "items"),
        "target popularity": quantile_slices(counts, 3, "in training"),
        "cold and warm targets": {label: member for label, member in cold.items() if member.any()},
    }


def _slices(finished: Finished, name: str) -> dict[str, dict[str, dict]]:
    """The main metric, seen items masked: kind -> label -> users, mean with interval, difference from the base."""
    values, gap = finished.values(name, MAIN, "masked"), finished.gap(name, MAIN, "masked")
    columns = np.stack([values] if gap is None else [values, gap], axis=1)
    found: dict[str, dict[str, dict]] = {}
    for kind, members in slices_of(next(iter(finished.evaluations[name].values()))).items():
        for label, member in members.items():
            intervals = bootstrap_intervals(columns[member], _SLICE_RESAMPLES)
            entry: dict[str, Any] = {"users": int(member.sum()), MAIN: intervals[0]._asdict()}
            if gap is not None:
                entry["difference"] = intervals[1]._asdict()
            found.setdefault(kind, {})[label] = entry
    return found


def write_report(out: Path, finished: Finished, baselines: Mapping[str, Evaluation]) -> str:
    """Write `ablations.json`, `.md` and, once there are differences, `.png` into the study's folder.

    Returns:
        the Markdown.
    """
    found = summarise(finished, baselines)
    write_json(out / "ablations.json", found)
    text = markdown(found)
    write_text(out / "ablations.md", text)
    differences = {
        name: (
            entry["group"],
            Interval(*(entry["differences"]["masked"][MAIN][key] for key in Interval._fields)),
        )
        for name, entry in found["variants"].items()
        if "differences" in entry
    }
    if differences:
        plot_differences(differences, out / "ablations.png", f"{MAIN} minus the base's")
    return text


def markdown(found: dict[str, Any]) -> str:
    """The report's tables."""
    variants, rows = found["variants"], []
    for name, entry in variants.items():
        metrics, gaps = entry["metrics"]["masked"], entry.get("differences", {}).get("masked", {})
        rows.append(
            [entry["group"], name, entry["tests"], str(len(entry["seeds"]))]
            + [text for metric in REPORTED for text in (_mean(metrics[metric]), _deviation(metrics[metric]))]
            + [text for metric in REPORTED[::-1] for text in _tested(gaps.get(metric))]
            + ["-" if entry[key] is None else f"{entry[key]:.0f}" for key in TOOK]
        )
    for name, entry in found["baselines"].items():
        metrics = entry["metrics"]["masked"]
        cells = [text for metric in REPORTED for text in (_mean(metrics[metric]), "-")]
        rows.append(["baseline", name, "", "-", *cells, *["-"] * 6])
    header = ["", "variant", "change", "seeds"]
    header += [text for metric in REPORTED for text in (metric, "± seeds")]
    header += [text for metric in REPORTED[::-1] for text in (f"{metric} - base", "p (Holm)")]
    parts = [
        f"**{found['study']}: seen items masked**",
        markdown_rows([*header, "s", "CPU s"], rows),
        _note(found),
    ]
    parts += ["**Seen items allowed**", _allowed(found)]
    base_slices = next(iter(variants.values()))["slices"]
    for kind in base_slices:
        parts += [f"**{MAIN} by {kind}, seen items masked**", _slice_table(found, kind)]
    return "\n\n".join(parts) + "\n"


def _allowed(found: dict[str, Any]) -> str:
    rows = []
    for name, entry in (found["variants"] | found["baselines"]).items():
        metrics, gaps = entry["metrics"]["allowed"], entry.get("differences", {}).get("allowed", {})
        rows.append([name, *(_mean(metrics[metric]) for metric in REPORTED), *_tested(gaps.get(MAIN))])
    return markdown_rows(["variant", *REPORTED, f"{MAIN} - base", "p (Holm)"], rows)


def _slice_table(found: dict[str, Any], kind: str) -> str:
    """Means of the base and of the baselines, and each variant's difference from the base."""
    parts = found["variants"] | found["baselines"]
    labels = {label: part["users"] for label, part in next(iter(parts.values()))["slices"][kind].items()}
    rows = [
        [name]
        + [
            _gap(part["difference"]) if "difference" in part else _mean(part[MAIN])
            for part in entry["slices"][kind].values()
        ]
        for name, entry in parts.items()
    ]
    return markdown_rows(["", *(f"{label} ({users} users)" for label, users in labels.items())], rows)


def _note(found: dict[str, Any]) -> str:
    family = sum("differences" in entry for entry in found["variants"].values())
    return (
        f"{found['split_title']}, test targets, {found['num_users']:,} users, all {found['task']['num_items']:,} items "
        "ranked; ties count against the target. A user's value is the mean over the seeds. In brackets: 95 % "
        "bootstrap interval over users. Differences from the base are paired by user, over the seeds of both. "
        "± seeds: standard deviation of the means of single runs; the intervals do not include it. p: two-sided "
        f"paired permutation test over users, corrected by Holm for {family} variant(s); it is about these trained "
        "models, not about other seeds. s, CPU s: seconds of training with its validation rankings, and those of "
        "all cores together, for runs without a stop. "
        f"{_trained_on(found)}Signed figures in the tables by slice are differences from the base. "
        f"Split `{found['task']['split_hash']}`."
    )


def _trained_on(found: dict[str, Any]) -> str:
    """Precisions and machines of all runs, as a sentence."""
    runs = [run for entry in found["variants"].values() for run in entry["took_by_seed"].values()]
    kinds = {key: sorted({run[key] for run in runs if run.get(key)}) for key in ("precision", "processor")}
    parts = [" and ".join(kinds["precision"]), "; ".join(kinds["processor"])]
    return f"Trained in {' on '.join(part for part in parts if part)}. " if any(parts) else ""


def _mean(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"


def _gap(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}]"


def _deviation(metric: Mapping[str, Any]) -> str:
    return "-" if metric["deviation"] is None else f"{metric['deviation']:.4f}"


def _tested(gap: Mapping[str, float] | None) -> list[str]:
    return ["-", "-"] if gap is None else [_gap(gap), f"{gap['adjusted']:.4f}"]
