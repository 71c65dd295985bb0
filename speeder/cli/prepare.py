"""`speeder prepare`: arguments and work."""

from __future__ import annotations

import argparse
from pathlib import Path

from speeder.cli.shared import ray_arguments, runner_for
from speeder.errors import SpeederError

SUMMARY = (
    "Turn raw files into prepared data: a catalogue with features, and interactions. ml-100k needs no PATH."
)
EXAMPLE = (
    "speeder prepare amazon-2018 raw/ --out data/beauty --k-core 5"
    "\n  speeder prepare ml-100k --out data/ml-100k --posters posters/"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder prepare`."""
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
    from speeder.prepare.pipeline import prepare, prepare_ml100k
    from speeder.recipes.schema import MODALITIES

    modalities = [name for name in MODALITIES if name not in options.without]
    runner = runner_for(options)
    settings: dict = {"modalities": modalities, "runner": runner, "require": options.require}
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
            **filters,
            **settings,
        )
    elif options.name != "ml-100k":
        raise SpeederError(f"prepare: expected the PATH of the raw files of {options.name}")
    elif options.items or filters != {"core": None, "min_rating": None, "repeats": False, "time_unit": "s"}:
        raise SpeederError(
            "prepare: ml-100k without PATH takes no --items and no filters: give PATH, the folder of its raw files"
            " (u.data, u.item)"
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
        reasons = ", ".join(f"{lines} {reason}" for reason, lines in sorted(dropped.items()))
        print(f"dropped: {reasons}; more: speeder describe {options.out}")
