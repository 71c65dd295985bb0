"""A cache of encoded features by content: a second run is quick, and an interrupted one resumes."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from speeder.errors import SpeederError
from speeder.io.assets import cache_folder
from speeder.io.disk_full import writing
from speeder.io.files import atomic_path
from speeder.io.progress import showing

log = logging.getLogger(__name__)


class NotFinite(SpeederError):
    """An encoder returned NaN or infinity.

    Attributes:
        position: index of the content.
    """

    def __init__(self, position: int):
        super().__init__(f"the encoder returned NaN or infinity for the content at position {position}")
        self.position = position


_HASH = "sha256"  # in a shard's metadata
_PLACES = 1 << 32  # more than a shard has rows
_SHARD_ROWS = 256  # rows encoded between two writes, about: what an interruption may cost


def content_key(content: str | bytes) -> str:
    """Hex SHA-256 of a text or of a picture's bytes."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def module_hash(module: nn.Module, leave_out: Collection[str] = ()) -> str:
    """Hex SHA-256 over a module's class and its weights' names, shapes and bytes: equal hashes encode equally.

    `leave_out` names weights that do not affect the encoding.
    """
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in sorted(module.state_dict().items()):
        if name in leave_out:
            continue
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(
            np.ascontiguousarray(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        )
    return digest.hexdigest()


class FeatureCache:
    """Feature rows of one encoder by content key, in safetensors shards, each written whole or not at all.

    Rows are on disk, memory-mapped; only their keys are in memory.
    """

    def __init__(self, identity: str, folder: str | Path | None = None):
        """`identity` identifies the encoder and its settings; `folder` None is the user's cache."""
        root = cache_folder() / "features" if folder is None else Path(folder)
        self.folder = root / content_key(identity)[:32]
        self.read()

    def read(self) -> None:
        """Reads the shards on disk, including those that other processes have added."""
        self._shards: list[Tensor] = []
        self._places: dict[str, int] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                self._map(path)
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                log.warning("ignoring the broken cache file %s (%s); its rows are encoded again", path, error)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> Tensor:
        shard, row = divmod(self._places[key], _PLACES)
        return self._shards[shard][row]

    def add(self, rows: dict[str, Tensor]) -> None:
        """Keeps `{key: (F,) float32}` on disk."""
        if rows:
            self._map(write_shard(self.folder, rows))

    def _map(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            keys, features = file.get_tensor("keys"), file.get_tensor("features")
            recorded = (file.metadata() or {}).get(_HASH)
        if recorded not in (None, _rows_hash(keys, features)):  # None: written by an earlier version
            raise ValueError("its content has changed since it was written")
        if features.shape[0] != keys.shape[0] or not torch.isfinite(features).all():
            raise ValueError("its rows do not fit its keys, or are not finite")
        first = len(self._shards) * _PLACES
        self._places.update((key.tobytes().hex(), first + row) for row, key in enumerate(keys.numpy()))
        self._shards.append(features)


def write_shard(folder: Path, rows: dict[str, Tensor]) -> Path:
    """Writes `{key: (F,) float32}`, at least one, for the `FeatureCache` of that folder; returns the file."""
    keys = b"".join(bytes.fromhex(key) for key in rows)
    tensors = {
        "keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(len(rows), 32),
        "features": torch.stack(list(rows.values())).contiguous(),
    }
    # Named by its content: two processes that encode the same rows write the same file.
    path = folder / f"{hashlib.sha256(keys).hexdigest()[:32]}.safetensors"
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={_HASH: _rows_hash(**tensors)})
    return path


def _rows_hash(keys: Tensor, features: Tensor) -> str:
    """SHA-256 over the bytes of a shard's tensors."""
    digest = hashlib.sha256(keys.numpy())
    digest.update(features.numpy())
    return digest.hexdigest()


def zeros_on_disk(rows: int, width: int, folder: Path) -> Tensor:
    """`(rows, width)` float32 zeros that use no memory: mapped to an unnamed file in `folder`.

    The file is removed with the tensor. Raises `OSError` if the disk is full.
    """
    if not rows * width:
        return torch.zeros(rows, width)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:  # without a name, so that a kill leaves nothing
        # writing to the map on a full disk would kill the process
        os.posix_fallocate(file.fileno(), 0, rows * width * 4)
        path = f"/proc/self/fd/{file.fileno()}"
        flat = torch.from_file(path, shared=True, size=rows * width, dtype=torch.float32)
    return flat.view(rows, width)


def check_finite(rows: dict[str, Tensor], positions: dict[str, int]) -> None:
    """Raises `NotFinite` if a `{key: (F,)}` row has NaN or infinity, which must not be cached."""
    if rows and not torch.isfinite(torch.stack(list(rows.values()))).all():
        raise NotFinite(next(positions[key] for key, row in rows.items() if not torch.isfinite(row).all()))


def shard_rows(batch_size: int) -> int:
    """Rows encoded between two writes: whole batches."""
    return -(-_SHARD_ROWS // batch_size) * batch_size


def missing_batches(
    cache: FeatureCache, keys: Sequence[str | None], costs: Sequence[int], batch_size: int
) -> list[list[int]]:
    """The positions to encode, one for each content that the cache lacks, in batches.

    The most expensive come first, so that memory runs out at once or never. Ties are ordered by key, so that a resumed
    run forms the same batches, and gets the same last bits.
    """
    wanted: dict[str, int] = {}
    for position, key in enumerate(keys):
        if key is not None and key not in cache:
            wanted.setdefault(key, position)
    order = sorted(wanted, key=lambda key: (-costs[wanted[key]], key))
    places = [wanted[key] for key in order]
    return [places[start : start + batch_size] for start in range(0, len(places), batch_size)]


def encode_cached(
    cache: FeatureCache,
    keys: Sequence[str | None],
    costs: Sequence[int],
    compute: Callable[[list[int]], list[Tensor | None]],
    *,
    width: int,
    batch_size: int,
    description: str,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Features of each position, from the cache or from `compute`.

    Args:
        keys: content keys; None if there is nothing to encode.
        costs: cost per content, such as a text's length; similar costs are batched together.
        compute: positions -> one `(width,)` row each, or None if it cannot be encoded (which is not cached). NaN or
            infinity raises `NotFinite`.

    Returns:
        `(N, width)` float32 with zeros where absent, mapped to a file, and the `(N,)` bool mask of those present.
    """
    batches = missing_batches(cache, keys, costs, batch_size)
    count = sum(map(len, batches))
    pending: dict[str, Tensor] = {}
    failed = 0
    with showing(description, count, "item", show=progress and count > 0) as work:
        try:
            for batch in batches:
                rows = compute(batch)
                done = {
                    keys[position]: row.float().cpu()
                    for position, row in zip(batch, rows, strict=True)
                    if row is not None
                }
                check_finite(done, dict(zip((keys[place] for place in batch), batch, strict=True)))
                failed += len(batch) - len(done)
                pending.update(done)
                work.update(len(batch))
                if len(pending) + failed >= shard_rows(batch_size):
                    cache.add(pending)
                    pending, failed = {}, 0
        finally:
            cache.add(pending)  # also on Ctrl-C: what is done stays done
    with writing(cache.folder):
        features = zeros_on_disk(len(keys), width, cache.folder)
    present = torch.zeros(len(keys), dtype=torch.bool)
    for position, key in enumerate(keys):
        if key is not None and key in cache:
            features[position], present[position] = cache[key], True
    return features, present
