"""Item tokens on disk: memory-mapped shards, so that a catalogue's tokens need not fit into memory.

A folder has `tokens-00000-of-00016.safetensors`, ... (`tokens` `(n, K, H)`, items in order) and `manifest.json`, which
is written last. Without a manifest the folder is unfinished, and the missing shards are written next.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from speeder.data.fingerprints import features_hash
from speeder.errors import SpeederError
from speeder.io.files import atomic_path, check_files, describe_files, read_json, write_json
from speeder.io.progress import showing
from speeder.model.experts import KeptWhitening, LinearExpert, MLPExpert, WordExpert
from speeder.model.item_store import ItemRows, best, hide, scoring_vectors, seen_table, vectors_of
from speeder.model.mrc import MRC, PIECE
from speeder.model.queries import Queries
from speeder_kernels import topk_items

if TYPE_CHECKING:
    from speeder.model.modeling import SpeederForCausalLM

FORMAT = "speeder-token-shards-1"
SHARD_ITEMS = 1 << 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PLAIN = (MRC, MLPExpert, LinearExpert, KeptWhitening, WordExpert, nn.Linear, nn.Embedding, nn.ModuleDict)
_NAME = re.compile(r"tokens-\d{5,}-of-\d{5,}\.safetensors")


def token_identity(model: SpeederForCausalLM) -> dict[str, str]:
    """SHA-256 of what tokens depend on: MRC's weights, and the catalogue's ids and features.

    Raises:
        SpeederError: MRC has an adapter, a hook or other modules than its own, on which tokens depend too.
    """
    for name, module in model.mrc.named_modules():
        plain = type(module) in _PLAIN and "forward" not in vars(module)
        if not plain or module._forward_hooks or module._forward_pre_hooks:
            raise SpeederError(
                f"item tokens on disk: expected MRC without adapters and hooks, got one at {name or 'mrc'!r} "
                f"({type(module).__name__}); merge the adapter first"
            )
    weights = hashlib.sha256()
    for name, tensor in sorted(model.mrc.state_dict().items()):
        if name == "item_trained" and bool(tensor.all()):  # shards of version 0.1.0 know of no others
            continue
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    catalogue = hashlib.sha256()
    for external in model.catalogue.ids:
        catalogue.update(external.encode() + b"\0")
    if model.config.words:
        for text in model.catalogue.readable_texts():
            catalogue.update(text.encode() + b"\0")
    for name in model.config.modalities:
        content = features_hash(model.catalogue.features[name], model.catalogue.present[name])
        catalogue.update(f"{name} {content} ".encode())
    return {"weights": weights.hexdigest(), "catalogue": catalogue.hexdigest()}


def write_token_shards(
    model: SpeederForCausalLM,
    folder: str | Path,
    *,
    dtype: str | None = None,
    shard_items: int = SHARD_ITEMS,
    progress: bool = False,
) -> TokenShards:
    """Compress the whole catalogue into shards, piece by piece.

    Each shard is whole or absent. After a stop, the same call writes the missing ones. Shards of other weights, another
    catalogue or another size are written again.

    Args:
        folder: new, or with shards only.
        dtype: one of `DTYPES`; None takes the model's.
        shard_items: items per shard.

    Raises:
        SpeederError: the folder has something else, or a setting is out of its range.
    """
    folder = Path(folder)
    dtype = str(model.dtype).removeprefix("torch.") if dtype is None else dtype
    if dtype not in DTYPES:
        raise SpeederError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if shard_items < 1:
        raise SpeederError(f"shard_items: expected at least 1, got {shard_items}")
    count = model.config.num_items
    starts = range(0, count, shard_items)
    names = [f"tokens-{number:05}-of-{len(starts):05}.safetensors" for number in range(len(starts))]
    plan = {
        "format": FORMAT,
        "items": count,
        "tokens_per_item": model.config.tokens_per_item,
        "hidden_size": model.config.hidden_size,
        "dtype": dtype,
        "shard_items": shard_items,
        "identity": token_identity(model),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder, names, plan)
    stamp = {**plan["identity"], "dtype": dtype}
    with model.evaluating(), showing("writing item tokens", len(names), "shard", show=progress) as work:
        for name, start in zip(names, starts, strict=True):
            end = min(start + shard_items, count)
            if not _is_whole(folder / name, stamp | {"start": str(start), "items": str(end - start)}):
                _write_shard(model, folder / name, start, end, DTYPES[dtype], stamp)
            work.update()
    write_json(folder / "manifest.json", plan | {"files": describe_files(folder, names)})
    return TokenShards(folder)


def _clear(folder: Path, names: list[str], plan: dict) -> None:
    """Remove other shards; the manifest first, since no shard counts without it."""
    there = {entry.name for entry in folder.iterdir()}
    strangers = sorted(
        name
        for name in there
        if name != "manifest.json" and not name.startswith(".") and not _NAME.fullmatch(name)
    )
    if strangers:
        raise SpeederError(f"{folder}: expected a folder with token shards only, found {strangers[0]!r}")
    (folder / "manifest.json").unlink(missing_ok=True)
    for name in there - set(names):
        if _NAME.fullmatch(name):
            (folder / name).unlink()


@torch.no_grad()
def _write_shard(
    model: SpeederForCausalLM, path: Path, start: int, end: int, dtype: torch.dtype, stamp: dict[str, str]
) -> None:
    pieces = torch.arange(start, end, device=model.device).split(PIECE)
    tokens = torch.cat([model.mrc(rows)[0].to("cpu", dtype) for rows in pieces])
    with atomic_path(path) as temporary:
        about = stamp | {"start": str(start), "items": str(end - start)}
        save_file({"tokens": tokens.contiguous()}, temporary, metadata=about)


def _is_whole(path: Path, about: dict[str, str]) -> bool:
    """Whether a shard with this content exists; safetensors compares the file's length with its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() == about
    except (OSError, SafetensorError):
        return False


class TokenShards:
    """A catalogue's item tokens in memory-mapped shards.

    Args:
        folder: as `write_token_shards` wrote it.
        verify: also compare the files' SHA-256, which reads them all; sizes are always compared.

    Attributes:
        num_items, tokens_per_item, hidden_size, identity: of the manifest.

    Raises:
        SpeederError: the folder is unfinished or something else; or a shard is missing, truncated or changed.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False):
        self.folder = Path(folder)
        manifest = self._manifest()
        check_files(self.folder, manifest.get("files"), verify=verify)
        try:
            self.num_items, self.shard_items = int(manifest["items"]), int(manifest["shard_items"])
            self.tokens_per_item, self.hidden_size = (
                int(manifest["tokens_per_item"]),
                int(manifest["hidden_size"]),
            )
            self.identity: dict[str, str] = dict(manifest["identity"])
            # by number: with 100,000 shards and more, names are of several lengths
            names = sorted(manifest["files"], key=lambda name: (len(name), name))
            self._shards = [self._mapped(name) for name in names]
        except (KeyError, TypeError, ValueError) as error:
            raise SpeederError(f"{self.folder / 'manifest.json'} is damaged: {error!r}") from error
        lengths = [len(tokens) for tokens in self._shards]
        expected = [
            min(self.shard_items, self.num_items - start)
            for start in range(0, self.num_items, self.shard_items)
        ]
        if lengths != expected:
            raise SpeederError(f"{self.folder}: expected shards of {expected} items, got {lengths}")

    def _manifest(self) -> dict:
        if not (self.folder / "manifest.json").is_file():
            raise SpeederError(
                f"{self.folder}: expected finished token shards, found no manifest.json; write them with: "
                "speeder index RUN --kind shards"
            )
        manifest = read_json(self.folder / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise SpeederError(f"{self.folder} holds {manifest.get('format')!r}, and {FORMAT!r} was expected")
        return manifest

    def _mapped(self, name: str) -> torch.Tensor:
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                tokens = file.get_tensor("tokens")
        except (OSError, SafetensorError) as error:
            raise SpeederError(f"{self.folder / name} is no readable shard: {error}") from error
        if tuple(tokens.shape[1:]) != (self.tokens_per_item, self.hidden_size):
            raise SpeederError(
                f"{self.folder / name}: expected (n, {self.tokens_per_item}, {self.hidden_size}) tokens, "
                f"got {tuple(tokens.shape)}"
            )
        return tokens

    def __len__(self) -> int:
        return self.num_items

    def check(self, model: SpeederForCausalLM) -> None:
        """Raise `SpeederError` unless the shards were made with this model's weights and catalogue; reads its
        features."""
        for what, value in token_identity(model).items():
            if self.identity.get(what) != value:
                raise SpeederError(
                    f"{self.folder}: its tokens were made with other {what} than the recommender's; write them again "
                    "with: speeder index RUN --kind shards"
                )

    def vectors(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Shard by shard: its first item, and the `(n, H)` scoring vectors of its items."""
        for number, tokens in enumerate(self._shards):
            yield number * self.shard_items, scoring_vectors(tokens)

    def rows(self, items: torch.Tensor) -> ItemRows:
        """The tokens of `(n,)` items, on their device; raises `ValueError` for an item out of range."""
        wanted = torch.unique(items)
        rows = wanted.cpu()
        if len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < self.num_items:
            raise ValueError(f"items: expected 0..{self.num_items - 1}, got {int(rows[0])}..{int(rows[-1])}")
        shards = rows.div(self.shard_items, rounding_mode="floor")
        parts = [
            self._shards[shard][rows[shards == shard] - shard * self.shard_items]
            for shard in torch.unique(shards).tolist()
        ]
        return ItemRows(wanted, torch.cat(parts or [self._shards[0][:0]]).to(items.device))

    def topk(
        self, queries: Queries | torch.Tensor, k: int, seen: Sequence[Sequence[int]] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The exact `k` best items of each query, by one pass over all shards.

        Args:
            queries: of `user_states`, or `(n, H)` dense ones.
            k: number of items.
            seen: items to exclude for each query, each once.

        Returns:
            scores `(n, k)` float32, descending, and items `(n, k)` int64; equal scores are in the order of items.

        Raises:
            ValueError: a query cannot have `k` items.
        """
        whole = Queries.of(queries)
        queries = whole.dense
        hidden = seen_table(seen, len(queries), queries.device)
        check_k(k, self.num_items, hidden)
        scores = queries.new_empty(len(queries), 0, dtype=torch.float32)
        items = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        for start, vectors in self.vectors():
            vectors = vectors.to(queries.device)
            here = ((hidden >= start) & (hidden < start + len(vectors))).sum(dim=1)
            most = int(here.max()) if hidden.shape[1] else 0
            found, places = topk_items(queries.to(vectors.dtype), vectors, min(len(vectors), k + most))
            places = places + start
            if most:
                found = hide(found, places, hidden)
            scores, items = best(torch.cat([scores, found], dim=1), torch.cat([items, places], dim=1), k)
        return whole.best_of_sum(scores, items, partial(vectors_of, self), seen)


def check_k(k: int, num_items: int, hidden: torch.Tensor) -> None:
    """Raise `ValueError` if a row cannot have `k` items."""
    most = num_items - (int((hidden >= 0).sum(dim=1).max()) if hidden.shape[1] else 0)
    if not 1 <= k <= most:
        raise ValueError(f"k: expected 1..{most}, the items that each query can have, got {k}")
