"""Texts to vectors by a language model's own words: the mean of its input embeddings over a text's tokens."""

import torch
from torch import Tensor
from torch.nn import functional

from speeder.model.loading import load_backbone, load_tokenizer
from speeder.prepare.encoders.cache import module_hash
from speeder.prepare.encoders.pretrained import tokenizer_identity


class BackboneWords:
    """The mean of a backbone's input embeddings over a text's tokens, scaled to length 1.

    An item's token stands among these same embeddings, and new tokens of a language model usually start as the mean
    of the words that name them. Last hidden states are another matter: a language model makes them to tell the next
    token, not to sum up a text. No layer is run and no special token is added, so order and length do not matter.

    Args:
        name: an asset (`"smollm2-135m"`), a folder or a Hub id of a causal language model.
        device: where the embeddings lie.

    Raises `SpeederError` where the backbone or its tokenizer cannot be had.
    """

    def __init__(self, name: str, device: str = "cpu"):
        self._tokenizer = load_tokenizer(name)
        embeddings = load_backbone(name).get_input_embeddings()  # the layers are let go again
        self._weight = embeddings.weight.detach().to(device)
        self.width = self._weight.shape[1]
        self.identity = f"words:{module_hash(embeddings)}:{tokenizer_identity(self._tokenizer)}"

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> list[Tensor | None]:
        """One `(width,)` row a text, None for one without tokens."""
        ids = self._tokenizer(texts, add_special_tokens=False, truncation=False)["input_ids"]
        counts = torch.tensor([len(row) for row in ids])
        words = torch.tensor([token for row in ids for token in row], dtype=torch.long)
        starts = counts.cumsum(0) - counts
        device = self._weight.device
        means = functional.embedding_bag(words.to(device), self._weight, starts.to(device), mode="mean")
        rows = functional.normalize(means, dim=1)
        return [row if count else None for row, count in zip(rows, counts.tolist(), strict=True)]
