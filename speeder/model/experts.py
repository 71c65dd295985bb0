"""MRC's experts: what one modality of an item becomes in the backbone's hidden size.

`MLPExpert` reads features, each item's normalised to mean 0 and variance 1. `LinearExpert` reads whitened features and
begins as a rotation, so that items that are alike for the encoder are alike as tokens from the first step on; what an
MLP makes of them is added as it is learned. `WordExpert` has a learned vector for every word and word pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from speeder.model.whitening import Whitening
from speeder.model.words import count_words


class MLPExpert(nn.Module):
    """`(U, F) -> (U, K, H)`: Linear - GELU - Linear."""

    def __init__(self, features: int, hidden: int, outputs: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.up = nn.Linear(features, hidden)
        self.down = nn.Linear(hidden, tokens * outputs)

    @property
    def num_features(self) -> int:
        """`F`."""
        return self.up.in_features

    def fit(self, features: torch.Tensor, present: torch.Tensor) -> None:
        """Nothing is fitted."""

    def normalised(self, features: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """`(U, F)` float32 features with mean 0 and variance 1 in each row."""
        return F.layer_norm(features.float(), features.shape[1:])

    def forward(self, features_UF: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(features_UF))).unflatten(-1, (self.tokens, -1))


class KeptWhitening(nn.Module):
    """A whitening among a model's weights: `mean (F,)` and `matrix (F, F)`, float32 whatever the model's dtype, since
    they tell small differences apart."""

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float32))
        self.register_buffer("matrix", torch.eye(features, dtype=torch.float32))

    def _apply(self, fn: Callable, *args, **kwargs) -> KeptWhitening:
        kept = self.mean, self.matrix
        super()._apply(fn, *args, **kwargs)
        if not any(part.is_meta for part in kept):
            self.mean, self.matrix = (part.to(self.mean.device) for part in kept)
        return self

    @torch.no_grad()
    def fit(self, features: torch.Tensor, present: torch.Tensor) -> None:
        """Fit on `(I, F)` features of the `(I,)` items that have them."""
        whitening = Whitening.fit(features, present)
        self.mean.copy_(whitening.mean)
        self.matrix.copy_(whitening.matrix)

    def forward(self, features: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """`(U, F)` float32 whitened features, of mean square 1 in each row; zeros where absent."""
        parts = (part.to(features.device, torch.float64) for part in (self.mean, self.matrix))
        return Whitening(*parts)(features, present) * features.shape[1] ** 0.5


class LinearExpert(nn.Module):
    """`(U, F)` whitened features -> `(U, K, H)`: a linear map, plus an MLP that begins at zero.

    The whitening is fitted once, on the features of the catalogue that a new model gets, and saved with the weights. So
    items that are added later are whitened as the others were.
    """

    def __init__(self, features: int, hidden: int, outputs: int, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.direct = nn.Linear(features, tokens * outputs, bias=False)
        self.up = nn.Linear(features, hidden)
        self.down = nn.Linear(hidden, tokens * outputs)
        self.whitening = KeptWhitening(features)

    @property
    def num_features(self) -> int:
        """`F`."""
        return self.direct.in_features

    def fit(self, features: torch.Tensor, present: torch.Tensor) -> None:
        """Fit the whitening: `(I, F)` features of the `(I,)` items that have them."""
        self.whitening.fit(features, present)

    def normalised(self, features: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """`(U, F)` float32 whitened features, of mean square 1 in each row; zeros where absent."""
        return self.whitening(features, present)

    def forward(self, features_UF: torch.Tensor) -> torch.Tensor:
        out = self.direct(features_UF) + self.down(F.gelu(self.up(features_UF)))
        return out.unflatten(-1, (self.tokens, -1))


class WordExpert(nn.Module):
    """Items' words -> `(U, K, H)`: learned vectors of words and word pairs, summed by TF-IDF weights, and a linear map.

    The weights of an item's words are `(1 + log count) * (1 + log((1 + n) / (1 + n_word)))`, divided by their length
    (Salton and Buckley 1988), `n` being the number of items. The vectors begin at random: their sums are then as alike
    as TF-IDF rows are (a random projection).

    Args:
        words: number of words, `V`.
        width: of a word's vector.
        dropout: probability, in training, that a word is left out of all items.
    """

    def __init__(self, words: int, width: int, outputs: int, tokens: int, dropout: float):
        super().__init__()
        self.tokens, self.dropout = tokens, dropout
        self.vectors = nn.Embedding(words, width)
        self.direct = nn.Linear(width, tokens * outputs, bias=False)
        self.register_buffer("hashes", torch.arange(words))
        self.register_buffer("occurrences", torch.ones(words, dtype=torch.long))
        self.register_buffer("num_texts", torch.ones((), dtype=torch.long))

    @torch.no_grad()
    def fit(self, hashes: np.ndarray, occurrences: np.ndarray, num_texts: int) -> None:
        """Take the words of so many texts, as `fit_vocabulary` finds them: two times `(V,)` int64."""
        self.hashes.copy_(torch.from_numpy(hashes))
        self.occurrences.copy_(torch.from_numpy(occurrences))
        self.num_texts.fill_(num_texts)

    def read(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The words of `I` texts: `ids (N,)`, `weights (N,)` float32 and `starts (I + 1,)`, for `set_texts`."""
        ids, counts, starts = count_words(texts, self.hashes.cpu().numpy())
        idf = 1 + np.log((1 + int(self.num_texts)) / (1 + self.occurrences.cpu().numpy()))
        weights = (1 + np.log(counts)) * idf[ids]
        of_text = np.repeat(np.arange(len(texts)), np.diff(starts))
        lengths = np.sqrt(np.bincount(of_text, weights**2, minlength=len(texts)))
        weights /= lengths[of_text]
        return {
            "ids": torch.from_numpy(ids),
            "weights": torch.from_numpy(weights.astype(np.float32)),
            "starts": torch.from_numpy(starts),
        }

    def set_texts(self, read: dict[str, torch.Tensor]) -> None:
        """Take what `read` has found as the items' words."""
        device = self.vectors.weight.device
        for name, column in read.items():
            with torch.inference_mode(False):  # what inference mode makes cannot be used in training
                self.register_buffer(f"item_{name}", column.to(device).clone(), persistent=False)

    def sums(self, rows: torch.Tensor | None) -> torch.Tensor:
        """The weighted sums of items' word vectors, `(U, width)` float32; zeros without words."""
        ids, weights, starts = self.item_ids, self.item_weights, self.item_starts
        offsets = starts[:-1]
        if rows is not None:
            lengths = starts.diff()[rows]
            offsets = lengths.cumsum(0) - lengths
            within = torch.arange(int(lengths.sum()), device=ids.device) - offsets.repeat_interleave(lengths)
            places = starts[rows].repeat_interleave(lengths) + within
            ids, weights = ids[places], weights[places]
        weights = weights.to(self.vectors.weight.dtype)
        if self.training and self.dropout:
            kept = torch.rand(self.vectors.num_embeddings, device=ids.device) >= self.dropout
            weights = weights * kept[ids] / (1 - self.dropout)
        return F.embedding_bag(ids, self.vectors.weight, offsets, mode="sum", per_sample_weights=weights)

    def forward(self, rows: torch.Tensor | None) -> torch.Tensor:
        return self.direct(self.sums(rows)).unflatten(-1, (self.tokens, -1))
