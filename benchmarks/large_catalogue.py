"""A catalogue of a million synthetic items, from training to retrieval, with the peak memory of each phase.

    python -m benchmarks.large_catalogue --items 1000000 --out runs/large

Each phase runs in a process of its own, whose data may not exceed the limit; its peak is the kernel's high-water mark
of resident memory, memory-mapped files included. Written to OUT: report.md, report.json. Linux only. Called again, it
does not repeat phases whose results are there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from speeder.io.files import read_json, write_json, write_text
from speeder.io.machine import processor
from speeder.studies.bench.machine import peak_memory

# Items have a text encoder's width, and far fewer directions in it.
CLUSTERS, LATENT, FEATURES = 2000, 24, 384
SUCCESSOR = 0.8  # chance that the next item is of the next cluster
K, QUERIES = 10, 256
PHASES = ("data", "train", "shards", "queries", "exact", "hnsw", "ivf-pq")
ROOT = Path(__file__).resolve().parent.parent


def make_data(options: argparse.Namespace) -> str:
    """Prepared data: items in clusters, and users who go from cluster to cluster."""
    from speeder.data import ItemCatalogue, PreparedData
    from speeder.data.interactions import SPLIT_RULE, Interactions

    random = np.random.default_rng(0)
    clusters = min(CLUSTERS, options.items // 10)
    centres = random.normal(size=(clusters, LATENT)).astype(np.float32)
    out_of = random.normal(size=(LATENT, FEATURES)).astype(np.float32)
    features = torch.empty(options.items, FEATURES)
    for rows in torch.arange(options.items).split(1 << 16):
        noise = random.standard_normal((len(rows), LATENT), dtype=np.float32)
        latent = centres[rows.numpy() % clusters] + 0.5 * noise
        features[rows] = torch.from_numpy(latent @ out_of)
    lengths = random.integers(12, 41, options.users)
    item, per_cluster = [], options.items // clusters
    for length in lengths:
        cluster = random.integers(clusters)
        for _ in range(length):
            item.append(cluster + clusters * random.integers(per_cluster))
            cluster = (cluster + 1) % clusters if random.random() < SUCCESSOR else random.integers(clusters)
    user, place = np.repeat(np.arange(options.users), lengths), np.concatenate([*map(np.arange, lengths)])
    interactions = Interactions(user, np.array(item), place, [f"user-{n}" for n in range(options.users)])
    numbers = range(options.items)
    catalogue = ItemCatalogue([f"item-{n}" for n in numbers], [f"Item {n}" for n in numbers])
    data = PreparedData(catalogue, interactions, {"dataset": "large-synthetic", "split": SPLIT_RULE})
    data = data.with_features("text", features, made_by="planted clusters", training_hash=None)
    data.save(options.out / "data")
    return f"{options.items} items of {FEATURES} features, {options.users} users, {len(interactions)} interactions"


def make_backbone(folder: Path, width: int) -> None:
    """A random language model of four layers, which no one needs to fetch."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4)
    sizes |= dict(num_attention_heads=max(width // 64, 1), tie_word_embeddings=True, pad_token_id=0)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w0").save_pretrained(folder)


def train_model(options: argparse.Namespace) -> str:
    """Some steps with sampled negatives, and the validation after them, which ranks all items."""
    from speeder.data import PreparedData
    from speeder.recipes.load import recipe_from_dict
    from speeder.training.run_folder import stage_logs
    from speeder.training.train import train

    make_backbone(options.out / "backbone", options.width)
    stage = {"name": "text", "open": ["text"], "steps": options.steps, "learning_rate": 2e-3}
    recipe = {
        "backbone": str(options.out / "backbone"),
        "batch_users": 32,
        "checkpoint_steps": options.steps,
        "log_steps": 1,
        "model": {"negatives": "sampled", "num_negatives": options.negatives},
        "stages": [stage],
    }
    train(recipe_from_dict(recipe), PreparedData.load(options.out / "data"), options.out / "run")
    log = stage_logs(options.out / "run")["text"]
    losses = [line["loss"] for line in log if "loss" in line]
    found = next(line["eval_HR@10"] for line in log if "eval_HR@10" in line)
    seconds = next(line["train_runtime"] for line in log if "train_runtime" in line)
    return (
        f"{options.steps} steps of 32 users and {options.negatives} draws, loss {losses[0]:.2f} to {losses[-1]:.2f},"
        f" {seconds:.0f} s with the validation of {options.users} users among all items, HR@10 {found:.4f}"
    )


def write_shards(options: argparse.Namespace) -> str:
    from speeder.model.modeling import SpeederForCausalLM
    from speeder.retrieval.shards import write_token_shards

    model = SpeederForCausalLM.from_pretrained(options.out / "run" / "model")
    began = time.perf_counter()
    shards = write_token_shards(model, options.out / "shards")
    size = sum(path.stat().st_size for path in shards.folder.glob("*.safetensors"))
    seconds = time.perf_counter() - began
    return f"{size / 2**20:.0f} MiB, {seconds:.0f} s ({len(shards) / seconds:.0f} items/s)"


def make_queries(options: argparse.Namespace) -> str:
    """Test users' queries, and recommendations by the shards as `speeder recommend --index` gives them."""
    from safetensors.torch import save_file

    from speeder.cli.index import measuring_queries
    from speeder.model.modeling import SpeederForCausalLM
    from speeder.retrieval.shards import TokenShards

    model = SpeederForCausalLM.from_pretrained(options.out / "run" / "model")
    model.use_item_store(TokenShards(options.out / "shards"))
    queries = measuring_queries(model, options.out / "run", QUERIES)
    save_file({"queries": queries.dense}, options.out / "queries.safetensors")
    began = time.perf_counter()
    model.recommend([[1, 2001, 4002]], k=K)
    return f"{len(queries)} users; one user recommended in {1000 * (time.perf_counter() - began):.0f} ms by shards"


def search(options: argparse.Namespace) -> str:
    """Build an index, and compare it with the exact top k over the shards."""
    from safetensors.torch import load_file

    from speeder.cli.index import compared
    from speeder.model.queries import Queries
    from speeder.retrieval.ann import build_index
    from speeder.retrieval.shards import TokenShards

    shards = TokenShards(options.out / "shards")
    queries = Queries(load_file(options.out / "queries.safetensors")["queries"])
    if options.phase == "exact":
        return compared({"shards": shards}, queries, K)[0]
    began = time.perf_counter()
    index = build_index(shards, options.out / options.phase, options.phase, m=options.m)
    seconds = time.perf_counter() - began
    lines = compared({options.phase: index}, queries, K)
    return "; ".join([f"built in {seconds:.0f} s, {index.nbytes / 2**20:.0f} MiB", *lines])


def run_phase(options: argparse.Namespace) -> None:
    """One phase in this process; prints its result as JSON."""
    limit = int(options.limit * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(options.threads)
    work = {"data": make_data, "train": train_model, "shards": write_shards, "queries": make_queries}
    began = time.perf_counter()
    found = work.get(options.phase, search)(options)
    result = {"found": found, "seconds": time.perf_counter() - began, "peak_bytes": peak_memory()}
    print(json.dumps(result))


def main(arguments: list[str] | None = None) -> int:
    """Run all phases; 1 where one failed or took more memory than the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--width", type=int, default=256, help="of the backbone, and so of an item's token")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--negatives", type=int, default=4096)
    parser.add_argument("--m", type=int, default=16, help="of hnsw")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=8.0, metavar="GIB", help="of a phase's memory")
    parser.add_argument("--out", type=Path, default=Path("runs/large"))
    parser.add_argument(
        "--only", nargs="+", choices=PHASES, default=PHASES, help="these phases (default: all)"
    )
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.phase:
        run_phase(options)
        return 0
    names = ("items", "users", "width", "steps", "negatives", "m", "threads", "limit")
    settings = {name: getattr(options, name) for name in names}
    report = {"settings": settings, "machine": processor(), "phases": {}}
    if (options.out / "report.json").exists():
        before = read_json(options.out / "report.json")
        if before["settings"] != settings:
            parser.error(f"{options.out}: its report is of other settings; choose another folder")
        report = before
    for phase in options.only:
        if phase not in report["phases"]:
            flags = [f"--{name}={value}" for name, value in settings.items()]
            command = [
                sys.executable,
                "-m",
                "benchmarks.large_catalogue",
                *flags,
                f"--out={options.out.resolve()}",
            ]
            child = subprocess.run(
                [*command, "--phase", phase], stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False
            )
            if child.returncode:
                print(f"{phase}: exit status {child.returncode}", file=sys.stderr)
                return 1
            report["phases"][phase] = json.loads(child.stdout.splitlines()[-1])
            write_json(options.out / "report.json", report)
        result = report["phases"][phase]
        print(
            f"{phase:8} {result['peak_bytes'] / 2**30:5.2f} GiB {result['seconds']:7.0f} s  {result['found']}"
        )
    write_text(options.out / "report.md", as_markdown(report))
    most = max(result["peak_bytes"] for result in report["phases"].values()) / 2**30
    print(f"peak memory of any phase: {most:.2f} GiB; limit: {options.limit:g} GiB")
    return int(most > options.limit)


def as_markdown(report: dict) -> str:
    """The report as a table."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    lines = [f"{report['machine']}; {settings}", "", "| phase | peak memory | time | |", "|---|---|---|---|"]
    for phase, result in report["phases"].items():
        peak = f"{result['peak_bytes'] / 2**30:.2f} GiB"
        lines.append(
            f"| {phase} | {peak} | {result['seconds']:.0f} s | {' '.join(result['found'].split())} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
