"""Runs the bench: one point after another, all systems in turns at each, within a time budget; resumable."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.io.files import read_json, write_json, write_text
from speeder.io.machine import describe
from speeder.prepare.pipeline import prepare_ml100k
from speeder.recipes.schema import AUTO
from speeder.studies.bench.chart import plot_bench
from speeder.studies.bench.machine import busy_seconds, cpu_seconds, gemm_peak
from speeder.studies.bench.report import report
from speeder.studies.bench.systems import RANKING_TOKENS, SYSTEMS, TRAINING_TOKENS
from speeder.studies.bench.worker import Worker
from speeder.studies.bench.workload import CANDIDATES, LONGEST, TITLE_TOKENS, USERS, Workload, choose_users
from speeder.training.precision import DTYPES, resolve_precision

FORMAT = "speeder-bench-2"
RESULTS, REPORT, PICTURE = "results.json", "report.md", "bench.png"
ROUNDS = 3  # of turns
LEAST_SECONDS = 0.3  # for each task: what is fast is repeated even where time is over
MOST = {"batch": 30, "single": 300, "train": 30}  # repetitions
MAIN = Workload()  # the point at which targets are judged


@dataclass(frozen=True)
class Plan:
    """What to measure; a second call with the same plan resumes.

    Attributes:
        systems: names of [`SYSTEMS`], including "speeder".
        histories, descriptions: lengths to measure, in items and in tokens.
        budget: approximate total seconds; each system gets at least one repetition, unless that alone would take
            longer than its point's share.

    Raises:
        SpeederError: a value is out of its range.
    """

    backbone: str = "smollm2-135m"
    layers: int = 4
    systems: tuple[str, ...] = tuple(SYSTEMS)
    histories: tuple[int, ...] = (10, 50, 200)
    descriptions: tuple[int, ...] = (20, 100, 200)
    threads: int = 2
    budget: float = 750.0

    def __post_init__(self):
        unknown = [name for name in self.systems if name not in SYSTEMS]
        if unknown or "speeder" not in self.systems:
            got = repr(unknown[0]) if unknown else ", ".join(self.systems) or "none"
            raise SpeederError(f"--systems: expected speeder and some of {', '.join(SYSTEMS)}, got {got}")
        for name in ("layers", "threads", "histories", "descriptions"):
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if value < 1:
                    raise SpeederError(f"--{name}: expected at least 1, got {value}")
        if not self.budget > 0:
            raise SpeederError(f"--budget: expected seconds above 0, got {self.budget:g}")

    @property
    def points(self) -> list[Workload]:
        """The main point first, users as they are, then growing histories and descriptions."""
        points = [MAIN, Workload(history=None)]
        points += [Workload(history=length) for length in sorted(self.histories)]
        points += [Workload(text=tokens) for tokens in sorted(self.descriptions)]
        return list(dict.fromkeys(points))

    def settings(self) -> dict:
        """The part of the plan that is saved with the results; a call that resumes must agree in it."""
        kept = asdict(self) | {"format": FORMAT}
        kept.pop("budget")
        return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def bench(plan: Plan, folder: Path, out: Path, say: Callable[[str], None] = print) -> dict:
    """Measure what is missing in `out`; after every point `results.json`, `report.md` and `bench.png` are written.

    Args:
        folder: prepared data.
        say: called with each line for the user.

    Returns:
        the content of `results.json`.

    Raises:
        SpeederError: the data cannot be used, `out` holds a bench of other settings, or a system's process ended.
    """
    torch.set_num_threads(plan.threads)
    data = PreparedData.load(folder)
    settings = plan.settings() | {"split": data.split.hash(), "dataset": data.manifest.get("dataset")}
    results = _begin(out, settings, plan, data, folder.resolve().name)
    points = plan.points
    for point in points:
        choose_users(data, point)  # fails before anything is measured
    others = max(1, len(points) - 1)  # half of the time is for the main point, where targets are judged
    weights = {point: others if point == MAIN else 1.0 for point in points}
    for number, point in enumerate(points, 1):
        if point.name in results["points"]:
            continue
        seconds = plan.budget * weights[point] / sum(weights.values())
        say(f"[{number}/{len(points)}] {point.name}: about {seconds:.0f} s")
        measured = measure_point(plan, folder, point, seconds, results["conditions"]["precision"])
        results["points"][point.name] = {"workload": asdict(point)} | measured
        write_json(out / RESULTS, results)
        write_text(out / REPORT, report(results, MAIN.name))
        plot_bench(results, out / PICTURE)
    return results


def default_data(out: Path) -> Path:
    """MovieLens-100K, prepared in the results folder if it is not there yet."""
    folder = out / "data"
    if not folder.exists():
        prepare_ml100k(folder, modalities=("text", "collaborative"))
    return folder


def _begin(out: Path, settings: dict, plan: Plan, data: PreparedData, name: str) -> dict:
    if (out / RESULTS).exists():
        results = read_json(out / RESULTS)
        if results.get("settings") != settings:
            raise SpeederError(
                f"{out}: expected a bench of the same settings, found others; choose another --out"
            )
        begun, here = results["machine"], describe(plan.threads)
        if begun != here:
            differing = ", ".join(
                f"{key} {begun.get(key)}, here {here.get(key)}"
                for key in {**begun, **here}
                if begun.get(key) != here.get(key)
            )
            raise SpeederError(
                f"{out}: the bench was begun on another machine ({differing}); choose another --out"
            )
        return results
    return {
        "settings": settings,
        "machine": describe(plan.threads),
        "data": {"name": name, "items": len(data.catalogue), "users": len(data.split.users("test"))},
        "conditions": {
            "training_tokens": TRAINING_TOKENS,
            "ranking_tokens": RANKING_TOKENS,
            "candidates": CANDIDATES,
            "title_tokens": TITLE_TOKENS,
            "longest": LONGEST,
            "users": USERS,
            "precision": resolve_precision(AUTO, "cpu"),
        },
        "points": {},
    }


def measure_point(plan: Plan, folder: Path, workload: Workload, seconds: float, precision: str) -> dict:
    """One point: every system in its own process, all alive at once but only one at work.

    Args:
        precision: that all systems compute in, the faster of `"bf16"` and `"fp32"` on the machine.

    Returns:
        `systems`: name -> what was measured; `peak`: flops a second of the fastest product; `busy_elsewhere`: cores
        that other programs used meanwhile; `seconds` that it took.
    """
    began, busy, own = time.perf_counter(), busy_seconds(), cpu_seconds()
    workers = [
        Worker(name, folder, workload, plan.backbone, plan.layers, plan.threads, precision)
        for name in plan.systems
    ]
    try:
        measured: dict[str, dict] = {}
        for worker in workers:  # loading is not measured, so it may be done side by side
            worker.send("load")
        for worker in workers:
            worker.answer()
        peak = gemm_peak(DTYPES[precision])
        for worker in workers:
            first = worker.ask("first")
            measured[worker.name] = worker.ask("facts") | {"first": first, "samples": {}, "left_out": {}}
        end = began + seconds
        _rounds(workers, measured, ("batch", "single"), 0.6 * (end - time.perf_counter()), seconds, peak)
        for worker in workers:
            measured[worker.name]["memory"] = {"inference": worker.ask("memory", reset=True)}
        _rounds(workers, measured, ("train",), end - time.perf_counter(), seconds, peak)
        for worker in workers:
            found = measured[worker.name]
            trained = "train" in found["samples"]
            found["memory"]["training"] = worker.ask("memory", reset=False) if trained else None
            if workload == MAIN and trained:
                found["profile"] = worker.ask("profile")
        spent = time.perf_counter() - began
        elsewhere = None
        if busy is not None:
            ours = cpu_seconds() - own + sum(worker.ask("cpu_seconds") for worker in workers)
            elsewhere = max(0.0, busy_seconds() - busy - ours) / spent
        return {"systems": measured, "peak": peak, "busy_elsewhere": elsewhere, "seconds": spent}
    finally:
        for worker in workers:
            worker.close()


def _rounds(
    workers: Sequence[Worker],
    measured: dict[str, dict],
    tasks: Sequence[str],
    seconds: float,
    longest: float,
    peak: float,
) -> None:
    """Let the systems work in turns, so that a change of the machine's speed meets all of them.

    Each task gets its part of the seconds in `ROUNDS` rounds; one that has used up its part is done, but each is
    measured once, unless that would take more than `longest` even at the machine's peak.
    """
    share = max(LEAST_SECONDS, seconds / (len(workers) * len(tasks)))
    used = dict.fromkeys(((worker.name, task) for worker in workers for task in tasks), 0.0)
    for turn in range(ROUNDS):
        start = turn % len(workers)
        for worker in [*workers[start:], *workers[:start]]:
            found = measured[worker.name]
            for task in tasks:
                samples = found["samples"].setdefault(task, [])
                least = found["flops"][task] / peak
                if least > longest:
                    found["left_out"][task] = least
                wanted = turn == 0 or (used[worker.name, task] < share and len(samples) < MOST[task])
                # a batch of one user is a single user
                if not wanted or least > longest or (task == "batch" and found["ranked_users"] == 1):
                    continue
                begun = time.perf_counter()
                limits = {"seconds": share / ROUNDS, "most": -(-MOST[task] // ROUNDS), "patience": share}
                samples += worker.ask("measure", task=task, **limits)
                used[worker.name, task] += time.perf_counter() - begun
    for found in measured.values():
        if found["ranked_users"] == 1 and "batch" in tasks:
            found["samples"]["batch"] = found["samples"]["single"]
        found["samples"] = {task: samples for task, samples in found["samples"].items() if samples}
