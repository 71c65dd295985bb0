"""The table of tile sizes, warps and pipeline stages, by kernel and GPU architecture; and how kernels are
launched.

Every launch goes through `launch`. What differs by architecture is a row of `TILES`; the small kernels around
attention (describe, combine, absolute, reduce) have the same blocks and warps everywhere, constants in
`attention/ops.py`. The compile checks (`tests/kernels/triton_aot.py`) walk through the same launchers with every row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

ARCHITECTURES = (80, 90, 100)  # A100, H100, B200: a GPU takes the newest row that it can

Tile = dict[str, int]

# (kernel, what else the row depends on...) -> architecture -> row. A number is the bytes of an element. Rows of
# 80 also serve sm_86, sm_89 and sm_120, which have 99 KiB of shared memory a block: they must stay below that.
# A row of an older architecture serves where a newer one has none of its own.
TILES: dict[tuple, dict[int, Tile]] = {
    # Bandwidth-bound: `elements` a program, 16 bytes a thread and load, two loads in flight a thread.
    ("pack_tokens", 2): {80: dict(elements=2048, num_warps=4)},
    ("pack_tokens", 4): {80: dict(elements=1024, num_warps=4)},
    ("sum_rows", 2): {80: dict(elements=2048, num_warps=4)},
    ("sum_rows", 4): {80: dict(elements=1024, num_warps=4)},
    # `elements` read at once, of as many parts as there are, but at most `parts`.
    ("sum_parts",): {80: dict(elements=4096, parts=128, num_warps=8)},
    ("compress_items",): {80: dict(elements=2048, num_warps=4)},
    ("compress_items_backward",): {80: dict(elements=1024, num_warps=4)},
    # item_cross_entropy and topk_items: bytes of an element. float32 has no tensor cores here.
    ("item_cross_entropy", 2): {
        80: dict(BLOCK_N=128, BLOCK_I=128, BLOCK_H=64, num_warps=8, num_stages=3),
        90: dict(BLOCK_N=128, BLOCK_I=128, BLOCK_H=64, num_warps=8, num_stages=3),
        # Unless told, ptxas spills a few bytes here to fit one more block on a processor.
        100: dict(BLOCK_N=128, BLOCK_I=64, BLOCK_H=64, num_warps=8, num_stages=4, maxnreg=168),
    },
    ("item_cross_entropy", 4): {80: dict(BLOCK_N=64, BLOCK_I=128, BLOCK_H=16, num_warps=8, num_stages=3)},
    ("combine_loss",): {80: dict(BLOCK_N=16, BLOCK_H=128, num_warps=4)},
    ("logit_gradient", 2): {
        80: dict(BLOCK_N=128, BLOCK_I=128, BLOCK_H=64, num_warps=8, num_stages=3),
        90: dict(BLOCK_N=128, BLOCK_I=128, BLOCK_H=64, num_warps=8, num_stages=3),
        100: dict(BLOCK_N=128, BLOCK_I=128, BLOCK_H=64, num_warps=8, num_stages=4),
    },
    ("logit_gradient", 4): {80: dict(BLOCK_N=64, BLOCK_I=128, BLOCK_H=16, num_warps=8, num_stages=3)},
    ("grad_hidden", 2): {
        80: dict(BLOCK_N=128, BLOCK_H=128, BLOCK_K=64, num_warps=8, num_stages=3),
        90: dict(BLOCK_N=128, BLOCK_H=128, BLOCK_K=64, num_warps=8, num_stages=3),
        100: dict(BLOCK_N=128, BLOCK_H=128, BLOCK_K=64, num_warps=8, num_stages=4),
    },
    ("grad_hidden", 4): {80: dict(BLOCK_N=64, BLOCK_H=128, BLOCK_K=16, num_warps=8, num_stages=3)},
    ("grad_table", 2): {
        80: dict(BLOCK_I=128, BLOCK_H=128, BLOCK_K=64, num_warps=8, num_stages=3),
        90: dict(BLOCK_I=128, BLOCK_H=128, BLOCK_K=64, num_warps=8, num_stages=3),
        100: dict(BLOCK_I=128, BLOCK_H=128, BLOCK_K=64, num_warps=8, num_stages=4),
    },
    ("grad_table", 4): {80: dict(BLOCK_I=64, BLOCK_H=128, BLOCK_K=16, num_warps=8, num_stages=3)},
    ("topk_items", 2): {
        80: dict(BLOCK_N=128, BLOCK_I=128, BLOCK_H=64, num_warps=8, num_stages=3),
        90: dict(BLOCK_N=128, BLOCK_I=128, BLOCK_H=64, num_warps=8, num_stages=3),
        100: dict(BLOCK_N=128, BLOCK_I=128, BLOCK_H=64, num_warps=8, num_stages=4),
    },
    ("topk_items", 4): {80: dict(BLOCK_N=64, BLOCK_I=128, BLOCK_H=16, num_warps=8, num_stages=3)},
    ("candidate_keys",): {80: dict(BLOCK_K=32, num_warps=4)},
    # spae_attention: kernel, head size, bytes of an element. Queries and keys of a tile; with `separate`, a kernel
    # that runs once for each gradient; with `maxnreg`, one that ptxas would rather let spill than use all registers.
    # Tiles of "relative" divide those of "queries". The products of float32 are not done by tensor cores ("ieee"), and
    # a tile's operands stand in registers whole: small tiles.
    ("spae_attention", "forward", 16, 2): {
        80: dict(block_q=128, block_k=64, num_warps=8, num_stages=3),
        100: dict(block_q=128, block_k=64, num_warps=8, num_stages=2),
    },
    ("spae_attention", "forward", 32, 2): {
        80: dict(block_q=128, block_k=64, num_warps=8, num_stages=3),
        100: dict(block_q=128, block_k=64, num_warps=8, num_stages=2),
    },
    ("spae_attention", "forward", 64, 2): {
        80: dict(block_q=128, block_k=64, num_warps=8, num_stages=3),
        100: dict(block_q=128, block_k=64, num_warps=8, num_stages=2),
    },
    ("spae_attention", "forward", 128, 2): {
        80: dict(block_q=128, block_k=32, num_warps=8, num_stages=2),
        90: dict(block_q=128, block_k=64, num_warps=8, num_stages=2),
        100: dict(block_q=128, block_k=32, num_warps=8, num_stages=2),
    },
    ("spae_attention", "forward", 256, 2): {80: dict(block_q=64, block_k=32, num_warps=8, num_stages=1)},
    ("spae_attention", "decode", 16, 2): {80: dict(block_q=16, block_k=64, num_warps=4, num_stages=3)},
    ("spae_attention", "decode", 32, 2): {80: dict(block_q=16, block_k=64, num_warps=4, num_stages=3)},
    ("spae_attention", "decode", 64, 2): {80: dict(block_q=16, block_k=64, num_warps=4, num_stages=3)},
    ("spae_attention", "decode", 128, 2): {
        80: dict(block_q=16, block_k=64, num_warps=4, num_stages=2),
        90: dict(block_q=16, block_k=32, num_warps=4, num_stages=2),
    },
    ("spae_attention", "decode", 256, 2): {80: dict(block_q=16, block_k=32, num_warps=4, num_stages=2)},
    ("spae_attention", "keys", 16, 2): {
        80: dict(block_q=32, block_k=32, num_warps=4, num_stages=1),
        90: dict(block_q=32, block_k=64, num_warps=4, num_stages=1),
    },
    ("spae_attention", "keys", 32, 2): {
        80: dict(block_q=32, block_k=32, num_warps=4, num_stages=1),
        90: dict(block_q=32, block_k=64, num_warps=4, num_stages=1),
    },
    ("spae_attention", "keys", 64, 2): {
        80: dict(block_q=64, block_k=32, num_warps=4, num_stages=1),
        90: dict(block_q=32, block_k=64, num_warps=4, num_stages=1),
    },
    ("spae_attention", "keys", 128, 2): {80: dict(block_q=32, block_k=64, num_warps=8, num_stages=1)},
    ("spae_attention", "keys", 256, 2): {
        80: dict(block_q=16, block_k=64, num_warps=8, num_stages=1, separate=1),
        90: dict(block_q=32, block_k=64, num_warps=8, num_stages=1, separate=1),
    },
    ("spae_attention", "queries", 16, 2): {
        80: dict(block_q=64, block_k=64, num_warps=4, num_stages=1),
        90: dict(block_q=64, block_k=64, num_warps=4, num_stages=2),
        100: dict(block_q=64, block_k=32, num_warps=4, num_stages=2, maxnreg=255),
    },
    ("spae_attention", "queries", 32, 2): {
        80: dict(block_q=64, block_k=64, num_warps=4, num_stages=1),
        90: dict(block_q=64, block_k=64, num_warps=4, num_stages=2),
        100: dict(block_q=64, block_k=32, num_warps=4, num_stages=2, maxnreg=255),
    },
    ("spae_attention", "queries", 64, 2): {
        80: dict(block_q=64, block_k=32, num_warps=4, num_stages=1),
        90: dict(block_q=64, block_k=32, num_warps=4, num_stages=2),
    },
    ("spae_attention", "queries", 128, 2): {80: dict(block_q=64, block_k=32, num_warps=4, num_stages=1)},
    ("spae_attention", "queries", 256, 2): {80: dict(block_q=32, block_k=64, num_warps=8, num_stages=1)},
    ("spae_attention", "relative", 16, 2): {
        80: dict(block_q=32, block_k=32, num_warps=4, num_stages=1, maxnreg=255)
    },
    ("spae_attention", "relative", 32, 2): {
        80: dict(block_q=32, block_k=32, num_warps=4, num_stages=1, maxnreg=255)
    },
    ("spae_attention", "relative", 64, 2): {
        80: dict(block_q=32, block_k=32, num_warps=4, num_stages=1, maxnreg=255)
    },
    ("spae_attention", "relative", 128, 2): {
        80: dict(block_q=32, block_k=32, num_warps=4, num_stages=1, maxnreg=255)
    },
    ("spae_attention", "relative", 256, 2): {
        80: dict(block_q=32, block_k=32, num_warps=4, num_stages=1, maxnreg=255)
    },
    ("spae_attention", "forward", 16, 4): {
        80: dict(block_q=32, block_k=32, num_warps=4, num_stages=1, maxnreg=128)
    },
    ("spae_attention", "forward", 32, 4): {80: dict(block_q=64, block_k=32, num_warps=4, num_stages=1)},
    ("spae_attention", "forward", 64, 4): {80: dict(block_q=64, block_k=32, num_warps=4, num_stages=1)},
    ("spae_attention", "forward", 128, 4): {
        80: dict(block_q=16, block_k=32, num_warps=4, num_stages=1, maxnreg=255)
    },
    ("spae_attention", "forward", 256, 4): {80: dict(block_q=16, block_k=32, num_warps=4, num_stages=1)},
    ("spae_attention", "decode", 16, 4): {80: dict(block_q=16, block_k=32, num_warps=4, num_stages=1)},
    ("spae_attention", "decode", 32, 4): {80: dict(block_q=16, block_k=32, num_warps=4, num_stages=1)},
    ("spae_attention", "decode", 64, 4): {80: dict(block_q=16, block_k=32, num_warps=4, num_stages=1)},
    ("spae_attention", "decode", 128, 4): {80: dict(block_q=16, block_k=32, num_warps=4, num_stages=1)},
    ("spae_attention", "decode", 256, 4): {80: dict(block_q=16, block_k=16, num_warps=4, num_stages=1)},
    ("spae_attention", "keys", 16, 4): {
        80: dict(block_q=16, block_k=16, num_warps=4, num_stages=1, separate=1, maxnreg=255)
    },
    ("spae_attention", "keys", 32, 4): {
        80: dict(block_q=16, block_k=16, num_warps=4, num_stages=1, separate=1, maxnreg=255)
    },
    ("spae_attention", "keys", 64, 4): {
        80: dict(block_q=16, block_k=16, num_warps=4, num_stages=1, separate=1, maxnreg=255)
    },
    ("spae_attention", "keys", 128, 4): {
        80: dict(block_q=16, block_k=16, num_warps=8, num_stages=1, separate=1, maxnreg=255)
    },
    ("spae_attention", "keys", 256, 4): {
        80: dict(block_q=16, block_k=16, num_warps=8, num_stages=1, separate=1, maxnreg=255)
    },
    ("spae_attention", "queries", 16, 4): {
        80: dict(block_q=16, block_k=16, num_warps=4, num_stages=1, maxnreg=255)
    },
    ("spae_attention", "queries", 32, 4): {
        80: dict(block_q=16, block_k=16, num_warps=4, num_stages=1, maxnreg=255)
    },
    ("spae_attention", "queries", 64, 4): {
        80: dict(block_q=16, block_k=16, num_warps=4, num_stages=1, maxnreg=255)
    },
    ("spae_attention", "queries", 128, 4): {80: dict(block_q=16, block_k=16, num_warps=8, num_stages=1)},
    ("spae_attention", "queries", 256, 4): {
        80: dict(block_q=16, block_k=16, num_warps=8, num_stages=2, maxnreg=255)
    },
    ("spae_attention", "relative", 16, 4): {80: dict(block_q=16, block_k=16, num_warps=4, num_stages=1)},
    ("spae_attention", "relative", 32, 4): {80: dict(block_q=16, block_k=16, num_warps=4, num_stages=1)},
    ("spae_attention", "relative", 64, 4): {80: dict(block_q=16, block_k=16, num_warps=4, num_stages=1)},
    ("spae_attention", "relative", 128, 4): {80: dict(block_q=16, block_k=16, num_warps=4, num_stages=1)},
    ("spae_attention", "relative", 256, 4): {80: dict(block_q=16, block_k=16, num_warps=4, num_stages=1)},
    ("spae_attention", "row_terms", 16, 2): {80: dict(block_q=256, num_warps=4, num_stages=1)},
    ("spae_attention", "row_terms", 32, 2): {80: dict(block_q=128, num_warps=4, num_stages=1)},
    ("spae_attention", "row_terms", 64, 2): {80: dict(block_q=64, num_warps=4, num_stages=1)},
    ("spae_attention", "row_terms", 128, 2): {80: dict(block_q=32, num_warps=4, num_stages=1)},
    ("spae_attention", "row_terms", 256, 2): {80: dict(block_q=16, num_warps=4, num_stages=1)},
    ("spae_attention", "row_terms", 16, 4): {80: dict(block_q=128, num_warps=4, num_stages=1)},
    ("spae_attention", "row_terms", 32, 4): {80: dict(block_q=64, num_warps=4, num_stages=1)},
    ("spae_attention", "row_terms", 64, 4): {80: dict(block_q=32, num_warps=4, num_stages=1)},
    ("spae_attention", "row_terms", 128, 4): {80: dict(block_q=16, num_warps=4, num_stages=1)},
    ("spae_attention", "row_terms", 256, 4): {80: dict(block_q=8, num_warps=4, num_stages=1)},
}


@functools.lru_cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def architecture(device: torch.device) -> int:
    """Which rows a device takes. The interpreter's CPU tensors take the oldest."""
    if device.type != "cuda" or torch.version.hip is not None:
        return ARCHITECTURES[0]
    major, minor = _capability(device.index)
    if (major, minor) in ((8, 6), (8, 9)) or major > 10:  # less shared memory than their number says
        return ARCHITECTURES[0]
    return max((arch for arch in ARCHITECTURES if arch <= 10 * major + minor), default=ARCHITECTURES[0])


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors: how many programs it takes to fill the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tile(device: torch.device, *key: Any) -> Tile:
    """The row of `TILES[key]` for this device: constants of the kernel, num_warps and num_stages."""
    rows, arch = TILES[key], architecture(device)
    row = dict(rows[max(row for row in rows if row <= arch)])
    if not limits_registers():
        row.pop("maxnreg", None)
    return row


def limits_registers() -> bool:
    """Whether the compiler takes `maxnreg`; AMD's does not."""
    return torch.version.hip is None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    fuse: bool,
    num_warps: int,
    num_stages: int = 1,
    **constants: Any,
) -> None:
    """Run `kernel` over `grid` on the device of its first tensor, which may stand in a tuple.

    Warps and stages are never left to Triton's defaults, which differ between releases and GPUs: one stage, where the
    table of tiles does not say more, for loops without a product have nothing to gain from buffers in shared memory.

    `fuse` says whether a product and a sum may become one instruction. It is never left to Triton's default,
    which has changed between releases: where a result must equal the other backends' to the last bit it is off,
    everywhere else on, for one rounding less and the full rate of the multiply-add units.
    """
    with torch.cuda.device_of(next(_tensors(arguments))):
        kernel[grid](
            *arguments, enable_fp_fusion=fuse, num_warps=num_warps, num_stages=num_stages, **constants
        )


def _tensors(arguments: tuple) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


def column_block(hidden: int, most: int) -> int:
    """The largest power of two, at most `most`, that covers `hidden` columns with at most an eighth of waste."""
    block = most
    while block > 16 and block * cdiv(hidden, block) > hidden * 9 // 8:
        block //= 2
    return block
