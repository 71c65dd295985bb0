"""Texts to unit vectors, by all-MiniLM-L6-v2 or any Hugging Face encoder."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from speeder.assets import resolve
from speeder.encoders.cache import FeatureCache, content_key, encode_cached, module_hash
from speeder.errors import SpeederError

_DEFAULT_MAX_TOKENS = 256


class TextEncoder:
    """Mean of the last hidden states over a text's tokens, scaled to length 1.

    A folder in sentence-transformers' layout may ask for its first token instead (`1_Pooling/config.json`)
    and limit the tokens read (`sentence_bert_config.json`); anything else is read up to 256 tokens.

    Args:
        name: `"minilm"`, a folder, or a Hub id.
        device: where the model runs.
        batch_size: texts at a time.

    Raises `SpeederError` where the model cannot be had.
    """

    def __init__(self, name: str = "minilm", *, device: str = "cpu", batch_size: int = 32):
        folder = resolve(name, "text")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            self._model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise SpeederError(f"the text encoder {name!r} cannot be loaded: {reason}") from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.name, self.batch_size = name, batch_size
        self.width: int = self._model.config.get_text_config().hidden_size
        self._first_token = bool(_setting(folder, "1_Pooling/config.json", "pooling_mode_cls_token", False))
        limit = _setting(folder, "sentence_bert_config.json", "max_seq_length", _DEFAULT_MAX_TOKENS)
        self._max_tokens = min(limit, self._tokenizer.model_max_length)
        pooling = "first" if self._first_token else "mean"
        self.identity = f"text-1:{pooling}:{self._max_tokens}:{module_hash(self._model)}"

    def encode(
        self, texts: Sequence[str], *, cache: str | Path | None = None, progress: bool = True
    ) -> tuple[Tensor, Tensor]:
        """`N` texts -> `(N, width)` float32 rows of length 1, and `(N,)` bool: texts that are not empty.

        Empty texts (and those of spaces alone) are absent, with zeros. `cache` is a folder; None is the
        user's cache.
        """
        texts = [text.strip() for text in texts]
        return encode_cached(
            FeatureCache(self.identity, cache),
            [content_key(text) if text else None for text in texts],
            [len(text) for text in texts],
            lambda positions: self._compute([texts[position] for position in positions]),
            width=self.width,
            batch_size=self.batch_size,
            description=f"texts ({self.name})",
            progress=progress,
        )

    @torch.inference_mode()
    def _compute(self, texts: list[str]) -> list[Tensor]:
        batch = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        )
        batch = batch.to(self._model.device)
        hidden = self._model(**batch).last_hidden_state
        if self._first_token:
            pooled = hidden[:, 0]
        else:
            mask = batch["attention_mask"][:, :, None].to(hidden.dtype)
            pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return list(torch.nn.functional.normalize(pooled, dim=1))


def _setting(folder: str, file: str, key: str, default: object) -> object:
    path = Path(folder) / file
    return json.loads(path.read_text(encoding="utf-8")).get(key, default) if path.is_file() else default
