"""Retrieval through faiss (the extra `ann`): an index over item tokens, and its recall of the exact top k.

An index finds candidates, which are then scored exactly by their tokens from the shards. So scores are the model's; an
index can only miss items.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speeder.errors import SpeederError
from speeder.io.extras import pip_command
from speeder.io.files import atomic_folder, check_files, describe_files, read_json, write_json
from speeder.io.places import find_recorded, path_from
from speeder.model.item_store import ItemRows, best, hide, scoring_vectors, seen_table, vectors_of
from speeder.model.queries import Queries
from speeder.retrieval.shards import TokenShards, check_k

FORMAT = "speeder-item-index-1"
KINDS = ("exact", "hnsw", "ivf-pq")
SEARCH = {"ef_search": 128, "nprobe": 32, "refine": 8}
EFFORTS: dict[str, list[dict[str, int]]] = {  # from hasty to thorough, to be compared
    "exact": [{}],
    "hnsw": [{"ef_search": 64}, {"ef_search": 256}, {"ef_search": 1024}],
    "ivf-pq": [{"nprobe": 16}, {"nprobe": 64, "refine": 16}, {"nprobe": 128, "refine": 64}],
}
INDEX_FILE = "index.faiss"
_SCORED_BYTES = 1 << 28  # of candidates' vectors that are held at once
_PER_LIST = 40  # training vectors for each of an IVF's lists; faiss asks for 39


def load_faiss():
    """faiss, with torch's number of threads; raises `SpeederError` if it is not installed."""
    try:
        import faiss
    except ImportError:
        raise SpeederError(f"index: expected faiss, which is not installed: {pip_command('ann')}") from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def build_index(
    shards: TokenShards,
    folder: str | Path,
    kind: str,
    *,
    m: int = 32,
    ef_construction: int = 40,
    nlist: int | None = None,
    pq_bytes: int | None = None,
    seed: int = 0,
    search: Mapping[str, int] | None = None,
) -> ItemIndex:
    """Build an index over the shards' items, shard by shard, and write it to a folder, whole or not at all.

    Args:
        kind: `"exact"` (all vectors, in float32), `"hnsw"` (the same and a graph), `"ivf-pq"` (codes of a few bytes).
        m: hnsw: neighbours per item in the graph (twice as many in its lowest layer).
        ef_construction: hnsw: candidates while building.
        nlist: ivf-pq: number of lists; None: about twice the root of the number of items.
        pq_bytes: ivf-pq: bytes per item's code, a divisor of the hidden size; None: about a quarter of it.
        seed: seed of the sample that an ivf-pq is trained on.
        search: default search settings of `ItemIndex`, with the names of `SEARCH`.

    Raises:
        SpeederError: faiss is not installed, a setting does not fit, or the folder holds something else.
    """
    faiss = load_faiss()
    width, count = shards.hidden_size, shards.num_items
    if kind not in KINDS:
        raise SpeederError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    for name, value in (
        ("m", m),
        ("ef_construction", ef_construction),
        ("nlist", nlist),
        ("pq_bytes", pq_bytes),
    ):
        if value is not None and value < 1:
            raise SpeederError(f"{name}: expected at least 1, got {value}")
    settings: dict[str, Any] = {}
    search = _checked_search(search or {})
    if kind == "exact":
        index = faiss.IndexFlatIP(width)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, m, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = ef_construction
        settings = {"m": m, "ef_construction": ef_construction}
    else:
        nlist = nlist or 1 << max(round(math.log2(2 * math.sqrt(count))), 0)
        pq_bytes = pq_bytes or max(part for part in range(1, max(width // 4, 1) + 1) if width % part == 0)
        if width % pq_bytes:
            raise SpeederError(f"pq_bytes: expected a divisor of the hidden size {width}, got {pq_bytes}")
        if count < max(nlist, 256):
            raise SpeederError(
                f"ivf-pq: expected at least {max(nlist, 256)} items, got {count}; take exact or hnsw"
            )
        quantizer = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFPQ(quantizer, width, nlist, pq_bytes, 8, faiss.METRIC_INNER_PRODUCT)
        index.train(_sample(shards, max(_PER_LIST * nlist, 256 * _PER_LIST), seed))
        settings = {"nlist": nlist, "pq_bytes": pq_bytes, "seed": seed}
    for _, vectors in shards.vectors():
        index.add(_as_numpy(vectors))
    with atomic_folder(folder, {INDEX_FILE, "manifest.json"}) as temporary:
        faiss.write_index(index, str(temporary / INDEX_FILE))
        manifest = {"format": FORMAT, "kind": kind, "settings": settings, "items": count}
        manifest |= {"hidden_size": width, "identity": shards.identity, "search": search}
        manifest["shards"] = str(shards.folder.resolve())
        manifest["shards_from_index"] = path_from(folder, shards.folder)
        write_json(temporary / "manifest.json", manifest | {"files": describe_files(temporary, [INDEX_FILE])})
    return ItemIndex(folder, shards)


def _checked_search(settings: Mapping[str, int]) -> dict[str, int]:
    for name, value in settings.items():
        if name not in SEARCH or value < 1:
            raise SpeederError(f"{name}: expected one of {', '.join(SEARCH)}, at least 1, got {value}")
    return dict(settings)


def _as_numpy(vectors: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(vectors.float().numpy())


def _sample(shards: TokenShards, count: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    chosen = random.choice(shards.num_items, size=min(count, shards.num_items), replace=False)
    return _as_numpy(scoring_vectors(shards.rows(torch.from_numpy(chosen)).tokens))


class ItemIndex:
    """A faiss index, with the token shards that it was built over.

    Args:
        folder: as `build_index` wrote it.
        shards: None opens the shards of the build, also if they were moved together with the index.
        search: search settings: `ef_search` (hnsw: candidates in the graph), `nprobe` (ivf-pq: lists), `refine`
            (candidates per requested item that are scored exactly). Defaults are those of the build, or else `SEARCH`.

    Raises:
        SpeederError: faiss is not installed; a file is missing, truncated or something else; or the shards differ.
    """

    def __init__(self, folder: str | Path, shards: TokenShards | None = None, **search: int):
        faiss = load_faiss()
        self.folder = Path(folder)
        manifest = read_json(self.folder / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise SpeederError(f"{self.folder} holds {manifest.get('format')!r}, and {FORMAT!r} was expected")
        check_files(self.folder, manifest.get("files"), verify=False)
        if shards is None:
            way = manifest.get("shards_from_index")
            shards = TokenShards(find_recorded(self.folder, manifest["shards"], way))
        self.shards = shards
        if manifest["identity"] != self.shards.identity:
            raise SpeederError(
                f"{self.folder}: the index was built over other tokens than those in {self.shards.folder}"
            )
        self.kind = manifest["kind"]
        try:
            self._index = faiss.read_index(str(self.folder / INDEX_FILE))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise SpeederError(f"{self.folder / INDEX_FILE} is no readable index: {reason}") from error
        self.search(**manifest.get("search", {}) | search)

    def search(self, **settings: int) -> None:
        """Set the search settings; those not given become `SEARCH`'s."""
        chosen = SEARCH | _checked_search(settings)
        self.refine = chosen["refine"]
        if self.kind == "hnsw":
            self._index.hnsw.efSearch = chosen["ef_search"]
        elif self.kind == "ivf-pq":
            self._index.nprobe = chosen["nprobe"]

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def nbytes(self) -> int:
        """Bytes of the index's file, which is about its size in memory."""
        return (self.folder / INDEX_FILE).stat().st_size

    def check(self, model) -> None:
        """Raise `SpeederError` unless the index was built with this model's weights and catalogue."""
        self.shards.check(model)

    def rows(self, items: torch.Tensor) -> ItemRows:
        """As `TokenShards.rows`."""
        return self.shards.rows(items)

    def vectors(self) -> Iterator[tuple[int, torch.Tensor]]:
        """As `TokenShards.vectors`."""
        return self.shards.vectors()

    def topk(
        self, queries: Queries | torch.Tensor, k: int, seen: Sequence[Sequence[int]] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `TokenShards.topk`, without items that the index does not find. A query with fewer than `k` candidates is
        answered exactly. Items that the queries add something to are always found."""
        whole = Queries.of(queries)
        queries = whole.dense
        hidden = seen_table(seen, len(queries), queries.device)
        check_k(k, len(self), hidden)
        at_once = max(1, _SCORED_BYTES // (4 * (k * self.refine + hidden.shape[1]) * queries.shape[1]))
        found = [
            self._found(*part, k) for part in zip(queries.split(at_once), hidden.split(at_once), strict=True)
        ]
        scores, items = (torch.cat(parts) for parts in zip(*found, strict=True))
        short = torch.isneginf(scores[:, -1]).nonzero().flatten().tolist()
        if short:
            again = None if seen is None else [seen[row] for row in short]
            scores[short], items[short] = self.shards.topk(queries[short], k, again)
        return whole.best_of_sum(scores, items, partial(vectors_of, self), seen)

    def _found(
        self, queries: torch.Tensor, hidden: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The `k` best of the index's candidates, -inf if there are fewer."""
        count = min(k * self.refine + hidden.shape[1], len(self))
        found = self._index.search(_as_numpy(queries.detach().cpu()), count)[1]
        items = torch.from_numpy(found).to(queries.device)
        rows = self.shards.rows(items.clamp(min=0).flatten())
        vectors = scoring_vectors(rows.tokens)
        # rounded as in the shards' top k
        rounded = queries.to(vectors.dtype).float()
        scores = torch.einsum("nh,nch->nc", rounded, vectors[rows.places(items.clamp(min=0))].float())
        scores = hide(scores.masked_fill(items < 0, -torch.inf), items, hidden)
        return best(scores, items, k)


def recall_at_k(index: ItemIndex, queries: Queries | torch.Tensor, k: int) -> float:
    """Recall@k: the share of the exact `k` best items of queries that the index finds."""
    exact, found = index.shards.topk(queries, k)[1], index.topk(queries, k)[1]
    return float((exact[:, :, None] == found[:, None, :]).any(dim=2).float().mean())


def open_store(folder: str | Path) -> TokenShards | ItemIndex:
    """The token shards or the index in a folder; raises `SpeederError` for anything else."""
    manifest = Path(folder) / "manifest.json"
    if manifest.is_file() and read_json(manifest).get("format") == FORMAT:
        return ItemIndex(folder)
    return TokenShards(folder)
