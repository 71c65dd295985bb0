"""What several commands share: arguments, recipes and recommenders by name or folder."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from speeder.errors import SpeederError

if TYPE_CHECKING:
    from speeder.io.ray import OnRay


def ray_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the work is done: the same words for every command that can hand it to Ray."""
    parser.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="work by Ray Data: on the cluster of ADDRESS (auto, host:port) or RAY_ADDRESS, else on this machine",
    )
    parser.add_argument(
        "--ray-workers", type=int, metavar="N", help="at most so many, each with a model (default: one a CPU)"
    )


def protocol_arguments(parser: argparse.ArgumentParser) -> None:
    """Which evaluation is meant: the same words for making one and for comparing them."""
    parser.add_argument(
        "--protocol",
        choices=["full", "vhr", "sampled", "cold-items"],
        default="full",
        help="all items; target + 19 negatives (VHR@1); target + N negatives with AUC; items held out from training"
        " (default: full)",
    )
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--negatives", type=int, metavar="N", help="with --protocol sampled (default: 20)")
    parser.add_argument(
        "--candidates-seed", type=int, default=0, metavar="S", help="of the negatives (default: 0)"
    )


def runner_for(options: argparse.Namespace) -> OnRay | None:
    """Ray where it is asked for."""
    if options.ray is None:
        if options.ray_workers is not None:
            raise SpeederError("--ray-workers: expected --ray")
        return None
    if options.ray_workers is not None and options.ray_workers < 1:
        raise SpeederError(f"--ray-workers: expected at least 1, got {options.ray_workers}")
    from speeder.io.ray import OnRay

    return OnRay(options.ray or None, options.ray_workers)
