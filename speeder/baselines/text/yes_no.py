"""yes-no: one prompt per candidate, whether it comes next, as in MLLM-MSR.

A candidate's score is the log-odds of "yes" against "no" after the prompt; it needs a pass over the whole history. Each
target gives one positive and one negative training example. Only the prompt is MLLM-MSR's: histories are titles, not
summaries, and there are no pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from speeder.baselines.text.base import packs, text_sequence
from speeder.baselines.text.candidates import CandidateBaseline
from speeder.errors import SpeederError
from speeder.evaluation.metrics import candidate_ranks
from speeder.model.sequences import TokenSequence, pack_batch
from speeder.model.title_prompts import text_ids

_ANSWERS = ((" yes", " no"), (" Yes", " No"), ("yes", "no"), ("Yes", "No"))


class YesNo(CandidateBaseline):
    """Scores candidates one by one."""

    name = "yes-no"
    label = "yes/no"
    fields = ("history", "candidate")
    usual_template = "Chosen so far:\n{history}Candidate:\n{candidate}Is it chosen next?"

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set the tokenizer, and find the first tokens of "yes" and "no".

        Raises:
            SpeederError: as the base class, or these tokens are the same.
        """
        super().set_tokenizer(tokenizer)
        for answers in _ANSWERS:
            ids = [text_ids(tokenizer, answer) for answer in answers]
            if all(ids) and ids[0][0] != ids[1][0]:
                self.yes, self.no = ids[0][0], ids[1][0]
                return
        raise SpeederError('tokenizer: expected different first tokens for "yes" and "no", found none')

    def prompt(self, history: Sequence[int], candidate: int) -> list[int]:
        """History and candidate in the template, as token ids."""
        before, between, after = self.pieces
        return [*before, *self.lines(self._newest(history)), *between, *self.title(candidate), *after]

    def training_examples(self, supervision: str) -> dict:
        """Arguments of `TrainingSequences` for this baseline's examples: each window's target, then one negative."""
        return {"example": self._example, "per_window": 2}

    def _example(self, window: list[int], number: int, whole: np.ndarray) -> TokenSequence:
        *history, target = window
        if number % 2 == 0:
            return text_sequence(self.prompt(history, target), [self.yes])
        negatives = self.training_negatives(number, 1, whole)
        if not negatives:
            raise SpeederError("training data: a user has all items, which leaves no negative")
        return text_sequence(self.prompt(history, negatives[0]), [self.no])

    @torch.no_grad()
    def score_candidates(self, histories: Sequence[Sequence[int]], candidates: np.ndarray) -> torch.Tensor:
        """The log-odds of "yes" for each candidate.

        Args:
            histories: item indices, oldest first.
            candidates: `(n, C)` items.

        Returns:
            `(n, C)` float32 on the CPU.
        """
        prompts = [
            text_sequence(self.prompt(history, item))
            for history, row in zip(histories, candidates, strict=True)
            for item in row.tolist()
        ]
        scores = []
        with self.evaluating():
            for pack in packs(prompts):
                batch = {name: tensor.to(self.device) for name, tensor in pack_batch(pack).items()}
                logits = self._text_logits(self.last_states(**batch))
                scores.append((logits[:, self.yes] - logits[:, self.no]).cpu())
        return torch.cat(scores).view(candidates.shape)

    def target_places(
        self, histories: Sequence[np.ndarray], candidates: np.ndarray, targets: np.ndarray
    ) -> np.ndarray:
        """Each target's rank by the scores, with ties against it."""
        return candidate_ranks(self.score_candidates(histories, candidates), candidates == targets[:, None])[
            0
        ]
