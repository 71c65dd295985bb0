"""`speeder recommend`: arguments and work."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from speeder.cli.shared import ray_arguments, runner_for
from speeder.errors import SpeederError

SUMMARY = "Recommend the next items for a history of item ids, or for a user of the data."
UNKNOWN = ("error", "skip")  # as speeder.model.choice has them, which would import torch here
FALLBACKS = ("popularity",)
EXAMPLE = "speeder recommend runs/first --history 50 172 133 -k 5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder recommend`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a saved recommender's folder")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument(
        "--history", nargs="*", metavar="ID", help="item ids, oldest first; none with --fallback"
    )
    who.add_argument("--user", metavar="ID", help="a user of the run's data; the history is all interactions")
    who.add_argument(
        "--histories",
        type=Path,
        metavar="PARQUET",
        help="file of users' histories, or a folder of such files: columns user and items (ids, oldest first)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PARQUET",
        help="with --histories: file to write (columns user, items, scores)",
    )
    ray_arguments(parser)
    parser.add_argument(
        "--index",
        type=Path,
        metavar="DIR",
        help="search an index or token shards that `speeder index` wrote",
    )
    choice = parser.add_argument_group("what may be recommended, and what becomes of the unknown")
    choice.add_argument("--allow", nargs="+", metavar="ID", help="recommend these items alone")
    choice.add_argument("--deny", nargs="+", default=[], metavar="ID", help="never recommend these items")
    choice.add_argument(
        "--where",
        action="append",
        metavar="COLUMN=VALUE",
        help="only items with this value in a column of the catalogue; repeated: one of the values of each column",
    )
    choice.add_argument(
        "--unknown",
        choices=UNKNOWN,
        default="error",
        help="ids that the catalogue lacks: an error, or left out (default: error)",
    )
    choice.add_argument(
        "--fallback", choices=FALLBACKS, help="for an empty history: the items most frequent in training"
    )
    parser.add_argument("-k", type=int, default=10, help="number of items (default: 10)")
    parser.add_argument("--include-seen", action="store_true", help="also recommend items of the history")


def run(options: argparse.Namespace) -> None:
    """Print recommendations for one history, or write those for a file of histories.

    Raises:
        SpeederError: a mistake in the arguments or the files, in one line.
    """
    from speeder.baselines.auto import load_model
    from speeder.data.find_run import find_model, run_data

    if options.k < 1:
        raise SpeederError(f"-k: expected at least 1, got {options.k}")
    if (options.histories is None) != (options.out is None):
        raise SpeederError("recommend: expected --histories and --out together")
    runner = runner_for(options)
    if runner is not None and options.histories is None:
        raise SpeederError("--ray: expected --histories, whose users are shared among workers")
    if options.index is not None and options.histories is not None:
        raise SpeederError("--index: expected --history or --user, got --histories")
    how: dict[str, Any] = {"exclude_seen": not options.include_seen}
    how |= {"allow": options.allow, "deny": options.deny, "where": _where(options.where)}
    how |= {"unknown": options.unknown, "fallback": options.fallback}
    model_folder = find_model(options.run)
    if options.histories is not None:
        from speeder.serving.recommend_file import recommend_file

        how |= {"runner": runner} if runner else {}
        users = recommend_file(model_folder, options.histories, options.out, options.k, **how)
        print(f"{options.out}: {options.k} items for each of {users} users")
        return
    history: list[int | str] = options.history
    if options.user is not None:
        interactions = run_data(model_folder.parent).interactions
        if options.user not in interactions.user_ids:
            raise SpeederError(f"--user: no user {options.user!r} among {len(interactions.user_ids)}")
        history = interactions.sequences()[interactions.user_ids.index(options.user)].tolist()
    model = load_model(model_folder)
    if not hasattr(model, "recommend"):
        raise SpeederError(f"recommend: expected a run of a language model, got {type(model).__name__}")
    if options.index is not None:
        from speeder.retrieval.ann import open_store

        model.use_item_store(open_store(options.index))
    try:
        recommended = model.recommend([history], options.k, **how)[0]
    except (KeyError, ValueError) as error:
        raise SpeederError(f"recommend: {error.args[0]}") from error
    if options.user is not None:  # beside the recommendations, which another program may read
        titles = [model.catalogue.titles[item] or model.catalogue.ids[item] for item in history[-3:]]
        print(f"after {len(history)} items, the last: {', '.join(titles)}", file=sys.stderr)
    for place, item in enumerate(recommended, 1):
        print(f"{place:3}. {item.id:>10}  {item.score:8.3f}  {item.title}")


def _where(options: list[str] | None) -> dict[str, list[str]] | None:
    """`--where` as column -> values."""
    found: dict[str, list[str]] = {}
    for option in options or ():
        column, equals, value = option.partition("=")
        if not column or not equals:
            raise SpeederError(f"--where: expected COLUMN=VALUE, got {option!r}")
        found.setdefault(column, []).append(value)
    return found or None
