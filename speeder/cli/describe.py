"""`speeder describe`: arguments and work."""

from __future__ import annotations

import argparse
from pathlib import Path

from speeder.errors import SpeederError

SUMMARY = "Print facts about prepared data: sizes, history lengths, modalities, tokens per item."
EXAMPLE = "speeder describe data/beauty --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder describe`."""
    parser.add_argument("data", type=Path, metavar="DIR", help="prepared data")
    parser.add_argument(
        "--tokenizer",
        default="smollm2-135m",
        metavar="MODEL",
        help="tokenizer that counts the tokens of texts: an asset, a folder or a Hub id (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens-per-item", type=int, default=1, metavar="K", help="Speeder's tokens per item (default: 1)"
    )


def run(options: argparse.Namespace) -> None:
    """Print facts about prepared data.

    Raises:
        SpeederError: a mistake in the arguments or the files, in one line.
    """
    from speeder.data.describe import describe
    from speeder.data.prepared import PreparedData

    if options.tokens_per_item < 1:
        raise SpeederError(f"--tokens-per-item: expected at least 1, got {options.tokens_per_item}")
    print(describe(PreparedData.load(options.data), options.tokenizer, options.tokens_per_item))
