"""title-generation: the language model reads history and candidates as titles and writes one, as LLaRA's does.

Only the way of asking and answering is LLaRA's; it has no item embeddings beside the titles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from speeder.baselines.candidate_model import CandidateBaseline
from speeder.baselines.text_model import text_sequence
from speeder.evaluation.candidates import draw_items
from speeder.evaluation.titles import named_candidate
from speeder.prompts import TokenSequence, pad_batch

_BATCH = 16  # prompts that are continued at once


class TitleGeneration(CandidateBaseline):
    """Writes the title of one of the candidates, or whatever else it comes to: validity is measured, not enforced."""

    name = "title-generation"
    label = "title generation"
    fields = ("history", "candidates")
    usual_template = "Chosen so far:\n{history}Candidates:\n{candidates}Chosen next:\n"

    def prompt(self, history: Sequence[int], candidates: Sequence[int]) -> list[int]:
        """History and candidates in the template, as token ids."""
        before, between, after = self.pieces
        return [*before, *self.lines(self._newest(history)), *between, *self.lines(candidates), *after]

    def training_examples(self, supervision: str) -> dict:
        """How `TrainingSequences` makes examples of windows."""
        return {"example": self._example}

    def _example(self, window: list[int], number: int, whole: np.ndarray) -> TokenSequence:
        *history, target = window
        candidates = self.training_negatives(number, self.config.num_candidates - 1, whole)
        # any place for the target: it must say nothing
        place = draw_items(0, "training place", number, 1, len(candidates) + 1, ())[0]
        candidates.insert(place, target)
        return text_sequence(self.prompt(history, candidates), self.title(target))

    @torch.no_grad()
    def generate_titles(self, histories: Sequence[Sequence[int]], candidates: np.ndarray) -> list[str]:
        """Let the model write, greedily, up to a line's end.

        Args:
            histories: item indices, oldest first.
            candidates: `(n, C)` items, in the order in which the prompt lists them.

        Returns:
            `n` texts.
        """
        prompts = [
            text_sequence(self.prompt(history, row.tolist()))
            for history, row in zip(histories, candidates, strict=True)
        ]
        texts = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].ids))  # prompts alike in length
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.title_end
        with self.evaluating():
            for start in range(0, len(order), _BATCH):
                rows = order[start : start + _BATCH]
                batch = pad_batch([prompts[row] for row in rows], pad)
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                written = self.generate(
                    batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    vocabulary="text",
                    max_new_tokens=self.config.max_title_tokens + 1,
                    do_sample=False,
                    num_beams=1,
                    eos_token_id=self.title_end,
                    pad_token_id=pad,
                )[:, batch["input_ids"].shape[1] :]
                for row, ids in zip(rows, written.tolist(), strict=True):
                    texts[row] = self._text(ids, candidates[row].tolist())
        return texts

    def _text(self, ids: list[int], candidates: list[int]) -> str:
        """Written ids as text; a title that the prompt had to cut counts as written whole, if it is one candidate's."""
        line = ids[: ids.index(self.title_end) + 1] if self.title_end in ids else [*ids, self.title_end]
        shown = [item for item in candidates if self.title(item) == line]
        if len(shown) == 1:
            return self.catalogue.titles[shown[0]]
        return self.tokenizer.decode(line, skip_special_tokens=True)

    def target_places(
        self, histories: Sequence[np.ndarray], candidates: np.ndarray, targets: np.ndarray
    ) -> np.ndarray:
        """1 where the target's title was written, else the last place."""
        ranks = []
        texts = self.generate_titles(histories, candidates)
        for text, row, target in zip(texts, candidates, targets, strict=True):
            place = named_candidate(text, [self.catalogue.titles[item] for item in row])
            ranks.append(1 if place is not None and row[place] == target else len(row))
        return np.array(ranks)
