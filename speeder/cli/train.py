"""`speeder train`: arguments and work."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from speeder.errors import SpeederError

SUMMARY = "Train a recommender by a recipe; stop at any moment, and go on with --resume."
EXAMPLE = "speeder train --data data/ml-100k --recipe ml-100k --out runs/first"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder train`."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared data (--resume knows them)")
    parser.add_argument("--recipe", metavar="FILE", help="a YAML file, the name of a bundled recipe, or auto")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")


def run(options: argparse.Namespace) -> None:
    """Train by a recipe, or go on with a run.

    Raises:
        SpeederError: a mistake in the arguments or the files, in one line.
    """
    from speeder.data.find_run import recorded_data, run_data
    from speeder.data.prepared import PreparedData
    from speeder.io.files import read_json
    from speeder.io.memory import keep_freed_memory
    from speeder.recipes.bsarec import BSARecRecipe
    from speeder.recipes.load import AUTO_RECIPE, load_recipe, recipe_from_dict, recipe_name_for
    from speeder.recipes.neighbours import NeighboursRecipe
    from speeder.recipes.sasrec import SASRecRecipe
    from speeder.studies.evaluate_run import write_training_plots
    from speeder.training.distributed import processes
    from speeder.training.neighbours import train_neighbours
    from speeder.training.sequential import train_sequential
    from speeder.training.train import train

    keep_freed_memory()
    # torchrun --max-restarts starts all processes again, by the same command
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    options.resume |= restarted and (options.out / "recipe.json").exists()
    if options.resume and not (options.out / "recipe.json").exists():
        raise SpeederError(f"{options.out}: expected a run to resume, found none")
    if not options.resume and (options.data is None or options.recipe is None):
        raise SpeederError("train: expected --data and --recipe (or --resume)")
    data = run_data(options.out) if options.data is None else PreparedData.load(options.data)
    if options.recipe is None:
        recipe, notes = recipe_from_dict(read_json(options.out / "recipe.json")["recipe"]), []
    else:
        named = recipe_name_for(data.split.training()) if options.recipe == AUTO_RECIPE else options.recipe
        recipe, notes = load_recipe(named).for_modalities(data.catalogue.readable)
        if options.recipe == AUTO_RECIPE:
            notes.insert(0, f"recipe {named!r}, by the median length of the training histories")
    together = processes()
    alone = {
        SASRecRecipe: ("SASRec", train_sequential),
        BSARecRecipe: ("BSARec", train_sequential),
        NeighboursRecipe: ("neighbours", train_neighbours),
    }
    name, train_by = alone.get(type(recipe), ("", train))
    if together.use_distributed and name:
        raise SpeederError(f"train: {name} trains on one process; start it without torchrun")
    for note in notes if together.is_main_process else []:
        print(f"Note: {note}")
    folder = options.data or recorded_data(options.out)
    model = train_by(recipe, data, options.out, resume=options.resume, data_folder=folder)
    if together.is_main_process:
        write_training_plots(options.out, options.out, model)
        print(f"{options.out / 'model'}: the recommender. Evaluate it: speeder evaluate {options.out}")
        print(f"Write a report: speeder report {options.out}")
    together.destroy_process_group()
