"""The one table of tile sizes, warps and pipeline stages, by kernel and GPU architecture; and how kernels are
launched.

Every launch goes through `launch` with a row of `TILES`, so what can run on a GPU is what is listed here; the
compile checks (`tests/kernels/triton_aot.py`) walk through the same launchers with every row.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

ARCHITECTURES = (80, 90, 100)  # A100, H100, B200: a GPU takes the newest row that it can

Tile = dict[str, int]

# (kernel, what else the row depends on...) -> architecture -> row. `item` keys are bytes of an element. Rows of
# 80 also serve sm_86, sm_89 and sm_120, which have 99 KiB of shared memory a block: they must stay below that.
# A row of an older architecture serves where a newer one has none of its own.
TILES: dict[tuple, dict[int, Tile]] = {
    # Bandwidth-bound: `elements` a program, 16 bytes a thread and load, two loads in flight a thread.
    ("pack_tokens", 2): {80: dict(elements=2048, num_warps=4)},
    ("pack_tokens", 4): {80: dict(elements=1024, num_warps=4)},
    ("sum_rows", 2): {80: dict(elements=2048, num_warps=4)},
    ("sum_rows", 4): {80: dict(elements=1024, num_warps=4)},
    ("sum_parts",): {80: dict(BLOCK_P=16, BLOCK_L=64, num_warps=4)},
    ("compress_items",): {80: dict(elements=2048, num_warps=4)},
    ("compress_items_backward",): {80: dict(elements=1024, num_warps=4)},
}


@functools.lru_cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def architecture(device: torch.device) -> int:
    """Which rows a device takes. The interpreter's CPU tensors take the oldest."""
    if device.type != "cuda" or torch.version.hip is not None:
        return ARCHITECTURES[0]
    major, minor = _capability(device.index)
    if (major, minor) in ((8, 6), (8, 7), (8, 9)) or major > 10:  # less shared memory than their number says
        return ARCHITECTURES[0]
    return max((arch for arch in ARCHITECTURES if arch <= 10 * major + minor), default=ARCHITECTURES[0])


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors: how many programs it takes to fill the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tile(device: torch.device, *key: Any) -> Tile:
    """The row of `TILES[key]` for this device: constants of the kernel, num_warps and num_stages."""
    rows, arch = TILES[key], architecture(device)
    return dict(rows[max(row for row in rows if row <= arch)])


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, fuse: bool, **options: Any) -> None:
    """Run `kernel` over `grid` on the device of its first argument.

    `fuse` says whether a product and a sum may become one instruction. It is never left to Triton's default,
    which has changed between releases: where a result must equal the other backends' to the last bit it is off,
    everywhere else on, for one rounding less and the full rate of the multiply-add units.
    """
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, enable_fp_fusion=fuse, **options)


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


def column_block(hidden: int, most: int) -> int:
    """The largest power of two, at most `most`, that covers `hidden` columns with at most an eighth of waste."""
    block = most
    while block > 16 and block * cdiv(hidden, block) > hidden * 9 // 8:
        block //= 2
    return block
