"""The `speeder` command. Each of its commands is a file of `speeder/cli/`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from speeder.cli import (
    ablate,
    assets,
    bench,
    compare,
    demo,
    describe,
    evaluate,
    index,
    items,
    prepare,
    recommend,
    report,
    serve,
    train,
)
from speeder.errors import SpeederError

COMMANDS = {
    "assets": assets,
    "prepare": prepare,
    "describe": describe,
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "ablate": ablate,
    "recommend": recommend,
    "index": index,
    "serve": serve,
    "report": report,
    "items": items,
    "bench": bench,
    "demo": demo,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        the exit status: 0; 1 after a mistake, which is printed in one line; 130 after Ctrl-C.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # a terminal's encoding may lack the letters of a title
    options = build_parser().parse_args(arguments)
    # progress bars of reading and writing weights would interrupt those of training and ranking
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # of several training processes, only the first shows progress
    if os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        if options.command != "train" and os.environ.get("WORLD_SIZE", "1") != "1":
            raise SpeederError(
                f"{options.command}: runs on one process; start it without torchrun or accelerate"
            )
        options.run_command(options)
    except SpeederError as error:
        print(f"speeder: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # such as `speeder recommend ... | head`
        sys.stderr.close()
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"speeder: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        goes_on = "; the same command goes on"
        hints = {"train": "; go on with --resume", "ablate": goes_on, "demo": goes_on}
        hint = hints.get(options.command, "")
        print(f"\nspeeder: stopped{hint}", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="speeder",
        description="Train, evaluate and use multimodal LLM recommenders in which an item is one token.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        made = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.SUMMARY,
            epilog=f"example:\n  {command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run_command=command.run)
        command.add_arguments(made)
    return parser
