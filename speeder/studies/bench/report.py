"""Results as one Markdown report: the table, its columns, the targets, the profile of a training step."""

from __future__ import annotations

from collections.abc import Sequence

from speeder.studies.bench.rates import Row, best_peak, points, ratio, row
from speeder.studies.bench.systems import SYSTEMS

GEMM_TARGET = 0.6
# against -> the targeted speed-up in training and in inference
TARGETS = {"text-prompt": 10, "title-generation": 50}

DEFINITIONS = """\
- **tokens an item**, **tokens a prompt**: tokens that the backbone reads for one item of a history, and for one answer
  (yes-no: for one of a user's {candidates} candidates).
- **targets/s**: training targets per second, with data preparation and optimizer step. Speeder and text-prompt learn
  from every item of a window in one pass; title-generation has one target per prompt, yes-no one per pair of prompts.
  **prompts/s**: the windows, or prompts, of these targets.
- **users/s**: users answered in batches. **p50**, **p99**: milliseconds from one user's history to the answer, one
  user at a time. The answer is the 10 best of the whole catalogue (Speeder, text-prompt); the title of one of
  {candidates} candidates, with as many tokens as titles have on average (title-generation); or the scores of
  {candidates} candidates (yes-no).
- **first s**: seconds from loaded weights to the first user's answer, with the compression of the catalogue (Speeder)
  or its tokenization (the others). Measured once, in a new process.
- **memory GB**: peak resident memory of the system's process while it answered, and while it trained.
- **of peak**: model flops of a training step per second, as a share of the fastest matrix product measured in this
  run. Model flops count nothing twice, attention only below the diagonal, no norms and no optimizer.
- Figures are medians over repetitions, with their number in brackets (p50, p99: the number of users). **x training**,
  **x batch**, **x p50**: how many times faster Speeder is, by the medians.
- A training batch has about {training_tokens:,} tokens, with short and long sequences as in the data. An inference
  batch has as many users as fit in {ranking_tokens:,} tokens, at least one. So no system's batch is too small for the
  machine. A training batch with more or fewer flops than the mean counts for proportionally more or fewer targets.
- All systems run in turns, each in its own process.
- Titles are cut at {title_tokens} tokens, as in the recipes. Texts of N tokens are an item's title and description,
  repeated and cut at N.
"""


def report(results: dict, main: str) -> str:
    """The whole report.

    Args:
        results: as `run.bench` returns them, with at least one point.
        main: the name of the point at which targets are judged.
    """
    sections = ["# Speed: one token an item", conditions(results), table(results)]
    if main in results["points"]:
        sections += ["## Targets", targets(results, main), "## A training step", step(results, main)]
    sections += ["## What the columns mean", DEFINITIONS.format(**results["conditions"])]
    return "\n\n".join(section.rstrip() for section in sections) + "\n"


def conditions(results: dict) -> str:
    """Machine, backbone and data in a few lines."""
    machine, settings, data = results["machine"], results["settings"], results["data"]
    disturbed = [
        point["busy_elsewhere"] for point in points(results).values() if point["busy_elsewhere"] is not None
    ]
    filled = {
        point["workload"]["history"]: measured["filled"]
        for point in points(results).values()
        for measured in point["systems"].values()
        if point["workload"]["history"]
    }
    shares = ", ".join(f"{share:.0%} of {length}" for length, share in sorted(filled.items()))
    bf16 = results["conditions"]["precision"] == "bf16"
    how = "training in bfloat16 autocast, inference with weights in bfloat16" if bf16 else "all in float32"
    lines = [
        f"{settings['backbone']}, {settings['layers']} layers, recipes as bundled: {how};"
        f" data: {data['name']} ({settings['dataset'] or 'of unknown origin'}),"
        f" {data['items']:,} items, {data['users']:,} users.",
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores, {machine['instruction set']},"
        f" torch {machine['torch']}, transformers {machine['transformers']}, Python {machine['python']}.",
        f"Fastest matrix product: {best_peak(results) / 1e9:.0f} GFLOP/s in {'bfloat16' if bf16 else 'float32'}."
        + (f" Other programs used up to {max(disturbed):.2f} cores meanwhile." if disturbed else ""),
        f"Histories of N items are users' own, filled at the old end with items drawn as often as they occur: {shares}."
        if shares
        else "Histories are users' own.",
    ]
    return "\n".join(lines)


def table(results: dict) -> str:
    """Every system at every point."""
    names = (
        "workload", "system", "tokens an item", "tokens a prompt", "targets/s", "prompts/s", "x training", "users/s",
        "x batch", "p50 ms", "p99 ms", "x p50", "first s", "memory GB", "of peak",
    )  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|---|---|" + "---:|" * (len(names) - 2)]
    peak = best_peak(results)
    for name, point in points(results).items():
        ours = row(point["systems"]["speeder"], peak)
        for system, measured in point["systems"].items():
            lines.append(_line(name, system, measured, row(measured, peak), ours))
            name = ""
    left_out = sum(
        bool(each["left_out"]) for point in points(results).values() for each in point["systems"].values()
    )
    note = (
        "\n\n≥: not measured; this is what the model flops of one repetition would take at the machine's peak."
        if left_out
        else ""
    )
    return "\n".join(lines) + note


def _line(workload: str, system: str, measured: dict, found: Row, ours: Row) -> str:
    samples, left_out = measured["samples"], measured["left_out"]

    def counted(value: float | None, task: str) -> str:
        if value is None:
            return f"not measured: ≥ {left_out[task]:,.0f} s" if task in left_out else ""
        return f"{_digits(value)} ({len(samples[task])})"

    def times(value: float | None, theirs: float | None) -> str:
        factor = ratio(value, theirs)
        return "" if factor is None or system == "speeder" else f"{_digits(factor)}"

    memory = [measured["memory"]["inference"], measured["memory"]["training"]]
    p50 = counted(found.p50 and 1000 * found.p50, "single")
    if "single" in left_out:
        p50 = f"≥ {1000 * left_out['single']:,.0f}"
    cells = [
        workload,
        SYSTEMS[system][0],
        _digits(measured["tokens_an_item"]),
        _digits(measured["tokens_a_prompt"]),
        counted(found.targets, "train"),
        _digits(found.prompts),
        times(ours.targets, found.targets),
        counted(found.users, "batch"),
        times(ours.users, found.users),
        p50,
        _digits(found.p99 and 1000 * found.p99),
        times(found.p50, ours.p50),
        _digits(measured["first"]),
        ", ".join("" if size is None else f"{size / 1e9:.2f}" for size in memory),
        "" if found.share is None else f"{found.share:.0%}",
    ]
    return "| " + " | ".join(cells) + " |"


def _digits(value: float | None) -> str:
    """Three digits, and no fewer than the whole number has."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def verdicts(results: dict, main: str) -> list[tuple[str, float, float | None]]:
    """The targets at the main point: (name, target, measured or None)."""
    peak, systems = best_peak(results), results["points"][main]["systems"]
    ours, found = row(systems["speeder"], peak), []
    for name, wanted in TARGETS.items():
        if name in systems:
            theirs = row(systems[name], peak)
            for what, factor in (
                ("training speed", ratio(ours.targets, theirs.targets)),
                ("inference speed in batches", ratio(ours.users, theirs.users)),
                ("inference speed, one user (p50)", ratio(theirs.p50, ours.p50)),
            ):
                found.append((f"{what} against {name}", float(wanted), factor))
    return [*found, ("training step, share of the GEMM peak", GEMM_TARGET, ours.share)]


def targets(results: dict, main: str) -> str:
    """The verdicts as a table."""
    lines = [f"At: {main}.", "", "| | target | measured | |", "|---|---:|---:|---|"]
    for what, wanted, measured in verdicts(results, main):
        show = "{:.0%}".format if wanted < 1 else (lambda factor: f"{_digits(factor)} x")
        cells = ["", "not measured"]
        if measured is not None:
            cells = [show(measured), "reached" if measured >= wanted else "missed"]
        lines.append(f"| {what} | ≥ {show(wanted)} | {' | '.join(cells)} |")
    lines += ["", "The paper claims, over its own rival, 2.5 x training speed and 1/4 of the inference time."]
    return "\n".join(lines)


def step(results: dict, main: str) -> str:
    """Where a training step spends its time, by system."""
    systems = {
        name: each["profile"]
        for name, each in results["points"][main]["systems"].items()
        if "profile" in each
    }
    if not systems:
        return "Not profiled."
    first = next(iter(systems.values()))
    groups = list(dict.fromkeys([*first, *(group for shares in systems.values() for group in shares)]))
    lines = [
        f"Shares of the profiler's self time, two steps each, at: {main}.",
        "",
        "| | " + " | ".join(SYSTEMS[name][0] for name in systems) + " |",
        "|---|" + "---:|" * len(systems),
    ]
    lines += [f"| {group} | " + " | ".join(_shares(systems, group)) + " |" for group in groups]
    return "\n".join(lines)


def _shares(systems: dict[str, dict[str, float]], group: str) -> Sequence[str]:
    return [f"{shares[group]:.1%}" if group in shares else "" for shares in systems.values()]
