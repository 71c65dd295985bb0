"""What the Triton tests share: where they run, tiles so small that tiny shapes cross their borders, programs in any
order, and kernels with a planted fault.

Where there is no GPU, Triton's interpreter runs the kernels: float32 and float16 (its bfloat16 is wrong), one
program after another.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from speeder_kernels import dispatch
from speeder_kernels.triton import item_cross_entropy, tiles, topk_items

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if GPU else (torch.float32, torch.float16)
# Programs run one by one only there: on a GPU, what follows their order differs by chance, or not.
interpreted_only = pytest.mark.skipif(not dispatch.interprets_triton(), reason="needs Triton's interpreter")

_PRODUCT = dict(num_warps=4, num_stages=2)
_SMALL_ROWS = {
    "pack_tokens": dict(elements=64, num_warps=1),
    "sum_rows": dict(elements=64, num_warps=1),
    "sum_parts": dict(BLOCK_P=2, BLOCK_L=16, num_warps=1),
    "compress_items": dict(elements=64, num_warps=1),
    "compress_items_backward": dict(elements=64, num_warps=1),
    "item_cross_entropy": dict(BLOCK_N=16, BLOCK_I=16, BLOCK_H=16, **_PRODUCT),
    "combine_loss": dict(BLOCK_N=4, BLOCK_H=16, num_warps=1),
    "logit_gradient": dict(BLOCK_N=16, BLOCK_I=16, BLOCK_H=16, **_PRODUCT),
    "grad_hidden": dict(BLOCK_N=16, BLOCK_H=16, BLOCK_K=16, **_PRODUCT),
    "grad_table": dict(BLOCK_I=16, BLOCK_H=16, BLOCK_K=16, **_PRODUCT),
    "topk_items": dict(BLOCK_N=16, BLOCK_I=topk_items.GROUP, BLOCK_H=16, **_PRODUCT),
    "candidate_keys": dict(BLOCK_K=2, num_warps=1),
}


@contextlib.contextmanager
def small_tiles(processors: int = 2) -> Iterator[None]:
    """Small blocks, few items a chunk, and a device of `processors` processors, which decides about splits."""
    rows = {key: {80: _SMALL_ROWS[key[0]]} for key in tiles.TILES if key[0] in _SMALL_ROWS}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(tiles.TILES, rows))
        stack.enter_context(mock.patch.object(tiles, "processors", lambda device: processors))
        for module, items in ((item_cross_entropy, 32), (topk_items, 64)):
            # Modules with a planted fault take their numbers from here, too.
            stack.enter_context(mock.patch.multiple(module, CHUNK_BYTES=1, CHUNK_ITEMS=items))
        yield


@contextlib.contextmanager
def programs_in_any_order(seed: int) -> Iterator[None]:
    """The interpreter runs the programs of a grid in an order drawn from `seed`, as a GPU may."""
    from triton.runtime.interpreter import interpreter_builder as builder

    set_index, orders = builder.set_grid_idx, {}

    def set_shuffled(x: int, y: int, z: int) -> None:
        _, ny, nz = dims = builder.grid_dim
        count = dims[0] * ny * nz
        if dims not in orders:
            orders[dims] = random.Random(seed).sample(range(count), count)
        place = orders[dims][(x * ny + y) * nz + z]
        set_index(place // (ny * nz), place // nz % ny, place % nz)

    with mock.patch.object(builder, "set_grid_idx", set_shuffled):
        yield


@contextlib.contextmanager
def planted(name: str, folder: Path, *changes: tuple[str, str]) -> Iterator[None]:
    """The ops run `speeder_kernels.triton.NAME` with its source changed: each text, found once, by another."""
    full = f"speeder_kernels.triton.{name}"
    source = Path(importlib.import_module(full).__file__).read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{name}: found {source.count(old)} times: {old}"
        source = source.replace(old, new)
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(full, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for constant in ("CHUNK_BYTES", "CHUNK_ITEMS"):
        if hasattr(module, constant):
            setattr(module, constant, getattr(sys.modules[full], constant))
    with mock.patch.dict(sys.modules, {full: module}):
        yield
