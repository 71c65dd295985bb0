"""`speeder ablate`: arguments and work."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "Train variants of a recipe and compare them; stop at any moment, the same command goes on."
EXAMPLE = "speeder ablate ablations-ml-100k --data data/ml-100k --out runs/ablations --only SPAE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder ablate`."""
    parser.add_argument("study", metavar="STUDY", help="a YAML file, or the name of a bundled study")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared data")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        metavar="N",
        help="seeds of the runs (default: 1 2 3)",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="run only the base and these variants or groups"
    )
    parser.add_argument("--keep-models", action="store_true", help="keep the weights of finished runs")


def run(options: argparse.Namespace) -> None:
    """Train and evaluate the study's variants, and print the report.

    Raises:
        SpeederError: a mistake in the arguments or the files, in one line.
    """
    from speeder.data.prepared import PreparedData
    from speeder.studies.ablation.run import ablate
    from speeder.studies.ablation.study import load_study

    study, data = load_study(options.study), PreparedData.load(options.data)
    how = {"only": options.only, "keep_models": options.keep_models, "data_folder": options.data}
    print(ablate(study, data, options.out, options.seeds, **how))
