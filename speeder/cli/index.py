"""`speeder index`: item tokens as shards on disk, a faiss index over them, and its recall."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from speeder.errors import SpeederError

if TYPE_CHECKING:
    from speeder.model.modeling import SpeederForCausalLM
    from speeder.model.queries import Queries
    from speeder.retrieval.ann import ItemIndex
    from speeder.retrieval.shards import TokenShards

SUMMARY = "Write a recommender's item tokens to disk, build a search index over them, and measure its recall."
EXAMPLE = "speeder index runs/first --kind hnsw"
SHARDS = "shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `speeder index`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a saved recommender's folder")
    parser.add_argument(
        "--kind",
        choices=[SHARDS, "exact", "hnsw", "ivf-pq"],
        default="hnsw",
        help="shards: only the item tokens, which are searched exactly and which every index needs; the others are"
        " faiss indexes over them (default: hnsw)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the index (default: RUN/index/KIND)"
    )
    parser.add_argument(
        "--shards", type=Path, metavar="DIR", help="folder of the shards (default: RUN/index/shards)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the shards (default: the model's)",
    )
    parser.add_argument("-k", type=int, default=10, help="measure recall@k (default: 10)")
    parser.add_argument(
        "--queries", type=int, default=256, metavar="N", help="histories to measure with (default: 256)"
    )
    parser.add_argument("--m", type=int, default=32, help="hnsw: neighbours per item (default: 32)")
    parser.add_argument(
        "--ef-construction", type=int, default=40, help="hnsw: candidates while building (default: 40)"
    )
    parser.add_argument(
        "--ef-search", type=int, metavar="N", help="hnsw: candidates per search (default: 128)"
    )
    parser.add_argument("--nprobe", type=int, metavar="N", help="ivf-pq: lists per search (default: 32)")
    parser.add_argument(
        "--refine", type=int, metavar="N", help="candidates scored exactly per requested item (default: 8)"
    )
    parser.add_argument("--nlist", type=int, help="ivf-pq: lists (default: about 2 sqrt(items))")
    parser.add_argument(
        "--pq-bytes", type=int, help="ivf-pq: bytes per item (default: about hidden size / 4)"
    )


def run(options: argparse.Namespace) -> None:
    """Write shards and an index, and print sizes, times and recall.

    Raises:
        SpeederError: a mistake in the arguments or the files, in one line.
    """
    from speeder.baselines.auto import load_model
    from speeder.data.find_run import find_model
    from speeder.retrieval.ann import SEARCH, build_index, load_faiss
    from speeder.retrieval.shards import write_token_shards

    for name, value in (("-k", options.k), ("--queries", options.queries)):
        if value < 1:
            raise SpeederError(f"{name}: expected at least 1, got {value}")
    if options.kind != SHARDS:
        load_faiss()  # fails before anything is computed
    folder = find_model(options.run)
    model = load_model(folder)
    if not hasattr(model, "use_item_store"):
        raise SpeederError(f"index: expected a run of a language model, got {type(model).__name__}")
    places = options.run / "index"
    began = time.perf_counter()
    shards = write_token_shards(model, options.shards or places / SHARDS, dtype=options.dtype, progress=True)
    size = sum(path.stat().st_size for path in shards.folder.glob("*.safetensors"))
    print(
        f"{shards.folder}: {len(shards)} items, {size / 2**20:.0f} MiB, {time.perf_counter() - began:.1f} s"
    )
    if options.kind == SHARDS:
        return
    began = time.perf_counter()
    index = build_index(
        shards,
        options.out or places / options.kind,
        options.kind,
        m=options.m,
        ef_construction=options.ef_construction,
        nlist=options.nlist,
        pq_bytes=options.pq_bytes,
        search={name: value for name in SEARCH if (value := getattr(options, name)) is not None},
    )
    seconds = time.perf_counter() - began
    print(f"{index.folder}: {options.kind}, {index.nbytes / 2**20:.0f} MiB, {seconds:.1f} s")
    model.use_item_store(shards)
    queries = measuring_queries(model, folder.parent, options.queries)
    k = min(options.k, len(shards))
    for line in compared({"shards": shards, options.kind: index}, queries, k):
        print(line)
    print(
        f"recommend with: speeder recommend {options.run} --index {index.folder} --history {model.catalogue.ids[0]}"
    )


def measuring_queries(model: SpeederForCausalLM, run: Path, count: int) -> Queries:
    """Queries of up to `count` test users of the run's data; of single items if the data are gone."""
    from speeder.data.find_run import run_data
    from speeder.model.queries import Queries

    try:
        histories = run_data(run).split.histories("test")
        histories = [history.tolist() for history in histories[:: max(len(histories) // count, 1)][:count]]
    except SpeederError:
        histories = []
    if not histories:
        step = max(len(model.catalogue) // count, 1)
        histories = [[item] for item in range(0, len(model.catalogue), step)][:count]
    return Queries.cat(model.user_states(histories))


def compared(stores: dict[str, TokenShards | ItemIndex], queries: Queries, k: int) -> list[str]:
    """Lines of each store: time per query, alone and in batches of 64; of an index also its recall@k, from fast to
    thorough settings."""
    from speeder.retrieval.ann import EFFORTS, ItemIndex, recall_at_k

    lines = []
    for name, store in stores.items():
        for effort in EFFORTS[store.kind] if isinstance(store, ItemIndex) else [{}]:
            found = "exact"
            if isinstance(store, ItemIndex):
                store.search(**effort)
                found = f"recall@{k} {recall_at_k(store, queries, k):.4f}"
            alone, many = _milliseconds(store, queries[:16], k, 1), _milliseconds(store, queries, k, 64)
            how = " ".join(f"{key.replace('_', '-')} {value}" for key, value in effort.items())
            times = f"{alone:9.2f} ms a query, {many:9.2f} ms in batches of 64"
            lines.append(f"{name:8} {how:22} {found:17} {times}")
    return lines


def _milliseconds(store: TokenShards | ItemIndex, queries: Queries, k: int, size: int) -> float:
    """Time per query in batches of `size`; the first search, which reads pages from disk, is not counted."""
    batches = list(queries.split(size))
    store.topk(batches[0], k)
    began = time.perf_counter()
    for rows in batches:
        store.topk(rows, k)
    return 1000 * (time.perf_counter() - began) / len(queries)
