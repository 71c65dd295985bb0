"""compress_items in Triton: softmax over the modalities an item has, weighted sum and RMSNorm in one pass over the
experts' outputs; the gradient of the norm's weight is summed in parts.

Shape letters: U items, M modalities, H hidden size. A program holds whole rows of H in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from speeder_kernels.triton import tiles
from speeder_kernels.triton.sum_parts import sum_parts
from speeder_kernels.triton.tiles import cdiv, launch, tile


class Experts(NamedTuple):
    """What an item is mixed from; in a kernel, a tensor is a pointer."""

    outputs: Tensor  # (U, M, H)
    gate_logits: Tensor  # (U, M), float32
    present: Tensor  # (U, M), uint8
    M: int
    H: int


class Gradients(NamedTuple):
    """What `compress_items_backward_kernel` writes; None for what nobody needs."""

    experts: Tensor | None  # (U, M, H)
    logits: Tensor | None  # (U, M)
    weight_parts: Tensor | None  # (programs, H)


@triton.jit
def _gates(x: Experts, item, in_batch, BLOCK_M: tl.constexpr):
    """Softmax over present modalities, `(BLOCK_U, BLOCK_M)`; 0 for the absent, whose logits are not read."""
    modality = tl.arange(0, BLOCK_M)
    place = item[:, None] * x.M + modality[None, :]
    here = tl.load(x.present + place, mask=in_batch[:, None] & (modality < x.M)[None, :], other=0) != 0
    logits = tl.load(x.gate_logits + place, mask=here, other=float("-inf"))
    largest = tl.where(in_batch, tl.max(logits, axis=1), 0.0)
    powers = tl.where(here, tl.exp(logits - largest[:, None]), 0.0)
    total = tl.where(in_batch, tl.sum(powers, axis=1), 1.0)
    return tl.div_rn(powers, tl.broadcast_to(total[:, None], powers.shape))


@triton.jit
def _of_modality(table, m, BLOCK_M: tl.constexpr):
    """Column m of a `(BLOCK_U, BLOCK_M)` tile."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_M)[None, :] == m, table, 0.0), axis=1)


@triton.jit
def _expert_rows(x: Experts, item, in_batch, m, column):
    """Modality m's rows `(BLOCK_U, BLOCK_H)` in float32; zeros, not read, for items that lack it."""
    place = item * x.M + m
    here = tl.load(x.present + place, mask=in_batch, other=0) != 0
    inside = here[:, None] & (column < x.H)[None, :]
    rows = tl.load(x.outputs + place[:, None] * x.H + column[None, :], mask=inside, other=0.0)
    return rows.to(tl.float32)


@triton.jit
def _mixed_and_inverse_rms(x: Experts, gates, item, in_batch, column, eps, BLOCK_M: tl.constexpr):
    """The weighted sum of an item's experts `(BLOCK_U, BLOCK_H)`, and one over its root mean square."""
    mixed = tl.zeros((item.shape[0], column.shape[0]), tl.float32)
    for m in range(x.M):
        rows = _expert_rows(x, item, in_batch, m, column)
        mixed += _of_modality(gates, m, BLOCK_M)[:, None] * rows
    mean_square = tl.div_rn(tl.sum(mixed * mixed, axis=1), x.H * 1.0)
    return mixed, tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))


@triton.jit(do_not_specialize=["U"])
def compress_items_kernel(
    tokens, gates_out, x: Experts, norm_weight, eps, U,
    BLOCK_U: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program makes the tokens and gates of BLOCK_U items."""
    item = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    in_batch = item < U
    column, modality = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_M)
    gates = _gates(x, item, in_batch, BLOCK_M)
    mixed, inverse_rms = _mixed_and_inverse_rms(x, gates, item, in_batch, column, eps, BLOCK_M)
    weight = tl.load(norm_weight + column, mask=column < x.H, other=0.0)
    out = mixed * inverse_rms[:, None] * weight[None, :]
    inside = in_batch[:, None] & (column < x.H)[None, :]
    tl.store(tokens + item[:, None] * x.H + column[None, :], out.to(tokens.dtype.element_ty), mask=inside)
    inside = in_batch[:, None] & (modality < x.M)[None, :]
    tl.store(gates_out + item[:, None] * x.M + modality[None, :], gates, mask=inside)


@triton.jit(do_not_specialize=["U", "ITEMS"])
def compress_items_backward_kernel(
    grad_tokens, grad_gates, grads: Gradients, x: Experts, norm_weight, eps, U, ITEMS,
    BLOCK_U: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program owns ITEMS items and one part of the weight's gradient."""
    EXPERTS: tl.constexpr = grads.experts is not None
    LOGITS: tl.constexpr = grads.logits is not None
    WEIGHT: tl.constexpr = grads.weight_parts is not None
    column, modality = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_M)
    in_row = (column < x.H)[None, :]
    weight = tl.load(norm_weight + column, mask=column < x.H, other=0.0)
    grad_weight = tl.zeros((BLOCK_H,), tl.float32)
    start = tl.program_id(0).to(tl.int64) * ITEMS
    stop = tl.minimum(start + ITEMS, U)
    for first in range(start, stop, BLOCK_U):
        item = first + tl.arange(0, BLOCK_U)
        in_batch = item < stop
        gates = _gates(x, item, in_batch, BLOCK_M)
        mixed, inverse_rms = _mixed_and_inverse_rms(x, gates, item, in_batch, column, eps, BLOCK_M)
        normed = mixed * inverse_rms[:, None]
        inside = in_batch[:, None] & in_row
        grad = tl.load(grad_tokens + item[:, None] * x.H + column[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        if WEIGHT:
            grad_weight += tl.sum(grad * normed, axis=0)
        if EXPERTS or LOGITS:
            grad_normed = grad * weight[None, :]
            # RMSNorm: the part of the gradient along the normalised vector is removed.
            along = tl.div_rn(tl.sum(grad_normed * normed, axis=1), x.H * 1.0)
            grad_mixed = inverse_rms[:, None] * (grad_normed - normed * along[:, None])
            dots = tl.zeros((BLOCK_U, BLOCK_M), tl.float32)
            for m in range(x.M):
                if EXPERTS:
                    # An absent modality's gate is 0, and so is its gradient, unless the item's own is not finite.
                    part = _of_modality(gates, m, BLOCK_M)[:, None] * grad_mixed
                    place = (item * x.M + m)[:, None] * x.H + column[None, :]
                    tl.store(grads.experts + place, part.to(grads.experts.dtype.element_ty), mask=inside)
                if LOGITS:
                    rows = _expert_rows(x, item, in_batch, m, column)
                    dot = tl.sum(rows * grad_mixed, axis=1)
                    dots = tl.where(modality[None, :] == m, dot[:, None], dots)
            if LOGITS:
                place = item[:, None] * x.M + modality[None, :]
                inside = in_batch[:, None] & (modality < x.M)[None, :]
                dots += tl.load(grad_gates + place, mask=inside, other=0.0)
                centred = dots - tl.sum(gates * dots, axis=1)[:, None]
                tl.store(grads.logits + place, gates * centred, mask=inside)
    if WEIGHT:
        part = grads.weight_parts + tl.program_id(0).to(tl.int64) * x.H
        tl.store(part + column, grad_weight, mask=column < x.H)


def _blocks(name: str, experts: Tensor) -> dict[str, int]:
    """Block sizes and warps: as many items as make up the row's `elements`, at least one."""
    row = tile(experts.device, name)
    _, modalities, hidden = experts.shape
    columns = triton.next_power_of_2(max(hidden, 16))
    items = max(1, min(row["elements"] // columns, 16))
    # Rows longer than the block get more warps, so that a thread's share stays the same.
    warps = min(8, row["num_warps"] * max(1, columns // row["elements"]))
    blocks = dict(BLOCK_U=items, BLOCK_M=triton.next_power_of_2(modalities), BLOCK_H=columns)
    return dict(**blocks, num_warps=warps)


def compress_items(
    expert_outputs: Tensor, gate_logits: Tensor, present: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Tokens `(U, H)` and gates `(U, M)`; contiguous tensors, gate_logits and norm_weight in float32."""
    items, modalities, hidden = expert_outputs.shape
    tokens = expert_outputs.new_empty(items, hidden)
    gates = torch.empty_like(gate_logits)
    blocks = _blocks("compress_items", expert_outputs)
    grid = (cdiv(items, blocks["BLOCK_U"]),)
    x = Experts(expert_outputs, gate_logits, present.view(torch.uint8), modalities, hidden)
    launch(compress_items_kernel, grid, tokens, gates, x, norm_weight, eps, items, **blocks, fuse=True)
    return tokens, gates


def compress_items_backward(
    grad_tokens: Tensor,
    grad_gates: Tensor,
    expert_outputs: Tensor,
    gate_logits: Tensor,
    present: Tensor,
    norm_weight: Tensor,
    eps: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of expert_outputs `(U, M, H)`, gate_logits `(U, M)` and norm_weight `(H,)`, each empty (0 rows) where
    its bit in `needs` is not set."""
    items, modalities, hidden = expert_outputs.shape
    experts, logits, weight = (bool(needs >> bit & 1) for bit in range(3))
    blocks = _blocks("compress_items_backward", expert_outputs)
    # A few programs a processor, each with items of its own, so that there are few parts to add up.
    programs = min(cdiv(items, blocks["BLOCK_U"]), 4 * tiles.processors(expert_outputs.device))
    share = cdiv(items, programs)
    programs = cdiv(items, share)
    grad_experts = expert_outputs.new_empty(items if experts else 0, modalities, hidden)
    grad_logits = gate_logits.new_empty(items if logits else 0, modalities)
    grad_weight = norm_weight.new_empty(hidden if weight else 0)
    parts = norm_weight.new_empty(programs if weight else 0, hidden)
    if needs:
        wanted = ((grad_experts, experts), (grad_logits, logits), (parts, weight))
        grads = Gradients(*(grad if need else None for grad, need in wanted))
        x = Experts(expert_outputs, gate_logits, present.view(torch.uint8), modalities, hidden)
        launch(
            compress_items_backward_kernel, (programs,),
            grad_tokens, grad_gates, grads, x, norm_weight, eps, items, share, **blocks, fuse=True,
        )  # fmt: skip
    if weight:
        sum_parts(parts, grad_weight)
    return grad_experts, grad_logits, grad_weight
