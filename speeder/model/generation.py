"""`generate` over items, and its checks: what it would otherwise fill up with text ids, silently."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin

from speeder.model.packing import item_ranks


class ItemGenerationMixin(GenerationMixin):
    """transformers' generation, over items, text or both."""

    def generate(self, inputs: torch.Tensor | None = None, *args, vocabulary: str = "items", **kwargs):
        """transformers' `generate`, over items by default; `vocabulary="text"` writes text, `"all"` either.

        Items seen in the prompt are left out with `no_repeat_ngram_size=1`.

        Raises:
            ValueError: items are to be generated with several tokens per item (use `recommend`), by more beams than
                there are items, or more of them than are left.
        """
        if vocabulary != "text" and self.config.tokens_per_item > 1:
            raise ValueError(
                f"vocabulary: expected 'text' with tokens_per_item = {self.config.tokens_per_item}, "
                f"got {vocabulary!r}; recommend() ranks items in any case"
            )
        if vocabulary != "items":
            return super().generate(inputs, *args, vocabulary=vocabulary, **kwargs)
        settings = kwargs.get("generation_config") or self.generation_config
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        once = kwargs.get("no_repeat_ngram_size", settings.no_repeat_ngram_size) == 1
        beams = kwargs.get("num_beams", settings.num_beams)
        check_beams(beams, self.config.num_items, prompt if once else None, self.config.text_vocab_size)
        found = super().generate(inputs, *args, vocabulary=vocabulary, **kwargs)
        ends = kwargs.get("eos_token_id", settings.eos_token_id)
        check_items_only(
            found if isinstance(found, torch.Tensor) else found.sequences,
            0 if prompt is None else prompt.shape[1],
            self.config.text_vocab_size,
            ends,
        )
        return found

    def prepare_inputs_for_generation(self, input_ids, *, attention_mask=None, ranks=None, **kwargs):
        """Give every step what the cache lacks: the ranks of all tokens so far, for attention, and the ids of those in
        the cache, for item pairs."""
        item_mask = input_ids >= self.config.text_vocab_size
        if attention_mask is not None:
            item_mask = item_mask & attention_mask.bool()
        all_ranks = item_ranks(item_mask, self.config.tokens_per_item)
        if ranks is not None:  # keep the prompt's ranks: its last position may carry the next item's rank
            all_ranks[:, : ranks.shape[1]] = ranks
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        inputs["ranks"] = all_ranks
        if self.config.pair_weight and (past := input_ids.shape[1] - inputs["input_ids"].shape[1]):
            inputs["past_ids"] = input_ids[:, :past]
        inputs.pop("position_ids", None)  # `generate` makes them from the mask, as the layout does
        return inputs


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
