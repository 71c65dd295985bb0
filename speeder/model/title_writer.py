"""Writing titles: greedy decoding up to a line end, for Speeder (`TitleWriter`) and the title-generation baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError
from speeder.io.files import read_json
from speeder.model.config import SpeederConfig
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.sequences import TokenSequence, pad_batch
from speeder.model.title_prompts import MAX_TITLE_TOKENS, TitlePrompts
from speeder.recipes.load import recipe_from_dict
from speeder.recipes.schema import Recipe

_BATCH = 16  # prompts that are continued at once


class TitleTokens(Protocol):
    """The titles of a catalogue as tokens."""

    tokenizer: PreTrainedTokenizerBase
    catalogue: ItemCatalogue
    title_end: int

    def title(self, item: int) -> list[int]:
        """An item's title as token ids, possibly cut, and a line end."""


class TitleWriter:
    """A trained Speeder that answers with a title, for `evaluate_titles`.

    It is not a method of the model, which is evaluated by ranking, so that the two are separate rows.

    Args:
        model: trained by a recipe with `titles` in a stage.
        prompts: as in that training.
    """

    label: ClassVar[str] = "Speeder (titles)"

    def __init__(self, model: SpeederForCausalLM, prompts: TitlePrompts):
        self.model, self.prompts = model, prompts

    @classmethod
    def of_run(cls, run: Path, model: SpeederForCausalLM) -> TitleWriter:
        """The writer of a run's model, with the prompt of the run's recipe.

        Raises:
            SpeederError: the model is not Speeder's, or its recipe has no titles.
        """
        if type(model) is not SpeederForCausalLM:
            name = getattr(model, "label", type(model).__name__)
            raise SpeederError(
                f"answers: expected 'ranking' for {name}, which writes no titles, got 'titles'"
            )
        recipe = recipe_from_dict(read_json(run / "recipe.json")["recipe"])
        if not isinstance(recipe, Recipe) or not any(stage.titles for stage in recipe.stages):
            raise SpeederError(
                f"{run}: expected a recipe with 'titles' above 0 in a stage, got none: the model was not trained to "
                "write titles (see the recipe ml-100k-titles)"
            )
        tokenizer = AutoTokenizer.from_pretrained(run / "model", trust_remote_code=False)
        return cls(model, TitlePrompts(tokenizer, model.config, model.catalogue, recipe.title_template))

    @property
    def config(self) -> SpeederConfig:
        """The model's."""
        return self.model.config

    @property
    def catalogue(self) -> ItemCatalogue:
        """The model's catalogue, whose features are checked before an evaluation."""
        return self.model.catalogue

    @property
    def training_hash(self) -> str | None:
        """What the model was trained on."""
        return self.model.training_hash

    def generate_titles(self, histories: Sequence[Sequence[int]], candidates: np.ndarray) -> list[str]:
        """Generate greedily, up to a line end.

        Args:
            histories: item indices, oldest first.
            candidates: `(n, C)` items, in the order of the prompt.

        Returns:
            `n` texts.
        """
        prompts = [
            self.prompts.sequence(history, row) for history, row in zip(histories, candidates, strict=True)
        ]
        return written_titles(self.model, prompts, candidates, self.prompts, MAX_TITLE_TOKENS)


def written_titles(
    model: SpeederForCausalLM,
    prompts: Sequence[TokenSequence],
    candidates: np.ndarray,
    titles: TitleTokens,
    max_title_tokens: int,
) -> list[str]:
    """Continue each prompt greedily up to a line end; returns the text, or the candidate's title that it matches."""
    written = write_greedily(model, prompts, titles, max_title_tokens + 1)
    return [written_title(ids, row, titles) for ids, row in zip(written, candidates.tolist(), strict=True)]


@torch.no_grad()
def write_greedily(
    model: SpeederForCausalLM, prompts: Sequence[TokenSequence], titles: TitleTokens, max_tokens: int
) -> list[list[int]]:
    """Continue each prompt greedily with text, up to a line end or `max_tokens`.

    Returns:
        each prompt's new token ids; ids after a line end are to be ignored.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].ids))  # prompts alike in length
    end, pad = titles.title_end, titles.tokenizer.pad_token_id
    pad = end if pad is None else pad
    with model.evaluating():
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            batch = pad_batch([prompts[row] for row in rows], pad)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            written = model.generate(
                batch["input_ids"],
                attention_mask=batch["attention_mask"],
                ranks=batch["ranks"],
                vocabulary="text",
                max_new_tokens=max_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=end,
                pad_token_id=pad,
            )[:, batch["input_ids"].shape[1] :]
            for row, ids in zip(rows, written.tolist(), strict=True):
                texts[row] = ids
    return texts


def written_title(ids: list[int], candidates: Sequence[int], titles: TitleTokens) -> str:
    """Written ids as text; a cut title of a candidate becomes the whole title."""
    end = titles.title_end
    line = ids[: ids.index(end) + 1] if end in ids else [*ids, end]
    shown = [int(item) for item in candidates if titles.title(int(item)) == line]
    if len(shown) == 1:
        return titles.catalogue.titles[shown[0]]
    return titles.tokenizer.decode(line, skip_special_tokens=True)
