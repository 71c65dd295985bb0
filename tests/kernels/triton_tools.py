"""What the Triton tests share: where they run, tiles so small that tiny shapes cross their borders, programs in any
order, and kernels with a planted fault.

Where there is no GPU, Triton's interpreter runs the kernels, one program after another. Its bfloat16 is wrong, which
`exact_bfloat16` puts right. It has one thread, so that `missing_barriers_fail` has to look for them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from speeder_kernels import dispatch, ops
from speeder_kernels.triton import tiles
from speeder_kernels.triton.items import item_cross_entropy, topk_items

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # on a CPU: within `exact_bfloat16`
# Programs run one by one only there: on a GPU, what follows their order differs by chance, or not.
interpreted_only = pytest.mark.skipif(not dispatch.interprets_triton(), reason="needs Triton's interpreter")

_PRODUCT = dict(num_warps=4, num_stages=2)
_SMALL_ROWS = {
    "pack_tokens": dict(elements=64, num_warps=1),
    "sum_rows": dict(elements=64, num_warps=1),
    "sum_parts": dict(elements=32, parts=2, num_warps=1),
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
def exact_bfloat16() -> Iterator[None]:
    """Products of bfloat16's numbers, where the interpreter takes those of its bits, and rounding to the nearest, where
    it cuts; and the ops take bfloat16 where they are told to run there.
    """
    if GPU:
        yield
        return
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    builder, convert = interpreter.interpreter_builder, interpreter._convert_float
    dot = builder.create_dot

    def convert_exactly(data, source, target, rounding):
        if (source, target) != (float32, bfloat16):
            return convert(data, source, target, rounding)
        numbers = torch.from_numpy(np.ascontiguousarray(data).reshape(data.shape))
        return numbers.to(torch.bfloat16).view(torch.int16).numpy()

    def multiply_numbers(a, b, *rest):
        numbers = (builder.cast_impl(x, float32) if x.dtype.scalar == bfloat16 else x for x in (a, b))
        return dot(*numbers, *rest)

    choose = ops.choose

    def choose_triton(op, backend, tensor):
        return backend if backend == "triton" else choose(op, backend, tensor)

    with (
        mock.patch.object(interpreter, "_convert_float", convert_exactly),
        mock.patch.object(builder, "create_dot", multiply_numbers),
        mock.patch.object(ops, "choose", choose_triton),
    ):
        yield


@contextlib.contextmanager
def missing_barriers_fail() -> Iterator[None]:
    """Fails where a program loads or stores once more, with no barrier between, where it has stored: on a GPU that may
    be another of its threads, which need not see the first."""
    from triton.runtime.interpreter import interpreter_builder as builder

    load, store, set_index = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx
    stored: set[int] = set()

    def check(pointers, mask) -> list[int]:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].tolist()
        assert stored.isdisjoint(addresses), "a barrier is missing"
        return addresses

    def checked_load(pointers, mask, *rest):
        check(pointers, mask)
        return load(pointers, mask, *rest)

    def checked_store(pointers, value, mask, *rest):
        stored.update(check(pointers, mask))
        return store(pointers, value, mask, *rest)

    def next_program(*index):
        stored.clear()
        set_index(*index)

    with (
        mock.patch.object(builder, "create_masked_load", checked_load),
        mock.patch.object(builder, "create_masked_store", checked_store),
        mock.patch.object(builder, "create_barrier", stored.clear),
        mock.patch.object(builder, "set_grid_idx", next_program),
    ):
        yield


@contextlib.contextmanager
def planted(folder: Path, modules: Sequence[str], *changes: tuple[str, str, str]) -> Iterator[None]:
    """The ops run copies of `modules` of speeder_kernels.triton, given in the order in which they import each other.

    A change is a module, a text that stands in it once, and what stands there instead.
    """
    assert {module for module, _, _ in changes} <= set(modules)
    with mock.patch.dict(sys.modules):
        for name in modules:
            full = f"speeder_kernels.triton.{name}"
            original = importlib.import_module(full)
            source = Path(original.__file__).read_text()
            for _, old, new in (change for change in changes if change[0] == name):
                assert source.count(old) == 1, f"{name}: found {source.count(old)} times: {old}"
                source = source.replace(old, new)
            path = folder / f"{name}.py"
            path.write_text(source)
            spec = importlib.util.spec_from_file_location(full, path)
            module = sys.modules[full] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            for constant in ("CHUNK_BYTES", "CHUNK_ITEMS"):  # as `small_tiles` has set them
                if hasattr(original, constant):
                    setattr(module, constant, getattr(original, constant))
        yield
