"""The second half of every sum that programs share: each wrote a part of its own, and one program adds them up in
a fixed order. Atomic additions would come in another order every run, and so with other last bits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from speeder_kernels.triton.tiles import cdiv, launch, tile


@triton.jit(do_not_specialize=["P"])
def sum_parts_kernel(out, parts, P, L, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr):
    """A program owns BLOCK_L elements; BLOCK_P parts are read at once, part p goes to sum p % BLOCK_P."""
    element = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    totals = tl.zeros((BLOCK_P, BLOCK_L), tl.float32)
    for first in range(0, P, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P).to(tl.int64)
        inside = (part < P)[:, None] & (element < L)[None, :]
        totals += tl.load(parts + part[:, None] * L + element[None, :], mask=inside, other=0.0)
    tl.store(out + element, tl.sum(totals, axis=0).to(out.dtype.element_ty), mask=element < L)


def sum_parts(parts: Tensor, out: Tensor) -> Tensor:
    """Writes the sum of `parts (P, ...)`, float32 and contiguous, over their first dimension to `out (...)`."""
    count, elements = parts.shape[0], out.numel()
    row = tile(out.device, "sum_parts")
    grid = (cdiv(elements, row["BLOCK_L"]),)
    launch(sum_parts_kernel, grid, out, parts, count, elements, **row, fuse=True)
    return out
