"""Texts to vectors, by all-MiniLM-L6-v2, any sentence-transformers or Hugging Face model, or a backbone's
embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from speeder.prepare.encoders.backbone import BackboneWords
from speeder.prepare.encoders.cache import FeatureCache, content_key, encode_cached
from speeder.prepare.encoders.sentence import SentenceModel

if TYPE_CHECKING:
    from speeder.io.parts import Runner

BACKBONE = "backbone:"


class TextEncoder:
    """One frozen text model.

    Args:
        name: `"minilm"`, a folder or a Hub id, for `SentenceModel`; or `"backbone:"` and one of these
            (`"backbone:smollm2-135m"`), for `BackboneWords`.
        device: the model's device.
        batch_size: texts per batch.
        runner: encodes the texts elsewhere, such as an `OnRay`, whose workers load the model too; None: in this
        process.

    Raises `SpeederError` if the model cannot be loaded.
    """

    def __init__(
        self,
        name: str = "minilm",
        *,
        device: str = "cpu",
        batch_size: int = 32,
        runner: "Runner | None" = None,
    ):
        if name.startswith(BACKBONE):
            self._model = BackboneWords(name.removeprefix(BACKBONE), device)
        else:
            self._model = SentenceModel(name, device)
        self.name, self.batch_size, self.runner = name, batch_size, runner
        self.width = self._model.width
        self.identity = f"text-2:{content_key(self._model.identity)}"

    def encode(
        self, texts: Sequence[str], *, cache: str | Path | None = None, progress: bool = True
    ) -> tuple[Tensor, Tensor]:
        """`N` texts -> `(N, width)` float32, and `(N,)` bool: texts that are not empty.

        Empty texts (and those of spaces alone) are absent, with zeros. `cache` is a folder; None is the
        user's cache.
        """
        texts = [text.strip() for text in texts]
        keys = [content_key(text) if text else None for text in texts]
        costs, description = [len(text) for text in texts], f"texts ({self.name})"
        store = FeatureCache(self.identity, cache)
        if self.runner is not None:
            from speeder.prepare.encoders.in_parts import encode_in_parts

            encode_in_parts(self, store, texts, keys, costs, self.runner, description)
        return encode_cached(
            store,
            keys,
            costs,
            lambda positions: self.compute([texts[position] for position in positions]),
            width=self.width,
            batch_size=self.batch_size,
            description=description,
            progress=progress,
        )

    def compute(self, texts: list[str]) -> list[Tensor | None]:
        """One batch of texts that are not empty: a `(width,)` row each; None if a text has no tokens."""
        return self._model(texts)
