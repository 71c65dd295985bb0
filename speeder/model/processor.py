"""SpeederProcessor: from users' histories to model inputs and from ids back to titles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoProcessor, AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from speeder.data.catalogue import ItemCatalogue, saved_hash
from speeder.errors import SpeederError
from speeder.model.config import SpeederConfig
from speeder.model.loading import CATALOGUE_FOLDER, catalogue_folder
from speeder.model.sequences import build_sequence, pack_batch, pad_batch

HISTORY = "{history}"


def template_ids(tokenizer: PreTrainedTokenizerBase | None, template: str) -> tuple[list[int], list[int]]:
    """The token ids before and after the history in a prompt template.

    Args:
        template: text with `{history}` once, such as `"The user watched {history} and then"`.

    Raises:
        ValueError: `{history}` is not in it exactly once, or there is text and no tokenizer.
    """
    if template.count(HISTORY) != 1:
        raise ValueError(f"template: expected {HISTORY} exactly once, got {template!r}")
    before, after = template.split(HISTORY)
    if not before and not after:
        return [], []
    if tokenizer is None:
        raise ValueError(f"template: text around {HISTORY} needs a tokenizer, got None")
    return tuple(
        tokenizer(part, add_special_tokens=False)["input_ids"] if part else [] for part in (before, after)
    )


class SpeederProcessor(ProcessorMixin):
    """Tokenizer, catalogue and prompt of a recommender in one object.

    Args:
        tokenizer: the backbone's.
        config: the model's configuration: prompt, history length, vocabulary.
        catalogue: the items.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: SpeederConfig,
        catalogue: ItemCatalogue,
    ):
        super().__init__(tokenizer)
        self.config, self.catalogue = config, catalogue

    def __call__(
        self,
        histories: Sequence[Sequence[int | str]],
        targets: Sequence[int | str] | None = None,
        *,
        packed: bool = False,
        supervision: str = "all",
        padding_side: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Turn histories into model inputs.

        Args:
            histories: item indices (int) or ids (str), oldest first.
            targets: each history's next item; then there are `labels` too.
            packed: one row with `cu_seqlens` instead of a padded batch.
            supervision: `"all"` or `"last"`, see `build_sequence`.
            padding_side: `"left"` (default without targets, as `generate` wants) or `"right"`.

        Returns:
            `input_ids`, `ranks`, `attention_mask` or `cu_seqlens`, with targets `labels`: tensors for the model.

        Raises:
            ValueError: there is no history, or the numbers differ. KeyError: an unknown id.
        """
        if targets is not None and len(targets) != len(histories):
            raise ValueError(f"targets: expected {len(histories)}, one a history, got {len(targets)}")
        indexed = [self.catalogue.indices_of(history) for history in histories]
        wanted = [None] * len(indexed) if targets is None else self.catalogue.indices_of(targets)
        pairs = zip(indexed, wanted, strict=True)
        sequences = [build_sequence(history, self.config, target, supervision) for history, target in pairs]
        with_labels = targets is not None
        if packed:
            return BatchFeature(pack_batch(sequences, with_labels))
        side = padding_side or ("right" if with_labels else "left")
        return BatchFeature(pad_batch(sequences, self.tokenizer.pad_token_id or 0, side, with_labels))

    def batch_decode(self, sequences: torch.Tensor | Sequence[Sequence[int]], **kwargs) -> list[str]:
        """Ids of the extended vocabulary to text; an item is its title (or its id) in angle brackets."""
        return [self.decode(sequence, **kwargs) for sequence in sequences]

    def decode(self, token_ids: torch.Tensor | Sequence[int], **kwargs) -> str:
        """One sequence of ids to text; see `batch_decode`."""
        first, pieces, text = self.config.text_vocab_size, [], []
        for token in [*map(int, token_ids), None]:
            if token is not None and token < first:
                text.append(token)
                continue
            if text:
                pieces.append(self.tokenizer.decode(text, **kwargs))
                text = []
            if token is not None:
                pieces.append(
                    f"<{self.catalogue.titles[token - first] or self.catalogue.ids[token - first]}>"
                )
        return " ".join(pieces)

    def to_dict(self) -> dict:
        """The content of `processor_config.json`; configuration and catalogue have their own files."""
        return {"processor_class": type(self).__name__}

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> None:
        """Save the tokenizer, the configuration and the catalogue."""
        self.catalogue.save(Path(save_directory) / CATALOGUE_FOLDER)
        self.config.catalogue_hash = saved_hash(Path(save_directory) / CATALOGUE_FOLDER)
        self.config.save_pretrained(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> SpeederProcessor:
        """Load the processor of a saved recommender, from a folder or the Hub.

        Raises:
            SpeederError: the tokenizer needs its own code, which is not run; or the catalogue is damaged.
        """
        kwargs["trust_remote_code"] = False  # None would ask on the terminal
        try:
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        except ValueError as error:
            raise SpeederError(
                f"{pretrained_model_name_or_path}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}"
            ) from error
        config = SpeederConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(
            tokenizer, config, ItemCatalogue.load(catalogue_folder(pretrained_model_name_or_path, **kwargs))
        )


AutoProcessor.register(SpeederConfig, SpeederProcessor)
