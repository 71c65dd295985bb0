"""What several commands share: arguments, recipes and recommenders by name or folder."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from speeder.errors import SpeederError

if TYPE_CHECKING:
    from speeder.io.ray import OnRay


def ray_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command that can run on Ray."""
    parser.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run on Ray: on the cluster at ADDRESS (auto, host:port) or RAY_ADDRESS, else on this machine",
    )
    parser.add_argument(
        "--ray-workers", type=int, metavar="N", help="most workers, each with a model (default: one per CPU)"
    )


def protocol_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that select an evaluation, for `evaluate` and `compare`."""
    parser.add_argument(
        "--protocol",
        choices=["full", "vhr", "sampled", "cold-items"],
        default="full",
        help="what is ranked: full: all items; vhr: the target and 19 negatives (VHR@1); sampled: the target and N"
        " negatives, with AUC; cold-items: items held out from training (default: full)",
    )
    parser.add_argument(
        "--split", choices=["test", "validation"], default="test", help="which targets (default: test)"
    )
    parser.add_argument(
        "--negatives", type=int, metavar="N", help="negatives per user with --protocol sampled (default: 20)"
    )
    parser.add_argument(
        "--candidates-seed", type=int, default=0, metavar="S", help="seed of the negatives (default: 0)"
    )


def runner_for(options: argparse.Namespace) -> OnRay | None:
    """The runner for `--ray`; None without it."""
    if options.ray is None:
        if options.ray_workers is not None:
            raise SpeederError("--ray-workers: expected --ray")
        return None
    if options.ray_workers is not None and options.ray_workers < 1:
        raise SpeederError(f"--ray-workers: expected at least 1, got {options.ray_workers}")
    from speeder.io.ray import OnRay

    return OnRay(options.ray or None, options.ray_workers)
