"""`speeder evaluate`: arguments and work."""

from __future__ import annotations

import argparse
from pathlib import Path

from speeder.cli.shared import protocol_arguments, ray_arguments, runner_for
from speeder.errors import SpeederError

SUMMARY = "Rank the catalogue (or candidates) for every test user, beside popularity, neighbours and SASRec."
EXAMPLE = "speeder evaluate runs/first --protocol vhr"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder evaluate`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of a finished training")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the run's data, if they were moved")
    protocol_arguments(parser)
    parser.add_argument(
        "--answers",
        choices=["ranking", "titles"],
        default="ranking",
        help="titles: with --protocol vhr, also evaluate the titles that Speeder writes, in a separate row"
        " (needs a recipe with `titles`; default: ranking)",
    )
    parser.add_argument(
        "--no-baselines", action="store_true", help="leave out popularity, neighbours and SASRec"
    )
    parser.add_argument(
        "--bsarec", action="store_true", help="also fit BSARec, which takes several times as long as SASRec"
    )
    ray_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Rank for every user, save the results in the run, and print them.

    Raises:
        SpeederError: a mistake in the arguments or the files, in one line.
    """
    from speeder.baselines.auto import load_model
    from speeder.baselines.bsarec.model import BSARec
    from speeder.baselines.neighbours import Neighbours
    from speeder.baselines.sasrec.model import SASRec
    from speeder.data.find_run import data_folder_of, find_model, run_data
    from speeder.evaluation.result import COLD_ITEMS
    from speeder.prepare.new_items import without_added
    from speeder.studies.cold_start import evaluate_cold_run
    from speeder.studies.evaluate_run import (
        ask_here,
        baselines,
        check_protocol,
        evaluate_answers,
        measure_folder,
        measure_for,
        write_results,
    )

    if options.bsarec and (options.no_baselines or options.protocol == COLD_ITEMS):
        other = (
            "--no-baselines" if options.no_baselines else "--protocol cold-items, whose items it cannot rank"
        )
        raise SpeederError(f"bsarec: expected without {other}")
    model_folder = find_model(options.run)
    run, runner = model_folder.parent, runner_for(options)
    check_protocol(options.protocol, options.negatives, options.candidates_seed, options.answers)
    data = run_data(run, options.data)
    model = load_model(model_folder)
    if added := without_added(model, data.catalogue):
        print(f"Note: {added} items were added after training and are left out")
    cold, folder, ask_for = options.protocol == COLD_ITEMS, data_folder_of(run, options.data), ask_here
    if runner is not None:
        from speeder.studies.evaluate_in_parts import RunAsked

        ask_for = RunAsked(run, model_folder, folder, runner, cold)
    if cold:
        measure_folder(options.split, options.protocol)  # refuses another split
        how = {"with_baselines": not options.no_baselines, "ask_for": ask_for}
        print(evaluate_cold_run(run, model, data, folder, **how))
        return
    measure = measure_for(
        run, data, options.split, options.protocol, options.negatives, options.candidates_seed, ask_for
    )
    beside = {
        "with_neighbours": not isinstance(model, Neighbours),
        "with_sasrec": not isinstance(model, SASRec),
        "with_bsarec": options.bsarec and not isinstance(model, BSARec),
    }
    try:
        rows = evaluate_answers(run, model, measure, options.answers)
        others = {} if options.no_baselines else baselines(run, measure, **beside)
        table = write_results(run, others | rows, measure.folder)
    except ValueError as error:  # such as a model over another catalogue than the data's
        raise SpeederError(f"evaluate: {error}") from error
    print(table)
