"""Layouts of a batch's tokens: padded, packed and cached batches in the packed form of the ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class SequenceLayout:
    """The packed view of a batch: `Tq` new tokens and `Tk` keys of `B` sequences, end to end.

    `query_index` / `key_index` are flat positions in the padded `(B, S)` grid, or None without padding.
    """

    cu_seqlens_q: torch.Tensor  # (B + 1,) int32
    cu_seqlens_k: torch.Tensor  # (B + 1,) int32
    max_seqlen_q: int
    max_seqlen_k: int
    rank_q: torch.Tensor  # (Tq,) int32, -1 where a token is not an item
    rank_k: torch.Tensor  # (Tk,) int32
    position_ids: torch.Tensor  # (Tq,) int64, from 0 in each sequence
    query_index: torch.Tensor | None = None  # (Tq,) int64
    key_index: torch.Tensor | None = None  # (Tk,) int64
    key_width: int | None = None  # columns of the padded grid that keys lie in; None: they are packed


def item_ranks(item_mask: torch.Tensor, tokens_per_item: int = 1) -> torch.Tensor:
    """Ranks of the items in rows of tokens, oldest first from 0; -1 for tokens that are not items.

    Args:
        item_mask: `(B, S)` bool, True at item tokens.

    Returns:
        `(B, S)` int32.
    """
    count = item_mask.long().cumsum(dim=-1) - 1
    return torch.where(item_mask, count.div(tokens_per_item, rounding_mode="floor"), -1).int()


def packed_layout(
    cu_seqlens: torch.Tensor, ranks: torch.Tensor | None, item_mask: torch.Tensor, tokens_per_item: int = 1
) -> SequenceLayout:
    """The layout of a packed row.

    Args:
        cu_seqlens: `(B + 1,)` int32, from 0 to `T`.
        ranks: `(T,)`; None counts items from 0 in each sequence.
        item_mask: `(T,)` bool, True at item tokens.

    Raises:
        TypeError: `cu_seqlens` or `ranks` does not hold integers.
        ValueError: `cu_seqlens` does not run from 0 to `T` without falling, or `ranks` is not `(T,)`.
    """
    check_cu_seqlens(cu_seqlens, len(item_mask))
    lengths = cu_seqlens.diff()
    if ranks is None:
        rows = item_mask.split(lengths.tolist())
        ranks = torch.cat([item_ranks(row, tokens_per_item) for row in rows])
    elif ranks.shape != item_mask.shape:
        raise ValueError(f"ranks: expected ({len(item_mask)},), got {tuple(ranks.shape)}")
    ranks = kernel_ranks(ranks)
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths.long())
    cu_seqlens, longest = cu_seqlens.int(), int(lengths.max())
    position_ids = torch.arange(len(ranks), device=ranks.device) - starts
    return SequenceLayout(cu_seqlens, cu_seqlens, longest, longest, ranks, ranks, position_ids)


def check_cu_seqlens(cu_seqlens: torch.Tensor, tokens: int) -> None:
    """Check `cu_seqlens` of packed sequences.

    Raises:
        TypeError: it does not hold integers.
        ValueError: it does not run from 0 to `tokens` without falling.
    """
    check_integers("cu_seqlens", cu_seqlens)
    if (
        cu_seqlens.ndim != 1
        or len(cu_seqlens) < 2
        or cu_seqlens[0] != 0
        or (cu_seqlens.long().diff() < 0).any()
    ):
        raise ValueError(f"cu_seqlens: expected (B + 1,) rising from 0, got {cu_seqlens.tolist()[:8]}")
    if cu_seqlens[-1] != tokens:
        raise ValueError(f"cu_seqlens: expected to end at T = {tokens}, got {int(cu_seqlens[-1])}")


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_integers(name: str, tensor: torch.Tensor) -> None:
    """Raise `TypeError` for a tensor of another dtype than integers, which a cast would cut."""
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected integers, got {tensor.dtype}")


def kernel_ranks(ranks: torch.Tensor) -> torch.Tensor:
    """Ranks as the kernels take them: int32; or int64 on an accelerator, where the op itself sees to the range.

    Raises:
        TypeError: they are not integers. ValueError: one does not fit int32.
    """
    check_integers("ranks", ranks)
    if ranks.dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        return ranks.int()
    if ranks.device.type != "cpu":
        return ranks.long()
    if ranks.numel():
        low, high = ranks.long().aminmax()
        limits = torch.iinfo(torch.int32)
        if low < limits.min or high > limits.max:
            raise ValueError(f"ranks: expected at most {limits.max} (int32), got {int(low)}..{int(high)}")
    return ranks.int()


def last_positions(cu_seqlens: torch.Tensor, at_least: int = 1) -> torch.Tensor:
    """Positions of the last tokens of packed sequences with at least this many tokens, int64."""
    return (cu_seqlens[1:].long() - 1)[cu_seqlens.diff() >= at_least]


def padded_layout(mask: torch.Tensor, ranks: torch.Tensor, new_tokens: int) -> SequenceLayout:
    """The layout of a padded batch whose last `new_tokens` columns are new; the others are in the cache.

    Args:
        mask: `(B, S)` bool, False at padding, on either side.
        ranks: `(B, S)` int32.

    Raises:
        TypeError: `ranks` does not hold integers.
        ValueError: a row has only padding.
    """
    check_integers("ranks", ranks)
    lengths = mask.sum(dim=-1)
    if (lengths == 0).any():
        raise ValueError(f"attention_mask: row {int((lengths == 0).nonzero()[0])} has only padding")
    positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    new_mask, new_ranks = mask[:, -new_tokens:], ranks[:, -new_tokens:]
    whole = bool(mask.all())
    key_index = None if whole else mask.flatten().nonzero().flatten()
    query_index = None if whole else new_mask.flatten().nonzero().flatten()
    new_lengths = new_mask.sum(dim=-1)

    def pick(grid: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        return grid.flatten() if index is None else grid.flatten()[index]

    return SequenceLayout(
        cu_seqlens(new_lengths),
        cu_seqlens(lengths),
        int(new_lengths.max()),
        int(lengths.max()),
        kernel_ranks(pick(new_ranks, query_index)),
        kernel_ranks(pick(ranks, key_index)),
        pick(positions[:, -new_tokens:], query_index),
        query_index,
        key_index,
        mask.shape[1],
    )


def cu_seqlens(lengths: torch.Tensor) -> torch.Tensor:
    """`(B,)` lengths to `(B + 1,)` int32 cumulative ones, from 0."""
    return torch.nn.functional.pad(lengths.cumsum(dim=0), (1, 0)).int()


def packed_rows(states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """`(B, H, S, D) -> (T, H, D)`: the tokens that are not padding, end to end.

    Args:
        index: `(T,)` int64, flat places of the tokens in the `(B, S)` grid; None: all.
    """
    flat = states.transpose(1, 2).flatten(0, 1)
    return flat if index is None or len(index) == len(flat) else flat[index]


def item_slots(item_mask: torch.Tensor, ranks: torch.Tensor, tokens_per_item: int) -> torch.Tensor:
    """The number of each position's token within its item, 0 .. K-1 in each run of one rank.

    Args:
        item_mask, ranks: `(T,)`; a run starts where the rank changes or the token before is no item.
    """
    if tokens_per_item == 1:
        return torch.zeros_like(ranks, dtype=torch.long)
    before = torch.arange(len(ranks), device=ranks.device)
    starts = item_mask.clone()
    starts[1:] &= ~item_mask[:-1] | (ranks[1:] != ranks[:-1])
    run_start = torch.where(starts, before, 0).cummax(dim=0).values
    return (before - run_start) % tokens_per_item
