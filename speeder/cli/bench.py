"""`speeder bench`: arguments and work."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

SUMMARY = "Measure Speeder's speed beside language models that read items as text; the same command resumes."
EXAMPLE = "speeder bench --data data/beauty --out runs/bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder bench`."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="prepared data (default: MovieLens-100K, prepared in OUT/data)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        metavar="DIR",
        help="folder of results (default: runs/bench)",
    )
    parser.add_argument(
        "--backbone",
        default="smollm2-135m",
        metavar="MODEL",
        help="an asset, a folder or a Hub id (default: %(default)s)",
    )
    parser.add_argument(
        "--layers", type=int, default=4, metavar="N", help="keep the backbone's first N layers (default: 4)"
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        metavar="NAME",
        help="systems to measure: speeder, and some of text-prompt, title-generation, yes-no (default: all)",
    )
    parser.add_argument(
        "--histories",
        type=int,
        nargs="*",
        default=[10, 50, 200],
        metavar="N",
        help="history lengths to measure, in items (default: 10 50 200)",
    )
    parser.add_argument(
        "--descriptions",
        type=int,
        nargs="*",
        default=[20, 100, 200],
        metavar="N",
        help="item text lengths to measure, in tokens (default: 20 100 200)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: one per core)")
    parser.add_argument(
        "--budget", type=float, default=750, metavar="SECONDS", help="approximate total time (default: 750)"
    )


def run(options: argparse.Namespace) -> None:
    """Measure, and print the report.

    Raises:
        SpeederError: a mistake in the arguments or the files, in one line.
    """
    from speeder.studies.bench.run import REPORT, Plan, bench, default_data
    from speeder.studies.bench.systems import SYSTEMS

    plan = Plan(
        options.backbone,
        options.layers,
        tuple(options.systems or SYSTEMS),
        tuple(options.histories),
        tuple(options.descriptions),
        len(os.sched_getaffinity(0)) if options.threads is None else options.threads,
        options.budget,
    )
    bench(plan, options.data or default_data(options.out), options.out)
    print((options.out / REPORT).read_text(encoding="utf-8"))
