"""Texts to vectors by a language model's input embeddings: their mean over a text's tokens."""

import torch
from torch import Tensor
from torch.nn import functional

from speeder.model.loading import load_backbone, load_tokenizer
from speeder.prepare.encoders.cache import module_hash
from speeder.prepare.encoders.pretrained import tokenizer_identity


class BackboneWords:
    """The mean of a backbone's input embeddings over a text's tokens, scaled to length 1.

    Item tokens are used together with these embeddings, and new tokens of a language model usually start as the mean
    of the words that name them. Last hidden states serve another purpose: they predict the next token, and do not
    summarise a text. No layer is run and no special token is added, so order and length do not matter.

    Args:
        name: an asset (`"smollm2-135m"`), a folder or a Hub id of a causal language model.
        device: device of the embeddings.

    Raises `SpeederError` if the backbone or its tokenizer cannot be loaded.
    """

    def __init__(self, name: str, device: str = "cpu"):
        self._tokenizer = load_tokenizer(name)
        embeddings = load_backbone(name).get_input_embeddings()  # the layers are freed
        self._weight = embeddings.weight.detach().to(device)
        self.width = self._weight.shape[1]
        self.identity = f"words:{module_hash(embeddings)}:{tokenizer_identity(self._tokenizer)}"

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> list[Tensor | None]:
        """One `(width,)` row per text; None for a text without tokens."""
        ids = self._tokenizer(texts, add_special_tokens=False, truncation=False)["input_ids"]
        counts = torch.tensor([len(row) for row in ids])
        words = torch.tensor([token for row in ids for token in row], dtype=torch.long)
        starts = counts.cumsum(0) - counts
        device = self._weight.device
        means = functional.embedding_bag(words.to(device), self._weight, starts.to(device), mode="mean")
        rows = functional.normalize(means, dim=1)
        return [row if count else None for row, count in zip(rows, counts.tolist(), strict=True)]
