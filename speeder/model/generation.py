"""Checks around `generate` over items: what it would otherwise fill up with text ids, silently."""

from __future__ import annotations

from typing import Any

import torch


def check_beams(num_beams: int | None, num_items: int, seen: torch.Tensor | None, text_ids: int) -> None:
    """Raise `ValueError` if there are more beams than items to begin with.

    Args:
        seen: `(n, T)` ids of prompts whose items may not be repeated; None: they may.
        text_ids: number of text ids; items follow.
    """
    if num_beams is None or num_beams == 1:
        return
    used = 0
    if seen is not None:
        used = max(len(row[row >= text_ids].unique()) for row in seen)
    if num_beams > num_items - used:
        left = (
            f"the {num_items - used} items that {used} seen ones leave" if used else f"the {num_items} items"
        )
        raise ValueError(f"num_beams: expected at most {left}, got {num_beams}")


def check_items_only(sequences: torch.Tensor, prompt: int, text_ids: int, ends: Any) -> None:
    """Raise `ValueError` if a text id was generated, since no item was left.

    Args:
        sequences: `(n, T)` ids that `generate` returned.
        prompt: length of the prompt within them.
        text_ids: number of text ids; items follow.
        ends: ids that end a sequence, as in `eos_token_id`; what follows one is padding.
    """
    new = sequences[:, prompt:]
    ended = torch.zeros_like(new, dtype=torch.bool)
    if ends is not None:
        is_end = torch.isin(new, torch.as_tensor(ends, device=new.device))
        ended = is_end.cumsum(dim=1) > is_end.long()
    wrong = (new < text_ids) & ~ended
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"generate: no item was left for token {place + 1} of sequence {row}; ask for fewer tokens or beams, or"
            " allow items to repeat"
        )
