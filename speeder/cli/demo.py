"""`speeder demo`: its arguments, and what it does."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "Go the whole way on MovieLens-100K with SmolLM2; called again, it goes on where it stopped."
EXAMPLE = "speeder demo --out runs/demo --posters posters/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder demo`."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="RUN", help="default: runs/demo"
    )
    parser.add_argument(
        "--posters", type=Path, metavar="DIR", help="folder of film posters, for the image stage"
    )
    parser.add_argument("--recipe", metavar="FILE", help="a YAML file, or the name of a bundled recipe")


def run(options: argparse.Namespace) -> None:
    """Go the whole way.

    Raises:
        SpeederError: with one readable line, for what a user can get wrong.
    """
    from speeder.io.memory import keep_freed_memory
    from speeder.studies.demo import demo

    keep_freed_memory()
    demo(options.out, options.posters, options.recipe)
