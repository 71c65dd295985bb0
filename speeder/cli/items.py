"""`speeder items`: its arguments, and what it does."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "Add new items to a recommender without training, or hold items out to see how well that goes."
EXAMPLE = (
    "speeder items add --run runs/first --items new.csv"
    "\n  speeder items hold-out --data data/ml-100k --out data/ml-100k-cold"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder items`."""
    item_commands = parser.add_subparsers(dest="items_command", required=True, metavar="COMMAND")
    add = item_commands.add_parser(
        "add",
        help="add a table's items to a recommender, all or none, without training",
        description="Encode a table's items as `prepare` does and add them to a recommender, all or none, without"
        " training: they can be recommended at once.",
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
        help="table (.csv, .tsv, .parquet, .jsonl) with a column id, and of title, text, image what there is",
    )
    add.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write the recommender with the items there, and leave the old one",
    )
    add.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder that the column image names files in (default: FILE's)",
    )
    for modality in ("text", "image"):
        add.add_argument(
            f"--{modality}-encoder",
            metavar="MODEL",
            help="as prepare's (default: what the run's data were prepared with)",
        )
    hold_out = item_commands.add_parser(
        "hold-out",
        help="hold items out from prepared data, to measure how new items are recommended",
        description="Write OUT/warm, prepared data without some of the items, and OUT/cold, those items and who took"
        " them. Train on OUT/warm; then: speeder evaluate RUN --protocol cold-items.",
    )
    hold_out.set_defaults(run_command=run_hold_out)
    hold_out.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared data")
    hold_out.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder to write")
    hold_out.add_argument("--share", type=float, default=0.1, metavar="X", help="of the items (default: 0.1)")
    hold_out.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw (default: 0)")


def run_add(options: argparse.Namespace) -> None:
    """`speeder items add`."""
    from speeder.data.runs import find_model
    from speeder.prepare.new_items import add_items, prepared_encoders

    folder = find_model(options.run or options.model)
    names = prepared_encoders(folder.parent)
    encoders = {
        "text_encoder": options.text_encoder or names.get("text"),
        "image_encoder": options.image_encoder or names.get("image"),
    }
    added = add_items(folder, options.items, out=options.out, images=options.images, **encoders)
    has = ", ".join(f"{name} ({int(there.sum())})" for name, there in added.present.items())
    print(f"{options.out or folder}: {len(added)} items added, which have {has}; recommend them with:")
    print(f"  speeder recommend {options.out or options.run or options.model} --history {added.ids[0]}")


def run_hold_out(options: argparse.Namespace) -> None:
    """`speeder items hold-out`."""
    from speeder.studies.cold_start import make_hold_out

    warm, cold = make_hold_out(options.data, options.out, options.share, options.seed)
    print(
        f"{options.out}: {len(cold.catalogue)} of {len(warm.catalogue) + len(cold.catalogue)} items held out,"
        f" {len(cold.users)} users took one of them after all that is trained on; train with --data"
        f" {options.out / 'warm'}"
    )


run = run_add  # for the parser; each of its own commands takes this one's place
