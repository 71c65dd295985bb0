"""title-generation: the language model reads history and candidates as titles and writes one, as in LLaRA.

Only the prompt and the answer are LLaRA's; there are no item embeddings beside the titles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from speeder.baselines.text.base import text_sequence
from speeder.baselines.text.candidates import CandidateBaseline
from speeder.evaluation.written_titles import named_candidate
from speeder.model.sequences import TokenSequence
from speeder.model.title_prompts import training_candidates
from speeder.model.title_writer import written_titles


class TitleGeneration(CandidateBaseline):
    """Writes the title of one candidate, or any other text: validity is measured, not enforced."""

    name = "title-generation"
    label = "title generation"
    fields = ("history", "candidates")
    usual_template = "Chosen so far:\n{history}Candidates:\n{candidates}Chosen next:\n"

    def prompt(self, history: Sequence[int], candidates: Sequence[int]) -> list[int]:
        """History and candidates in the template, as token ids."""
        before, between, after = self.pieces
        return [*before, *self.lines(self._newest(history)), *between, *self.lines(candidates), *after]

    def training_examples(self, supervision: str) -> dict:
        """Arguments of `TrainingSequences` for this baseline's examples."""
        return {"example": self._example}

    def _example(self, window: list[int], number: int, whole: np.ndarray) -> TokenSequence:
        *history, target = window
        candidates = training_candidates(
            target, self.config.num_candidates, whole.tolist(), len(self.catalogue), number, 0, "training"
        )
        return text_sequence(self.prompt(history, candidates), self.title(target))

    def generate_titles(self, histories: Sequence[Sequence[int]], candidates: np.ndarray) -> list[str]:
        """Generate greedily, up to a line end.

        Args:
            histories: item indices, oldest first.
            candidates: `(n, C)` items, in the order of the prompt.

        Returns:
            `n` texts.
        """
        prompts = [
            text_sequence(self.prompt(history, row.tolist()))
            for history, row in zip(histories, candidates, strict=True)
        ]
        return written_titles(self, prompts, candidates, self, self.config.max_title_tokens)

    def target_places(
        self, histories: Sequence[np.ndarray], candidates: np.ndarray, targets: np.ndarray
    ) -> np.ndarray:
        """Rank 1 if the target's title was written, else the last rank."""
        ranks = []
        texts = self.generate_titles(histories, candidates)
        for text, row, target in zip(texts, candidates, targets, strict=True):
            place = named_candidate(text, [self.catalogue.titles[item] for item in row])
            ranks.append(1 if place is not None and row[place] == target else len(row))
        return np.array(ranks)
