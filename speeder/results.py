"""What a run folder says about itself: tables, plots, recommendations by title, gate weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from speeder.baselines.popularity import Popularity
from speeder.baselines.sasrec import SASRec
from speeder.data.files import atomic_path, read_json, write_json
from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.evaluate import Evaluation, Scorer, comparison_table, evaluate
from speeder.evaluation.leaks import check_features
from speeder.model import SpeederForCausalLM
from speeder.plots import plot_comparison, plot_gate_distribution, plot_gates, plot_training
from speeder.training import stage_logs

EVALUATIONS = "evaluations"


def evaluate_once(run: Path, name: str, model: Scorer, data: PreparedData, split: str = "test") -> Evaluation:
    """Evaluate under a name, or read the evaluation that the run folder already holds for this very split.

    The name must stand for one model of this run, such as a finished stage's.
    """
    path = run / EVALUATIONS / split / f"{_file_name(name)}.json"
    if path.exists():
        known = Evaluation.load(path)
        if known.split_hash == data.split.hash():
            return known
    evaluation = evaluate(model, data.split, split)
    evaluation.save(path)
    return evaluation


def baselines(run: Path, data: PreparedData, split: str = "test") -> dict[str, Evaluation]:
    """Popularity and a cross-entropy SASRec, fitted on the training part; SASRec stops by the validation ranking.

    SASRec is kept in `run/baselines/sasrec` and not fitted twice for the same data.
    """
    training, num_items = data.split.training(), len(data.catalogue)
    folder = run / "baselines" / "sasrec"
    popularity = Popularity(training, num_items)
    sasrec = SASRec.load(folder) if (folder / "config.json").exists() else None
    if sasrec is None or sasrec.training_hash != popularity.training_hash:
        validation = (data.split.histories("validation"), data.split.targets("validation"))
        sasrec = SASRec.fit(training, num_items, validation=validation)
        sasrec.save(folder)
    return {
        "popularity": evaluate_once(run, "popularity", popularity, data, split),
        "SASRec (cross-entropy)": evaluate_once(run, "SASRec (cross-entropy)", sasrec, data, split),
    }


def write_results(run: Path, evaluations: Mapping[str, Evaluation], split: str = "test") -> str:
    """Write `results.md`, `results.json` and `plots/*.png` into a run folder.

    Args:
        evaluations: name -> evaluation, in the order of the table's rows.

    Returns:
        the Markdown tables.
    """
    table = comparison_table(evaluations)
    suffix = "" if split == "test" else f"-{split}"
    with atomic_path(run / f"results{suffix}.md") as temporary:
        temporary.write_text(table + "\n", encoding="utf-8")
    summary = {name: evaluation.to_dict() for name, evaluation in evaluations.items()}
    for entry in summary.values():
        del entry["per_user"]  # each user's ranks lie in evaluations/
    write_json(run / f"results{suffix}.json", summary)
    plot_comparison(evaluations, run / "plots" / f"comparison{suffix}.png")
    return table


def write_training_plots(out: Path, run: Path, model: SpeederForCausalLM) -> None:
    """Write `training.png`, `gates.png` and `gate_distribution.png` of a run into `out/plots`."""
    curves, gates, spans, start = {}, {}, {}, 0
    for name, log in stage_logs(run).items():
        losses = [(start + entry["step"], entry["loss"]) for entry in log if "loss" in entry]
        ranking = [(start + entry["step"], entry["eval_NDCG@10"]) for entry in log if "eval_NDCG@10" in entry]
        curves[name] = {"loss": losses, **({"NDCG@10": ranking} if ranking else {})}
        for entry in log:
            for key, value in entry.items():
                if key.startswith("gate/"):
                    gates.setdefault(key.removeprefix("gate/"), []).append((start + entry["step"], value))
        end = start + max(entry["step"] for entry in log)
        spans[name] = (start, end)
        start = end
    plot_training(curves, out / "plots" / "training.png")
    plot_gates(gates, out / "plots" / "gates.png", spans)
    present = model.mrc.presence()
    weights = {name: values[present[name]].numpy() for name, values in model.gates().items()}
    plot_gate_distribution(weights, out / "plots" / "gate_distribution.png")


def gate_table(model: SpeederForCausalLM) -> str:
    """Mean gate weight of each modality over all items, and over the items that have it, as a Markdown table."""
    present = model.mrc.presence()
    lines = [
        "| modality | items that have it | mean gate, all items | mean gate, items that have it |",
        "|---|---|---|---|",
    ]
    for name, weights in model.gates().items():
        own = weights[present[name]]
        lines.append(f"| {name} | {len(own)} | {weights.mean():.3f} | {own.mean() if len(own) else 0:.3f} |")
    return "\n".join(lines)


def example_recommendations(model: SpeederForCausalLM, data: PreparedData, users: int = 3, k: int = 5) -> str:
    """What a few test users saw last, what they are recommended, and what they took next, by title."""
    histories, targets = data.split.histories("test"), data.split.targets("test")
    # spread over the users, so that short and long histories are among them
    chosen = np.linspace(0, len(histories) - 1, users + 2).astype(int)[1:-1]
    lines = []

    def title(item: int) -> str:
        return data.catalogue.titles[item] or f"item {data.catalogue.ids[item]}"

    for row, recommended in zip(chosen, model.recommend([histories[i] for i in chosen], k), strict=True):
        user = data.interactions.user_ids[data.split.users("test")[row]]
        last = [title(i) for i in histories[row][-5:]]
        lines.append(f"User {user} ({len(histories[row])} items), last: " + "; ".join(last))
        for place, item in enumerate(recommended, 1):
            hit = "   <- taken next" if item.item == targets[row] else ""
            lines.append(f"  {place}. {title(item.item)}{hit}")
        lines.append(f"  taken next: {title(targets[row])}")
    return "\n".join(lines)


def run_data(run: Path) -> PreparedData:
    """The prepared data that a run was trained on, from where its `recipe.json` says.

    Raises:
        SpeederError: it is not there, or has changed, or its features leak (`LeakError`).
    """
    if not (run / "recipe.json").exists():
        raise SpeederError(f"{run}: expected a run folder, which knows its data, found no recipe.json")
    folder = read_json(run / "recipe.json").get("data")
    if folder is None:
        raise SpeederError(f"{run}: was trained without saying where its data lie (train's data_folder)")
    data = PreparedData.load(folder)
    check_features(data)
    return data


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-+" else "_" for letter in name.lower())
