"""`speeder report`: arguments and work."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "Write a run's report as one HTML file: curves, tables, slices, gate weights, example users."
EXAMPLE = "speeder report runs/first\n  speeder report runs/demo --out demo.html --pictures docs/pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder report`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a demo's")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="page to write (default: report.html in RUN)"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="the run's data, if they were moved")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="also write every chart there, as PNG and SVG"
    )
    parser.add_argument(
        "--users", type=int, default=4, metavar="N", help="number of test users to show (default: 4)"
    )


def run(options: argparse.Namespace) -> None:
    """Write the report, and print its path."""
    from speeder.studies.report.build import write_report

    path = write_report(
        options.run,
        options.out,
        data_folder=options.data,
        pictures=options.pictures,
        users=options.users,
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")
