"""`speeder items`: arguments and work."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "Add new items to a recommender without training, or hold items out to measure cold start."
EXAMPLE = (
    "speeder items add --run runs/first --items new.csv"
    "\n  speeder items hold-out --data data/ml-100k --out data/ml-100k-cold"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder items`."""
    item_commands = parser.add_subparsers(dest="items_command", required=True, metavar="COMMAND")
    add = item_commands.add_parser(
        "add",
        help="add a table's items to a recommender without training",
        description="Encode a table's items as `prepare` does and add them to a recommender without training, all or"
        " none. They can be recommended at once.",
    )
    add.set_defaults(run_command=run_add)
    which = add.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, metavar="RUN", help="run folder of a finished training")
    which.add_argument("--model", type=Path, metavar="DIR", help="a saved recommender's folder")
    add.add_argument(
        "--items",
        type=Path,
        required=True,
        metavar="FILE",
        help="table (.csv, .tsv, .parquet, .jsonl) with the column id, and any of title, text, image",
    )
    add.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write the new recommender there, and leave the old one unchanged",
    )
    add.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of the files in the column image (default: FILE's)",
    )
    for modality in ("text", "image"):
        add.add_argument(
            f"--{modality}-encoder",
            metavar="MODEL",
            help="as for prepare (default: the encoder of the run's data)",
        )
    hold_out = item_commands.add_parser(
        "hold-out",
        help="hold items out from prepared data, to measure cold start",
        description="Write OUT/warm, prepared data without some of the items, and OUT/cold, these items and their"
        " users. Train on OUT/warm; then: speeder evaluate RUN --protocol cold-items.",
    )
    hold_out.set_defaults(run_command=run_hold_out)
    hold_out.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared data")
    hold_out.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder to write")
    hold_out.add_argument(
        "--share", type=float, default=0.1, metavar="X", help="share of the items to hold out (default: 0.1)"
    )
    hold_out.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the draw (default: 0)")


def run_add(options: argparse.Namespace) -> None:
    """`speeder items add`."""
    from speeder.data.find_run import find_model
    from speeder.prepare.new_items import add_items, prepared_encoders

    folder = find_model(options.run or options.model)
    names = prepared_encoders(folder.parent)
    encoders = {
        "text_encoder": options.text_encoder or names.get("text"),
        "image_encoder": options.image_encoder or names.get("image"),
    }
    added = add_items(folder, options.items, out=options.out, images=options.images, **encoders)
    has = ", ".join(f"{name} ({int(there.sum())})" for name, there in added.present.items())
    print(f"{options.out or folder}: {len(added)} items added, with {has}; recommend with:")
    print(f"  speeder recommend {options.out or options.run or options.model} --history {added.ids[0]}")


def run_hold_out(options: argparse.Namespace) -> None:
    """`speeder items hold-out`."""
    from speeder.studies.cold_start import make_hold_out

    warm, cold = make_hold_out(options.data, options.out, options.share, options.seed)
    print(
        f"{options.out}: {len(cold.catalogue)} of {len(warm.catalogue) + len(cold.catalogue)} items held out,"
        f" {len(cold.users)} users have one of them as a target; train with --data {options.out / 'warm'}"
    )


run = run_add  # for the parser; each subcommand sets its own
