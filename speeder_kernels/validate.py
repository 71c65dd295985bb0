"""Argument checks: every message names the argument, what was expected and what came.

Two kinds. *Static* checks look at shapes, dtypes and devices; they run on every call and `torch.compile`
traces through them. *Value* checks (`*_values`) read the numbers in integer tensors; they run inside the ops,
out of the compiler's sight. On a GPU a value check would stop and wait for the device, so there they run only
where the environment variable SPEEDER_CHECK is 1.
"""

from __future__ import annotations

import math
import os
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor

from speeder_kernels.derivatives import has_tangent, is_batched

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)
FLOATS_AND_DOUBLE = (*FLOATS, torch.float64)
INTEGERS = (torch.int32, torch.int64)
# What kernels multiply by log2(e) must stay finite too.
LARGEST_FLOAT = torch.finfo(torch.float32).max / 1.5
SMALLEST_FLOAT = torch.finfo(torch.float32).tiny
INT32, INT64 = torch.iinfo(torch.int32), torch.iinfo(torch.int64)


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """'float32, bfloat16 or float16' for an error message."""
    words = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Check type, dtype, shape and device. In `shape` a word stands for any size, a number for just that
    one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {names(dtypes)}, got {names((tensor.dtype,))}")
    fits = tensor.dim() == len(shape)
    if fits:
        for size, want in zip(tensor.shape, shape, strict=True):
            if not isinstance(want, str) and size != want:
                fits = False
    if not fits:
        wanted = "(" + ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def check_not_empty(name: str, tensor: Tensor, dim: int = 0) -> None:
    if tensor.shape[dim] == 0:
        raise ValueError(
            f"{name}: expected at least one element in dimension {dim}, got shape {tuple(tensor.shape)}"
        )


def check_positive(name: str, value: float) -> None:
    if not value >= SMALLEST_FLOAT:
        raise ValueError(
            f"{name}: expected a number above 0 (at least {SMALLEST_FLOAT:.3g}, in float32), got {value}"
        )


def check_count(name: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
    if not value >= least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if isinstance(value, int) and value > INT64.max:
        raise ValueError(f"{name}: expected at most {INT64.max}, got {value}")


def check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_constant(name: str, tensor: Tensor) -> None:
    """A tensor that the kernels give no gradient."""
    if tensor.requires_grad:
        raise ValueError(f"{name}: expected a constant, got a tensor that requires a gradient")


def check_number(name: str, value: float, instead: str) -> float:
    """A number that float32 holds, as a float. `instead` says what to do with one that is to be learned: the kernels
    give it no gradient."""
    if isinstance(value, Tensor):
        if value.requires_grad or has_tangent(value):
            raise ValueError(
                f"{name}: expected a number, got a tensor that requires a gradient, which {name} has none of: {instead}"
            )
        if is_batched(value):
            raise ValueError(
                f"{name}: expected one number for all of vmap's batch, got a tensor that it maps over"
            )
        if value.numel() != 1:
            raise ValueError(f"{name}: expected one number, got shape {tuple(value.shape)}")
        if value.dtype == torch.bool or value.dtype.is_complex:
            raise TypeError(f"{name}: expected a number, got a tensor of {value.dtype}")
    elif isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        value = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        value = math.inf
    if not -LARGEST_FLOAT <= value <= LARGEST_FLOAT:
        raise ValueError(f"{name}: expected a finite float32, got {value}")
    return value


def reads_values(tensor: Tensor, backend: str) -> bool:
    """Whether value checks run: on a CPU, on a GPU where they were asked for, and in the reference, which waits for the
    device anyway."""
    return not tensor.is_cuda or backend == "reference" or os.environ.get("SPEEDER_CHECK") == "1"


def check_range(
    name: str, tensor: Tensor, low: int, high: int, where: Tensor | None = None, note: str = ""
) -> None:
    """Each value must lie in `low .. high - 1`; `where` limits the check to the positions that are used."""
    bad = (tensor < low) | (tensor >= high)
    if where is not None:
        bad &= where
    if not bool(bad.any()):
        return
    position = int(bad.nonzero()[0, 0])
    wanted = f"{low}..{high - 1}" if high > low else f"no value at all (the table has {high} rows)"
    raise IndexError(f"{name}: expected {wanted}{note}, got {int(tensor[position])} at position {position}")


def check_int32_values(name: str, tensor: Tensor) -> None:
    """Each value must fit the int32 that the kernels compute in."""
    if tensor.dtype != torch.int32:
        check_range(name, tensor, INT32.min, INT32.max + 1, note=" (int32)")


def check_token_count(name: str, tokens: int) -> None:
    if tokens > INT32.max:
        raise ValueError(f"{name}: expected at most {INT32.max} tokens, which int32 can count, got {tokens}")


def check_finite_values(name: str, values: Tensor) -> None:
    """Each number of a vector must be one: neither infinite nor NaN."""
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        at = int(bad[0, 0])
        raise ValueError(f"{name}: expected finite numbers, got {float(values[at])} at position {at}")


def check_pack_values(input_ids: Tensor, item_rows: Tensor, ranks: Tensor, sizes: list[int]) -> None:
    """Only what is read is checked: ids of text tokens, rows and ranks of items."""
    vocabulary, items, prompts = sizes
    is_item = item_rows >= 0
    check_range("item_rows", item_rows, -1, items, note=" (-1 for a text token)")
    check_range("input_ids", input_ids, 0, vocabulary, where=~is_item)
    check_range("ranks", ranks, -1, prompts, where=is_item, note=" (-1 for no prompt)")


def check_cu_seqlens_values(
    name: str, cu_seqlens: Tensor, tokens: int, max_name: str, max_seqlen: int
) -> None:
    """Starts at 0, never falls, ends at the number of tokens, and no sequence is longer than max_seqlen."""
    starts = cu_seqlens.tolist()  # a handful of tensor ops would cost more than a short batch's attention
    if starts[0] != 0:
        raise ValueError(f"{name}: expected 0 at the start, got {starts[0]}")
    if starts[-1] != tokens:
        raise ValueError(f"{name}: expected {tokens} (the number of tokens) at the end, got {starts[-1]}")
    longest = 0
    for before, after in pairwise(starts):
        if after < before:
            raise ValueError(f"{name}: expected values that never fall, got {after} after {before}")
        longest = max(longest, after - before)
    if longest > max_seqlen:
        raise ValueError(f"{max_name}: expected at least {longest}, the longest sequence, got {max_seqlen}")


def check_present_values(present: Tensor) -> None:
    absent = (~present.any(dim=1)).nonzero()
    if len(absent):
        raise ValueError(
            f"present: expected at least one modality an item, got none for item {int(absent[0, 0])}"
        )


def check_exclude_values(indptr: Tensor, items: Tensor, catalogue: int) -> None:
    """A CSR row pointer that starts at 0, never falls and ends at the number of excluded items."""
    if int(indptr[0]) != 0 or int(indptr[-1]) != items.shape[0]:
        raise ValueError(
            f"exclude_indptr: expected 0 first and {items.shape[0]} (the length of exclude_items) last, "
            f"got {int(indptr[0])} and {int(indptr[-1])}"
        )
    falls = (indptr.diff() < 0).nonzero()
    if len(falls):
        raise ValueError(
            f"exclude_indptr: expected values that never fall, got a fall after row {int(falls[0, 0])}"
        )
    check_range("exclude_items", items, 0, catalogue)


def check_topk_values(items: Tensor, k: int) -> None:
    """After the fact: -1 marks a row with fewer than k items to choose from."""
    short = (items < 0).any(dim=1).nonzero()
    if len(short):
        row = int(short[0, 0])
        allowed = int((items[row] >= 0).sum())
        raise ValueError(f"k: expected at most {allowed}, the items that row {row} may be given, got {k}")


def check_finite_scores(values: Tensor) -> None:
    """A score that is not a number has no place in a ranking."""
    bad = values.isnan().any(dim=1).nonzero()
    if len(bad):
        raise ValueError(
            f"hidden: expected scores that are numbers, "
            f"got NaN in row {int(bad[0, 0])} of hidden @ item_table.T"
        )
