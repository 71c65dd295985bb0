"""compress_items in Triton: softmax over the modalities an item has, weighted sum and RMSNorm in one pass over the
experts' outputs; the gradient of the norm's weight is summed in parts.

Shape letters: U items, M modalities, H hidden size. A program holds whole rows of H in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from speeder_kernels.triton import tiles
from speeder_kernels.triton.sum_parts import sum_parts
from speeder_kernels.triton.tiles import cdiv, launch, tile


@triton.jit
def _gates(gate_logits, present, item, in_batch, M, BLOCK_M: tl.constexpr):
    """Softmax over present modalities, `(BLOCK_U, BLOCK_M)`; 0 for the absent, whose logits are not read."""
    modality = tl.arange(0, BLOCK_M)
    place = item[:, None] * M + modality[None, :]
    here = tl.load(present + place, mask=in_batch[:, None] & (modality < M)[None, :], other=0) != 0
    logits = tl.load(gate_logits + place, mask=here, other=float("-inf"))
    largest = tl.where(in_batch, tl.max(logits, axis=1), 0.0)
    powers = tl.where(here, tl.exp(logits - largest[:, None]), 0.0)
    total = tl.where(in_batch, tl.sum(powers, axis=1), 1.0)
    return tl.div_rn(powers, tl.broadcast_to(total[:, None], powers.shape))


@triton.jit
def _of_modality(table, m, BLOCK_M: tl.constexpr):
    """Column m of a `(BLOCK_U, BLOCK_M)` tile."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_M)[None, :] == m, table, 0.0), axis=1)


@triton.jit
def _expert_rows(expert_outputs, present, item, in_batch, m, M, H, column):
    """Modality m's rows `(BLOCK_U, BLOCK_H)` in float32; zeros, not read, for items that lack it."""
    place = item * M + m
    here = tl.load(present + place, mask=in_batch, other=0) != 0
    inside = here[:, None] & (column < H)[None, :]
    rows = tl.load(expert_outputs + place[:, None] * H + column[None, :], mask=inside, other=0.0)
    return rows.to(tl.float32)


@triton.jit
def _mixed_and_inverse_rms(
    expert_outputs, present, gates, item, in_batch, M, H, column, eps, BLOCK_M: tl.constexpr
):
    """The weighted sum of an item's experts `(BLOCK_U, BLOCK_H)`, and one over its root mean square."""
    mixed = tl.zeros((item.shape[0], column.shape[0]), tl.float32)
    for m in range(M):
        rows = _expert_rows(expert_outputs, present, item, in_batch, m, M, H, column)
        mixed += _of_modality(gates, m, BLOCK_M)[:, None] * rows
    mean_square = tl.div_rn(tl.sum(mixed * mixed, axis=1), H * 1.0)
    return mixed, tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))


@triton.jit(do_not_specialize=["U"])
def compress_items_kernel(
    tokens, gates_out, expert_outputs, gate_logits, present, norm_weight, eps, U, M, H,
    BLOCK_U: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program makes the tokens and gates of BLOCK_U items."""
    item = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    in_batch = item < U
    column, modality = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_M)
    gates = _gates(gate_logits, present, item, in_batch, M, BLOCK_M)
    mixed, inverse_rms = _mixed_and_inverse_rms(
        expert_outputs, present, gates, item, in_batch, M, H, column, eps, BLOCK_M
    )
    weight = tl.load(norm_weight + column, mask=column < H, other=0.0)
    out = mixed * inverse_rms[:, None] * weight[None, :]
    inside = in_batch[:, None] & (column < H)[None, :]
    tl.store(tokens + item[:, None] * H + column[None, :], out.to(tokens.dtype.element_ty), mask=inside)
    inside = in_batch[:, None] & (modality < M)[None, :]
    tl.store(gates_out + item[:, None] * M + modality[None, :], gates, mask=inside)


@triton.jit(do_not_specialize=["U", "ITEMS"])
def compress_items_backward_kernel(
    grad_experts, grad_logits, weight_parts, grad_tokens, grad_gates,
    expert_outputs, gate_logits, present, norm_weight, eps, U, M, H, ITEMS,
    EXPERTS: tl.constexpr, LOGITS: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A program owns ITEMS items and one part of the weight's gradient. EXPERTS, LOGITS and WEIGHT: what is wanted."""
    column, modality = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_M)
    in_row = (column < H)[None, :]
    weight = tl.load(norm_weight + column, mask=column < H, other=0.0)
    grad_weight = tl.zeros((BLOCK_H,), tl.float32)
    start = tl.program_id(0).to(tl.int64) * ITEMS
    stop = tl.minimum(start + ITEMS, U)
    for first in range(start, stop, BLOCK_U):
        item = first + tl.arange(0, BLOCK_U)
        in_batch = item < stop
        gates = _gates(gate_logits, present, item, in_batch, M, BLOCK_M)
        mixed, inverse_rms = _mixed_and_inverse_rms(
            expert_outputs, present, gates, item, in_batch, M, H, column, eps, BLOCK_M
        )
        normed = mixed * inverse_rms[:, None]
        inside = in_batch[:, None] & in_row
        grad = tl.load(grad_tokens + item[:, None] * H + column[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        if WEIGHT:
            grad_weight += tl.sum(grad * normed, axis=0)
        if EXPERTS or LOGITS:
            grad_normed = grad * weight[None, :]
            # RMSNorm: the part of the gradient along the normalised vector is removed.
            along = tl.div_rn(tl.sum(grad_normed * normed, axis=1), H * 1.0)
            grad_mixed = inverse_rms[:, None] * (grad_normed - normed * along[:, None])
            dots = tl.zeros((BLOCK_U, BLOCK_M), tl.float32)
            for m in range(M):
                if EXPERTS:
                    # An absent modality's gate is 0, and so is its gradient, unless the item's own is not finite.
                    part = _of_modality(gates, m, BLOCK_M)[:, None] * grad_mixed
                    place = (item * M + m)[:, None] * H + column[None, :]
                    tl.store(grad_experts + place, part.to(grad_experts.dtype.element_ty), mask=inside)
                if LOGITS:
                    rows = _expert_rows(expert_outputs, present, item, in_batch, m, M, H, column)
                    dot = tl.sum(rows * grad_mixed, axis=1)
                    dots = tl.where(modality[None, :] == m, dot[:, None], dots)
            if LOGITS:
                place = item[:, None] * M + modality[None, :]
                inside = in_batch[:, None] & (modality < M)[None, :]
                dots += tl.load(grad_gates + place, mask=inside, other=0.0)
                centred = dots - tl.sum(gates * dots, axis=1)[:, None]
                tl.store(grad_logits + place, gates * centred, mask=inside)
    if WEIGHT:
        tl.store(weight_parts + tl.program_id(0).to(tl.int64) * H + column, grad_weight, mask=column < H)


def _blocks(name: str, experts: Tensor) -> dict[str, int]:
    """Block sizes and warps: as many items as make up the row's `elements`, at least one."""
    row = tile(experts.device, name)
    _, modalities, hidden = experts.shape
    columns = triton.next_power_of_2(max(hidden, 16))
    items = max(1, min(row["elements"] // columns, 16))
    # Rows wider than the block get more warps, so that a thread's share stays the same.
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
    tensors = (tokens, gates, expert_outputs, gate_logits, present.view(torch.uint8), norm_weight)
    launch(compress_items_kernel, grid, *tensors, eps, items, modalities, hidden, **blocks, fuse=True)
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
        launch(
            compress_items_backward_kernel, (programs,),
            grad_experts, grad_logits, parts, grad_tokens, grad_gates,
            expert_outputs, gate_logits, present.view(torch.uint8), norm_weight, eps,
            items, modalities, hidden, share, EXPERTS=experts, LOGITS=logits, WEIGHT=weight, **blocks, fuse=True,
        )  # fmt: skip
    if weight:
        sum_parts(parts, grad_weight)
    return grad_experts, grad_logits, grad_weight
