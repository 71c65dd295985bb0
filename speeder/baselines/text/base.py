"""The base of the three text baselines: Speeder's backbone, which reads items as titles instead of tokens.

They use Speeder's packed forward pass, attention kernel, losses and trainer, without SPAE's tables. So they differ from
Speeder only in how an item is read and how an answer is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError
from speeder.model.config import SpeederConfig
from speeder.model.content import Kept
from speeder.model.loading import catalogue_folder, from_backbone, load_tokenizer
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.processor import HISTORY
from speeder.model.sequences import IGNORED, TokenSequence
from speeder.model.title_prompts import line_end, text_ids, title_rows
from speeder.recipes.templates import template_text

_PACK_TOKENS = 16_384  # tokens that run through the backbone at once


class TextBaselineConfig(SpeederConfig):
    """Configuration of a text baseline.

    Args:
        baseline: `text-prompt`, `title-generation` or `yes-no`.
        template: the prompt, with the baseline's fields in braces.
        max_title_tokens: longer titles are cut.
        num_candidates: candidates, with the target, in title generation's training examples.

    Raises:
        ValueError: an argument is out of its range.
    """

    model_type = "speeder-baseline"

    baseline: str = ""
    template: str = HISTORY
    max_title_tokens: int = 32
    num_candidates: int = 20

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.pair_weight:
            raise ValueError(f"pair_weight: expected 0 for a text baseline, got {self.pair_weight!r}")
        for name, least in (("max_title_tokens", 1), ("num_candidates", 2)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name}: expected an integer >= {least}, got {getattr(self, name)!r}")


class TextBaseline(SpeederForCausalLM):
    """A causal language model over titles. Subclasses define the prompt and the answer.

    Attributes:
        name: its name in recipes.
        label: its name in tables.
        fields: fields of the template, in order.
        usual_template: the prompt if the recipe has none.
    """

    config_class = TextBaselineConfig
    name: ClassVar[str]
    label: ClassVar[str]
    fields: ClassVar[tuple[str, ...]] = ("history",)
    usual_template: ClassVar[str] = HISTORY
    settings: ClassVar[dict] = {}

    def __init__(self, config: TextBaselineConfig):
        if config.baseline != self.name:
            raise SpeederError(f"expected a {self.name!r} baseline, got {config.baseline!r}")
        super().__init__(config)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._titles: Kept[list[list[int]]] = Kept()

    @classmethod
    def from_backbone(
        cls,
        name_or_model: str | Path | PreTrainedModel,
        catalogue: ItemCatalogue,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        template: str = HISTORY,
        **config,
    ):
        """Wrap a causal language model, as `SpeederForCausalLM.from_backbone` does.

        Args:
            tokenizer: the backbone's; by default the one in its folder.
            template: the prompt; `"{history}"` alone means `usual_template`.

        Raises:
            SpeederError: as there, or the template lacks a field of the baseline.
        """
        plain = dict(position_prompts=False, absolute_bias=False, relative_bias=False, modalities=[])
        template = cls.usual_template if template == HISTORY else template
        own = plain | cls.settings | {"baseline": cls.name, "template": template}
        model = from_backbone(cls, name_or_model, catalogue, **own | config)
        model.set_tokenizer(load_tokenizer(name_or_model) if tokenizer is None else tokenizer)
        return model

    # ---- titles and prompts ---------------------------------------------------------------------------------

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set the tokenizer, and tokenize the prompt's text and the titles.

        Raises:
            SpeederError: it has no token to end a title, or the template lacks a field.
        """
        self.tokenizer, self.title_end = tokenizer, line_end(tokenizer)
        try:
            pieces = template_text(self.config.template, self.fields)
        except ValueError as error:
            raise SpeederError(f"template: {error}") from error
        self.pieces = [text_ids(tokenizer, piece) for piece in pieces]

    def title(self, item: int) -> list[int]:
        """An item's title (or its id, without a title) as token ids, and a line end."""
        of = (self.tokenizer, self.catalogue, self.config.max_title_tokens)
        # the size tells of added tokens
        kept = self._titles.get((*of, len(self.tokenizer)), lambda: title_rows(*of))
        return list(kept[item])

    def lines(self, items: Sequence[int]) -> list[int]:
        """Titles, one per line; of a history, pass the newest `config.max_history` items."""
        return [token for item in items for token in self.title(item)]

    def set_catalogue(self, catalogue: ItemCatalogue) -> None:
        """Attach the catalogue whose titles are read."""
        self._catalogue = catalogue
        self.config.num_items = 0  # no item is a token: the vocabulary is the backbone's

    def gates(self, sample: int | None = None) -> dict[str, torch.Tensor]:
        """Empty: there is no gate."""
        return {}

    # ---- saving and loading ---------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> None:
        """Save weights, configuration, catalogue and tokenizer."""
        super().save_pretrained(save_directory, *args, **kwargs)
        self.tokenizer.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, catalogue: ItemCatalogue | None = None, **kwargs
    ):
        """Load a saved baseline; see `SpeederForCausalLM.from_pretrained`."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, catalogue=catalogue, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.catalogue is None:
            folder = catalogue_folder(pretrained_model_name_or_path)
            model.set_catalogue(ItemCatalogue.load(folder) if catalogue is None else catalogue)
        model.set_tokenizer(
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, trust_remote_code=False)
        )
        return loaded


def text_sequence(prompt: Sequence[int], answer: Sequence[int] = ()) -> TokenSequence:
    """A prompt, and in training its target text."""
    ids = [*prompt, *answer]
    return TokenSequence(ids, [-1] * len(ids), [IGNORED] * len(prompt) + list(answer))


def packs(sequences: Sequence[TokenSequence], tokens: int = _PACK_TOKENS) -> Iterator[list[TokenSequence]]:
    """Batches of sequences, in order, of at most `tokens` tokens each (but at least one sequence)."""
    pack, size = [], 0
    for sequence in sequences:
        if pack and size + len(sequence.ids) > tokens:
            yield pack
            pack, size = [], 0
        pack.append(sequence)
        size += len(sequence.ids)
    if pack:
        yield pack


AutoConfig.register("speeder-baseline", TextBaselineConfig)
