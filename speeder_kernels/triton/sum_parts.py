"""The second half of every sum that programs share: each wrote a part of its own, and one program adds them up in
a fixed order. Atomic additions would come in another order every run, and so with other last bits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from speeder_kernels.triton.tiles import cdiv, launch, tile


@triton.jit
def sum_of_parts(parts, count, stride, element, inside, BLOCK_P: tl.constexpr):
    """Elements of `count` parts that lie `stride` apart, added up: `(BLOCK_L,)`, zeros where not `inside`.

    BLOCK_P parts are read at once, for a sum waits on memory once a step; part p goes to sum p % BLOCK_P.
    """
    totals = tl.zeros((BLOCK_P, element.shape[0]), tl.float32)
    for first in range(0, count, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P).to(tl.int64)
        mask = (part < count)[:, None] & inside[None, :]
        totals += tl.load(parts + part[:, None] * stride + element[None, :], mask=mask, other=0.0)
    return tl.sum(totals, axis=0)


@triton.jit(do_not_specialize=["P"])
def sum_parts_kernel(out, parts, P, L, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr):
    """A program owns BLOCK_L elements."""
    element = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    total = sum_of_parts(parts, P, L, element, element < L, BLOCK_P)
    tl.store(out + element, total.to(out.dtype.element_ty), mask=element < L)


def sum_parts(parts: Tensor, out: Tensor) -> Tensor:
    """Writes the sum of `parts (P, ...)`, float32 and contiguous, over their first dimension to `out (...)`."""
    count, elements = parts.shape[0], out.numel()
    row = tile(out.device, "sum_parts")
    block_p = min(triton.next_power_of_2(count), row["parts"])
    block_l = row["elements"] // block_p
    launch(
        sum_parts_kernel, (cdiv(elements, block_l),), out, parts, count, elements,
        BLOCK_P=block_p, BLOCK_L=block_l, num_warps=row["num_warps"], fuse=True,
    )  # fmt: skip
    return out
