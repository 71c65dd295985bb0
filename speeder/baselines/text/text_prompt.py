"""text-prompt: the history's titles as text, one forward pass, and a head over a learned table of items.

The strong and efficient alternative to item tokens. It reads titles, packed without padding, through the same kernels,
and scores the whole catalogue by the same head and loss. It learns from every item of a window in one pass: the state
at the end of each title predicts the next item. Only its input is longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import numpy as np

from speeder.baselines.text.base import TextBaseline
from speeder.data.catalogue import ItemCatalogue
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.sequences import IGNORED, TokenSequence


class TextPrompt(TextBaseline):
    """Ranks the catalogue by the final state's dot products with one learned vector per item."""

    name = "text-prompt"
    label = "text prompt"
    settings: ClassVar[dict] = {"item_embedding": True}

    def set_catalogue(self, catalogue: ItemCatalogue) -> None:
        """Attach the catalogue; every item needs its row of the learned table.

        Raises:
            SpeederError: it has more items than the table has rows.
        """
        SpeederForCausalLM.set_catalogue(self, catalogue)

    gates = SpeederForCausalLM.gates

    @property
    def shared_prefix(self) -> list[int]:
        """The instruction's text before the history."""
        return self.pieces[0]

    def sequence(
        self, history: Sequence[int], target: int | None = None, supervision: str = "all"
    ) -> TokenSequence:
        """Titles of the newest `config.max_history` items within the prompt.

        A label is one token after the predicting state, as in any causal LM: at the first token of the next title. For
        the target it is at one more line end, the only token that the target costs.
        """
        before, after = self.pieces
        ids, labels = list(before), [IGNORED] * len(before)
        for place, item in enumerate(list(history)[-self.config.max_history :]):
            title = self.title(item)
            asked = place > 0 and supervision == "all"
            ids += title
            labels += [self.config.text_vocab_size + item if asked else IGNORED] + [IGNORED] * (
                len(title) - 1
            )
        ids += after
        labels += [IGNORED] * len(after)
        if target is not None:
            ids.append(self.title_end)
            labels.append(self.config.text_vocab_size + target)
        return TokenSequence(ids, [-1] * len(ids), labels)

    def training_examples(self, supervision: str) -> dict:
        """Arguments of `TrainingSequences` for this baseline's examples."""
        return {"example": partial(self._example, supervision)}

    def _example(self, supervision: str, window: list[int], number: int, whole: np.ndarray) -> TokenSequence:
        return self.sequence(window[:-1], window[-1], supervision)
