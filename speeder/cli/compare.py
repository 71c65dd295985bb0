"""`speeder compare`: arguments and work."""

from __future__ import annotations

import argparse
from pathlib import Path

from speeder.cli.shared import protocol_arguments
from speeder.errors import SpeederError

SUMMARY = (
    "Test whether evaluated runs differ: paired bootstrap and permutation tests over users, Holm-corrected."
)
EXAMPLE = "speeder compare runs/first runs/second --out runs/comparison"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder compare`."""
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run folders, or files in their evaluations/"
    )
    protocol_arguments(parser)
    parser.add_argument("--metric", help="metric to compare (default: NDCG@10, or VHR@1 with --protocol vhr)")
    parser.add_argument(
        "--seen",
        choices=["masked", "allowed"],
        default="masked",
        help="whether items of the history are masked or allowed in the ranking (default: masked)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write comparison.md, .tex and .json there")


def run(options: argparse.Namespace) -> None:
    """Test whether evaluated runs differ, and print the report.

    Raises:
        SpeederError: a mistake in the arguments or the files, in one line.
    """
    from speeder.baselines import BSARec, Neighbours, Popularity, SASRec
    from speeder.evaluation.compare import compare, comparison_report, load_baselines, load_runs
    from speeder.studies.evaluate_run import check_protocol, measure_folder

    count = options.negatives
    check_protocol(options.protocol, count, options.candidates_seed)
    folder = measure_folder(options.split, options.protocol, count, options.candidates_seed)
    evaluations = load_runs(options.runs, folder)
    metric = options.metric or next(iter(evaluations.values())).main_metric
    try:
        tests = compare(evaluations, metric, options.seen)
    except ValueError as error:
        raise SpeederError(f"compare: {error}") from error
    names = (Popularity.label, Neighbours.label, SASRec.label)
    task = next(iter(evaluations.values())).task
    others = load_baselines(options.runs, folder, task, names, optional=(BSARec.label,))
    print(comparison_report(evaluations, tests, metric, options.seen, options.out, others))
