"""From a history to a token sequence: the prompt's text around item tokens, with ranks and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from speeder.data.item_indices import item_indices
from speeder.model.config import SpeederConfig
from speeder.model.packing import cu_seqlens

IGNORED = -100


@dataclass
class TokenSequence:
    """One user's tokens: ids, item ranks (-1 at text) and labels (-100 without a target), of equal length."""

    ids: list[int]
    ranks: list[int]
    labels: list[int]


def build_sequence(
    history: Sequence[int],
    config: SpeederConfig,
    target: int | None = None,
    supervision: str = "all",
) -> TokenSequence:
    """The sequence `prefix, items, suffix, target` for a history of item indices, oldest first.

    The last token of a suffix predicts the next item, and carries that item's rank.

    Args:
        history: item indices; the newest `config.max_history` are kept.
        target: the next item, in training.
        supervision: `"all"`: every item but the first is a target; `"last"`: only `target` is.

    Raises:
        TypeError: an item is not an integer.
        ValueError: `supervision` is unknown, an index is negative, or there is neither a history nor a prompt.
    """
    if supervision not in ("all", "last"):
        raise ValueError(f"supervision: expected 'all' or 'last', got {supervision!r}")
    items = item_indices("history", history)[-config.max_history :]
    if target is not None:
        [target] = item_indices("target", [target])
    if not items and not config.prompt_prefix and not config.prompt_suffix:
        raise ValueError("history: expected at least one item, got none, and the prompt has no text either")
    k, first_id = config.tokens_per_item, config.text_vocab_size
    ids, ranks, labels = list(config.prompt_prefix), [-1] * len(config.prompt_prefix), []
    labels = [IGNORED] * len(ids)

    def add_item(item: int, rank: int, asked: bool) -> None:
        ids.extend([first_id + item] * k)
        ranks.extend([rank] * k)
        labels.extend([first_id + item if asked else IGNORED] + [IGNORED] * (k - 1))

    for rank, item in enumerate(items):
        add_item(item, rank, asked=supervision == "all" and rank > 0)
    if config.prompt_suffix:
        ids.extend(config.prompt_suffix)
        ranks.extend([-1] * (len(config.prompt_suffix) - 1) + [len(items)])
        labels.extend([IGNORED] * len(config.prompt_suffix))
    if target is not None:
        add_item(target, len(items), asked=True)
    return TokenSequence(ids, ranks, labels)


def pack_batch(sequences: Sequence[TokenSequence], with_labels: bool = False) -> dict[str, torch.Tensor]:
    """Sequences end to end: `input_ids`, `ranks`, with labels `labels`, all `(1, T)`, and `cu_seqlens` `(B + 1,)`.

    Raises:
        ValueError: there is no sequence.
    """
    if not sequences:
        raise ValueError("sequences: expected at least one, got none")
    batch = {
        "input_ids": torch.tensor([[token for sequence in sequences for token in sequence.ids]]),
        "ranks": torch.tensor(
            [[rank for sequence in sequences for rank in sequence.ranks]], dtype=torch.int32
        ),
        "cu_seqlens": cu_seqlens(torch.tensor([len(sequence.ids) for sequence in sequences])),
    }
    if with_labels:
        batch["labels"] = torch.tensor([[label for sequence in sequences for label in sequence.labels]])
    return batch


def pad_batch(
    sequences: Sequence[TokenSequence], pad_id: int, side: str = "left", with_labels: bool = False
) -> dict[str, torch.Tensor]:
    """Sequences as a padded batch: `input_ids`, `attention_mask`, `ranks`, with labels `labels`, all `(B, S)`.

    Args:
        side: `"left"` (for `generate`) or `"right"`.

    Raises:
        ValueError: there is no sequence, or `side` is unknown.
    """
    if not sequences:
        raise ValueError("sequences: expected at least one, got none")
    if side not in ("left", "right"):
        raise ValueError(f"side: expected 'left' or 'right', got {side!r}")
    longest = max(len(sequence.ids) for sequence in sequences)

    def padded(rows: list[list[int]], filler: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
        left = side == "left"
        filled = [
            ([filler] * (longest - len(r)) + r) if left else (r + [filler] * (longest - len(r))) for r in rows
        ]
        return torch.tensor(filled, dtype=dtype)

    batch = {
        "input_ids": padded([sequence.ids for sequence in sequences], pad_id),
        "attention_mask": padded([[1] * len(sequence.ids) for sequence in sequences], 0),
        "ranks": padded([sequence.ranks for sequence in sequences], -1, torch.int32),
    }
    if with_labels:
        batch["labels"] = padded([sequence.labels for sequence in sequences], IGNORED)
    return batch
