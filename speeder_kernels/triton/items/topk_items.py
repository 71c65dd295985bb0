"""topk_items in Triton: exact, with exclusions, ties to the lower item, and never an (N, I) matrix.

A score's bits, made monotonic, are an int32 code; codes of one chunk of items at a time lie in scratch memory.
While a tile of codes is still in registers, the best code of every group of GROUP consecutive items is written
beside it. Whatever is among the k best lies in one of the k groups with the best codes (each of these groups
has an item at least as good as the k-th of them; among equals the lower group has the lower items), so only
those groups' k * GROUP codes are looked at again. Both selections are torch.topk over int64 keys (code above,
negated index below), a radix select that takes any k: it sees I / GROUP + k * GROUP keys a row in place of I,
and a tile costs one comparison a score in place of the sorting network that keeping the best k in registers
would need.

Shape letters: N rows, I items, H hidden size, C items of a chunk, G groups of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from speeder_kernels import reference
from speeder_kernels.triton.items.score_tile import pad_columns, score_tile
from speeder_kernels.triton.tiles import cdiv, launch, tile

CHUNK_BYTES = 64 << 20  # of codes
CHUNK_ITEMS = 4096  # at least
GROUP = 32

EXCLUDED = tl.constexpr(-(2**31))  # the code of an item that a row may not be given; no score has it
NAN = tl.constexpr(2**31 - 1)  # above every number, so that it is found
LOW32 = tl.constexpr(2**32 - 1)  # x ^ LOW32 is LOW32 - x: the higher, the lower the item


class Exclusions(NamedTuple):
    """The items that each row may not be given, a row's items rising; in a kernel, a tensor is a pointer."""

    items: Tensor
    indptr: Tensor  # (N + 1,): where a row's items begin


@triton.jit
def _codes(scores):
    """The order of the scores as int32; -0.0 equals 0.0."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    codes = bits ^ ((bits >> 31) & NAN)
    return tl.where(scores == scores, codes, NAN)


@triton.jit
def _exclude(codes, excluded: Exclusions, row, in_batch, first_item, BLOCK_I: tl.constexpr):
    """Marks what rows may not be given in a tile of codes. A binary search finds the first that is not before it."""
    low = tl.load(excluded.indptr + row, mask=in_batch, other=0)
    end = tl.load(excluded.indptr + row + 1, mask=in_batch, other=0)
    high = end
    while tl.max(high - low, axis=0) > 0:
        searching = low < high
        middle = (low + high) // 2
        before = tl.load(excluded.items + middle, mask=searching, other=0) < first_item
        low = tl.where(searching & before, middle + 1, low)
        high = tl.where(searching & (before == 0), middle, high)
    column = tl.arange(0, BLOCK_I)
    place = tl.load(excluded.items + low, mask=low < end, other=first_item + BLOCK_I) - first_item
    while tl.min(place, axis=0) < BLOCK_I:
        codes = tl.where(column[None, :] == place[:, None], EXCLUDED, codes)
        low += tl.where(place < BLOCK_I, 1, 0)
        place = tl.load(excluded.items + low, mask=low < end, other=first_item + BLOCK_I) - first_item
    return codes


@triton.jit(do_not_specialize=["N", "ITEMS", "START"])
def item_codes_kernel(
    codes_out, groups_out, hidden, item_table, excluded: Exclusions, N, ITEMS, H, START, C,
    SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One tile of the chunk's codes `(N, C)`, and the keys of its groups of SIZE items, of `(N, C / SIZE)`.

    `excluded` is None where no row has exclusions.
    """
    tiles_of_row = C // BLOCK_I
    first_row = tl.program_id(0) // tiles_of_row * BLOCK_N
    first_column = tl.program_id(0) % tiles_of_row * BLOCK_I
    first_item = START + first_column
    rows, items = hidden + tl.cast(first_row, tl.int64) * H, item_table + tl.cast(first_item, tl.int64) * H
    codes = _codes(score_tile(rows, N - first_row, items, ITEMS - first_item, H, BLOCK_N, BLOCK_I, BLOCK_H))
    column = tl.arange(0, BLOCK_I)
    codes = tl.where((column < ITEMS - first_item)[None, :], codes, EXCLUDED)
    row = tl.cast(first_row, tl.int64) + tl.arange(0, BLOCK_N)
    in_batch = row < N
    if excluded is not None:
        codes = _exclude(codes, excluded, row, in_batch, first_item, BLOCK_I)
    tl.store(codes_out + row[:, None] * C + (first_column + column)[None, :], codes, mask=in_batch[:, None])
    best = tl.max(tl.reshape(codes, (BLOCK_N, BLOCK_I // SIZE, SIZE)), axis=2)
    group = first_column // SIZE + tl.arange(0, BLOCK_I // SIZE)
    keys = (best.to(tl.int64) << 32) | (group.to(tl.int64) ^ LOW32)[None, :]
    tl.store(groups_out + row[:, None] * (C // SIZE) + group[None, :], keys, mask=in_batch[:, None])


@triton.jit(do_not_specialize=["START", "K"])
def candidate_keys_kernel(
    keys_out, codes, groups, START, C, K, NONE: tl.constexpr, SIZE: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The items of BLOCK_K of a row's K groups as keys `(N, K * SIZE)`; NONE for an excluded one."""
    blocks = tl.cdiv(K, BLOCK_K)
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (k < K)[:, None]
    group = tl.load(groups + row * K + k, mask=k < K, other=0)
    item = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    code = tl.load(codes + row * C + item, mask=inside, other=0)
    keys = (code.to(tl.int64) << 32) | ((START + item) ^ LOW32)
    place = k[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(keys_out + row * K * SIZE + place, tl.where(code == EXCLUDED, NONE, keys), mask=inside)


def topk_items(
    hidden: Tensor, item_table: Tensor, k: int, exclude_indptr: Tensor | None, exclude_items: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores `(N, k)` float32 and items `(N, k)` int64, -inf and -1 where a row has fewer; contiguous tensors."""
    hidden, item_table = pad_columns(hidden), pad_columns(item_table)
    device, (n, h), i = hidden.device, hidden.shape, item_table.shape[0]
    row = tile(device, "topk_items", hidden.element_size())
    step = row["BLOCK_I"]
    chunk = step * min(cdiv(i, step), max(CHUNK_BYTES // (4 * n), CHUNK_ITEMS) // step)
    codes = torch.empty(n, chunk, dtype=torch.int32, device=device)
    group_keys = torch.empty(n, chunk // GROUP, dtype=torch.int64, device=device)
    excluded = _sorted_exclusions(exclude_indptr, exclude_items, i)
    best = group_keys.new_empty(n, 0)
    for start in range(0, i, chunk):
        grid = (cdiv(n, row["BLOCK_N"]) * (chunk // step),)
        tensors = (codes, group_keys, hidden, item_table, excluded)
        launch(item_codes_kernel, grid, *tensors, n, i, h, start, chunk, SIZE=GROUP, **row, fuse=True)
        count = min(k, chunk // GROUP)
        keys = _candidate_keys(codes, group_keys.topk(count, dim=1, sorted=False).indices, start)
        best = torch.cat((best, keys), dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
    return reference._decode(best)


def _sorted_exclusions(indptr: Tensor | None, items: Tensor | None, catalogue: int) -> Exclusions | None:
    """The lists with each row's items rising, or None for lists that are empty.

    What is no item excludes nothing, and no row's list reaches behind the last: nobody has read the numbers.
    """
    if indptr is None or items.shape[0] == 0:
        return None
    indptr = indptr.clamp(0, items.shape[0])
    rows = torch.searchsorted(indptr, torch.arange(items.shape[0], device=items.device), right=True)
    items = torch.where((items >= 0) & (items < catalogue), items, catalogue)
    return Exclusions((rows * (catalogue + 1) + items).sort().values % (catalogue + 1), indptr)


def _candidate_keys(codes: Tensor, groups: Tensor, start: int) -> Tensor:
    n, count = groups.shape
    keys = groups.new_empty(n, count * GROUP)
    row = tile(codes.device, "candidate_keys")
    grid = (n * cdiv(count, row["BLOCK_K"]),)
    constants = dict(NONE=reference._EXCLUDED, SIZE=GROUP)
    launch(
        candidate_keys_kernel,
        grid,
        keys,
        codes,
        groups,
        start,
        codes.shape[1],
        count,
        **constants,
        **row,
        fuse=False,
    )
    return keys
