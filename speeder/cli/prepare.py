"""`speeder prepare`: arguments and work."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from speeder.cli.shared import ray_arguments, runner_for
from speeder.errors import SpeederError

if TYPE_CHECKING:
    from speeder.data.prepared import PreparedData

SUMMARY = (
    "Turn raw files into prepared data: a catalogue with features, and interactions. ml-100k needs no PATH."
)
_FORMATS = """

  plain      interactions.csv with the columns user,item,timestamp, and perhaps rating;
             items.csv with item,title, and perhaps text and image; .tsv, .parquet and .jsonl too
  sequences  sequences.txt with a line per user, "user item item ...", oldest first; perhaps items.csv

A modality is a kind of features of an item: text (of its title and text), image (of its picture), or
collaborative (of who had it)."""
EXAMPLE = (
    "speeder prepare plain shop/ --out data/shop"
    "\n  speeder prepare amazon-2018 raw/ --out data/beauty --k-core 5"
    "\n  speeder prepare ml-100k --out data/ml-100k --posters posters/"
)


_SHARED_TIMES = 0.1  # share of events with an equal time that is told
_MOST_SHOWN = 10  # names of columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder prepare`."""
    parser.description = f"{parser.description}{_FORMATS}"
    parser.add_argument(
        "name",
        choices=["amazon-2014", "amazon-2018", "amazon-2023", "ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-latest",
                 "microlens", "plain", "sequences"],
        metavar="NAME",
        help="the raw format: %(choices)s",
    )  # fmt: skip
    parser.add_argument(
        "path",
        type=Path,
        nargs="?",
        metavar="PATH",
        help="folder of the raw files, or the file of interactions",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--items", type=Path, metavar="FILE", help="file of items, if it is not in the folder PATH"
    )
    parser.add_argument(
        "--images",
        "--posters",
        type=Path,
        metavar="DIR",
        help="folder of pictures named by item id, for the image modality",
    )
    parser.add_argument(
        "--k-core",
        type=int,
        metavar="K",
        help="drop users and items with fewer interactions, repeatedly until none is left; 1 keeps all"
        " (default: 5 for amazon-*, else 1)",
    )
    parser.add_argument(
        "--min-rating", type=float, metavar="STARS", help="drop interactions with a lower rating"
    )
    parser.add_argument(
        "--repeats",
        action="store_true",
        help="keep repeated interactions of a user with an item (default: only the earliest)",
    )
    parser.add_argument(
        "--ties",
        choices=["file", "shuffle"],
        default="file",
        help="order of a user's events with one time: the file's, or random (default: file)",
    )
    parser.add_argument("--ties-seed", type=int, metavar="N", help="seed of --ties shuffle (default: 0)")
    parser.add_argument(
        "--split",
        choices=["leave-one-out", "temporal"],
        default="leave-one-out",
        help="each user's last two items are the targets, or what comes after a date that is the same for all users"
        " (default: leave-one-out)",
    )
    parser.add_argument(
        "--split-time",
        nargs=2,
        metavar=("VALIDATION", "TEST"),
        help="of --split temporal: training ends at the first date, test targets begin at the second; dates such as"
        " 2014-01-31, or shares of the events (default: 0.8 0.9)",
    )
    parser.add_argument(
        "--time-unit",
        choices=["s", "ms", "us", "ns"],
        default="s",
        help="unit of the times of plain data (default: s)",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=["text", "image", "collaborative"],
        metavar="MODALITY",
        help="leave out text, image or collaborative features",
    )
    parser.add_argument(
        "--require",
        nargs="+",
        default=[],
        choices=["text", "image"],
        metavar="MODALITY",
        help="leave out items that have none of these (text, image), with their interactions: for recipes that read"
        " nothing else",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="NAME",
        help="further columns of a plain table of items to keep, such as a category, for recommend --where",
    )
    parser.add_argument(
        "--text-encoder",
        metavar="MODEL",
        help="an asset, a folder or a Hub id, or backbone:MODEL for the mean of a language model's input"
        " embeddings (default: minilm)",
    )
    parser.add_argument(
        "--image-encoder",
        metavar="MODEL",
        help="an asset, a folder or a Hub id (default: efficientnet-lite0)",
    )
    ray_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Make prepared data, and print a summary.

    Raises:
        SpeederError: a mistake in the arguments or the files, in one line.
    """
    from speeder.data.describe import split_facts
    from speeder.prepare.pipeline import prepare, prepare_ml100k
    from speeder.prepare.raw_table import REPEATED
    from speeder.recipes.schema import MODALITIES

    modalities = [name for name in MODALITIES if name not in options.without]
    runner = runner_for(options)
    settings: dict = {"modalities": modalities, "runner": runner, "require": options.require}
    settings |= {"ties": options.ties, "ties_seed": options.ties_seed}
    settings |= {"split": options.split, "split_time": options.split_time}
    if options.text_encoder and "text" in modalities:
        from speeder.prepare.encoders.text import TextEncoder

        settings["text_encoder"] = TextEncoder(options.text_encoder, runner=runner)
    if options.image_encoder and "image" in modalities:
        from speeder.prepare.encoders.image import ImageEncoder

        settings["image_encoder"] = ImageEncoder(options.image_encoder, runner=runner)
    filters = {
        "core": options.k_core,
        "min_rating": options.min_rating,
        "repeats": options.repeats,
        "time_unit": options.time_unit,
    }
    if options.path is not None:
        data = prepare(
            options.name,
            options.path,
            options.out,
            items=options.items,
            images=options.images,
            columns=options.columns,
            **filters,
            **settings,
        )
    elif options.name != "ml-100k":
        raise SpeederError(f"prepare: expected the PATH of the raw files of {options.name}")
    elif (
        options.items
        or options.columns
        or filters != {"core": None, "min_rating": None, "repeats": False, "time_unit": "s"}
    ):
        raise SpeederError(
            "prepare: ml-100k without PATH takes no --items, no --columns and no filters: give PATH, the folder of its"
            " raw files (u.data, u.item)"
        )
    else:
        data = prepare_ml100k(options.out, posters=options.images, **settings)
    modalities = ", ".join(
        f"{name} ({int(data.catalogue.present[name].sum())} of {len(data.catalogue)} items)"
        for name in data.catalogue.modalities
    )
    print(
        f"{options.out}: {len(data.interactions)} interactions of {len(data.interactions.user_ids)} users with"
        f" {len(data.catalogue)} items, modalities: {modalities or 'none'}"
    )
    dropped = data.manifest["interactions"]["dropped"]
    if dropped:
        told = {REPEATED: "repeats of a user with an item (keep them with --repeats)"}
        reasons = ", ".join(
            f"{lines} {told.get(reason, reason)}" for reason, lines in sorted(dropped.items())
        )
        print(f"dropped: {reasons}; more: speeder describe {options.out}")
    for name, value in split_facts(data) if options.split == "temporal" else ():
        print(f"{name}: {value}")
    for note in _notes(data):
        print(note)


def _notes(data: PreparedData) -> Iterator[str]:
    """What of the raw files is not used, not there, or not certain, a line each."""
    from speeder.data.interactions import FILE_ORDER

    manifest, catalogue = data.manifest, data.catalogue
    for part, names in manifest.get("unused_columns", {}).items():
        hint = (
            " (what describes an item belongs into text; --columns keeps a column for filters)"
            if part == "items"
            else ""
        )
        if names:
            more = ", ..." if len(names) > _MOST_SHOWN else ""
            yield f"{part}: columns not used: {', '.join(names[:_MOST_SHOWN])}{more}{hint}"
    bare = sum(
        bool(title) and text.removesuffix(".") == title.removesuffix(".")
        for title, text in zip(catalogue.titles, catalogue.texts, strict=True)
    )
    if bare:
        yield f"items with only their title as text: {bare} of {len(catalogue)}"
    if "read" in manifest["items"] and (missing := manifest["items"].get("without_line")):
        yield f"items without a line in the file of items: {missing}"
    shared = manifest.get("same_time", 0) / len(data.interactions)
    if shared > _SHARED_TIMES and manifest["ties"] == FILE_ORDER:
        yield (
            f"{shared:.0%} of events share their user's time with another: their order is the file's, oldest first is"
            " expected; if it means nothing, take --ties shuffle"
        )
