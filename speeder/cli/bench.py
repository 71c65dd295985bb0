"""`speeder bench`: its arguments, and what it does."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

SUMMARY = "Measure Speeder's speed beside language models that read items as text; called again, it goes on."
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
    parser.add_argument("--backbone", default="smollm2-135m", metavar="MODEL", help="default: %(default)s")
    parser.add_argument(
        "--layers", type=int, default=4, metavar="N", help="of the backbone's first (default: 4)"
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        metavar="NAME",
        help="speeder and some of text-prompt, title-generation, yes-no (default: all)",
    )
    parser.add_argument(
        "--histories",
        type=int,
        nargs="*",
        default=[10, 50, 200],
        metavar="N",
        help="items (default: 10 50 200)",
    )
    parser.add_argument(
        "--descriptions",
        type=int,
        nargs="*",
        default=[20, 100, 200],
        metavar="N",
        help="tokens of an item's text (default: 20 100 200)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: one a core")
    parser.add_argument(
        "--budget", type=float, default=750, metavar="SECONDS", help="for the whole, about (default: 750)"
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Measure, and print the report.

    Raises:
        SpeederError: with one readable line, for what a user can get wrong.
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
