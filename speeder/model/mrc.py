"""MRC, Multimodal Representation Compression: an item's text, image and collaborative features become one token.

The paper names a Mixture of Modality Experts; its form here is this project's own reading. One expert per modality
(`experts.py`) maps its frozen features to the backbone's hidden size. A gate weights the experts of the modalities that
the item has. The weighted sum, RMS-normalised, is the item's token.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError
from speeder.model.config import FITTED, ITEM, WORDS, SpeederConfig
from speeder.model.content import hash_of
from speeder.model.experts import LinearExpert, MLPExpert, WordExpert
from speeder_kernels import compress_items

# A closed modality's gate logit is lowered by this much: its weight is e^-30 of an open one. An item with only closed
# modalities still gets a token, since the softmax ignores a common shift.
CLOSED = -30.0
PIECE = 1 << 16  # items that are compressed at once where the whole catalogue is, without gradients


class MRC(nn.Module):
    """The mixture of modality experts over a catalogue.

    Features are buffers that are not in the state dict: they belong to the catalogue, which is saved beside the
    weights. If training takes negatives from a part of the catalogue (`config.negatives`), features stay in the
    catalogue, memory-mapped, and rows are normalised as they are read.
    """

    def __init__(self, config: SpeederConfig):
        super().__init__()
        hidden = config.expert_hidden_size or config.hidden_size
        self.names = config.gate_names
        self.tokens_per_item = config.tokens_per_item
        self.modality_dropout, self.cold_dropout = config.modality_dropout, config.cold_dropout
        self.num_items = 0
        self.reads_rows = config.negatives != "full"
        self.catalogue: ItemCatalogue | None = None
        self.read_by: bytes | None = None  # `_fitted_hash` when it was set
        self.register_load_state_dict_post_hook(_read_again)
        kind = LinearExpert if config.experts == "linear" else MLPExpert
        self.equal_sizes = config.experts == "linear"  # experts are normalised before they are mixed
        self.experts = nn.ModuleDict(
            {
                name: kind(width, hidden, config.hidden_size, config.tokens_per_item)
                for name, width in config.modalities.items()
            }
        )
        if config.words:
            self.words = WordExpert(
                config.num_words,
                config.word_size,
                config.hidden_size,
                config.tokens_per_item,
                config.word_dropout,
            )
            self.word_gate = nn.Parameter(torch.zeros(()))
        self.gates = nn.ModuleDict({name: nn.Linear(width, 1) for name, width in config.modalities.items()})
        if config.item_embedding:
            self.item_embedding = nn.Embedding(
                config.num_warm_items, config.tokens_per_item * config.hidden_size
            )
            self.item_gate = nn.Parameter(torch.zeros(()))
            # rows that training has read or predicted; the others are as they began
            self.register_buffer("item_trained", torch.ones(config.num_warm_items, dtype=torch.bool))
        self.norm_weight = nn.Parameter(torch.ones(config.hidden_size))
        # what MPO moves from CLOSED to 0 as it opens a modality
        self.register_buffer("gate_offset", torch.zeros(len(self.names)))

    def fit(self, catalogue: ItemCatalogue, vocabulary: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Fit what experts keep of a new model's catalogue: the whitening of its features, and its words.

        Args:
            vocabulary: of the catalogue's texts (`fit_vocabulary`); None where words have no vectors.
        """
        for name, expert in self.experts.items():
            expert.fit(catalogue.features[name], catalogue.present[name])
        if vocabulary is not None:
            self.words.fit(*vocabulary, len(catalogue))

    def set_catalogue(self, catalogue: ItemCatalogue) -> None:
        """Set a catalogue's features, normalised once, its items' words, and its presence mask.

        Raises:
            SpeederError: a modality is missing or has another width, or an item has no modality.
        """
        device, dtype = self.norm_weight.device, self.norm_weight.dtype
        columns, buffers = [], {}
        for name, expert in self.experts.items():
            if name not in catalogue.features:
                raise SpeederError(
                    f"catalogue: expected the modality {name!r}, got {', '.join(catalogue.features) or 'none'}"
                )
            features = catalogue.features[name]
            if features.shape[1] != expert.num_features:
                raise SpeederError(
                    f"catalogue: expected features of width {expert.num_features} for {name!r}, "
                    f"got {features.shape[1]}"
                )
            if not self.reads_rows:
                here = expert.normalised(features, catalogue.present[name])
                buffers[f"features_{name}"] = here.to(device, dtype)
            columns.append(catalogue.present[name])
        read = self.words.read(catalogue.readable_texts()) if WORDS in self.names else {}
        if read:
            columns.append(read["starts"].diff() > 0)
        if ITEM in self.names:
            columns.append(torch.arange(len(catalogue)) < len(self.item_trained))
        present = torch.stack(columns, dim=1) if columns else torch.zeros(len(catalogue), 0, dtype=torch.bool)
        bare = (~present.any(dim=1)).nonzero().flatten().tolist()
        if bare:
            named = ", ".join(catalogue.ids[i] for i in bare[:3])
            raise SpeederError(
                f"catalogue: {len(bare)} item(s) have none of the modalities {', '.join(self.names)} "
                f"(for one: {named}); give them features or leave them out{_how(self.names)}"
            )
        buffers["present"] = present.to(device)
        for name, buffer in buffers.items():  # change nothing before everything is checked
            with torch.inference_mode(False):  # what inference mode makes cannot be used in training
                self.register_buffer(
                    name, buffer.clone() if buffer.is_inference() else buffer, persistent=False
                )
        if read:
            self.words.set_texts(read)
        self.num_items = len(catalogue)
        self.catalogue, self.read_by = catalogue, self._fitted_hash()

    def _fitted_hash(self) -> bytes | None:
        """What `fit` has found, by which features and words are read."""
        words = (
            [self.words.hashes, self.words.occurrences, self.words.num_texts] if WORDS in self.names else []
        )
        return hash_of(*self.experts.buffers(), *words)

    def _features(self, name: str, rows: torch.Tensor | None) -> torch.Tensor:
        """A modality's normalised features of some items, `(U, F)`."""
        if self.reads_rows:
            features, present = self.catalogue.features[name], self.catalogue.present[name]
            if rows is not None:
                rows = rows.to(features.device)
                features, present = features[rows], present[rows]
            features = self.experts[name].normalised(features, present)
            return features.to(self.norm_weight.device, self.norm_weight.dtype)
        features = getattr(self, f"features_{name}")
        return features if rows is None else features[rows]

    def presence(self) -> dict[str, torch.Tensor]:
        """Which items have each modality: name -> `(I,)` bool on the CPU."""
        return dict(zip(self.names, self._presence(None).cpu().unbind(dim=1), strict=True))

    def _presence(self, rows: torch.Tensor | None) -> torch.Tensor:
        """Which modalities count of some items, `(U, M)` bool. The learned embedding does not for items that training
        never met, unless they have nothing else."""
        present = self.present if rows is None else self.present[rows]
        if ITEM not in self.names:
            return present
        others, has_row = present[:, :-1], present[:, -1]
        places = torch.arange(self.num_items, device=present.device) if rows is None else rows
        trained = self.item_trained[places.clamp(max=len(self.item_trained) - 1)]
        return torch.cat([others, (has_row & (trained | ~others.any(dim=1)))[:, None]], dim=1)

    def forward(self, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Compress items.

        Args:
            rows: `(U,)` item indices; None takes the whole catalogue, `U = I`.

        Returns:
            tokens `(U, K, H)`, RMS-normalised and scaled by a learned weight, and gates `(U, M)` float32.

        Raises:
            SpeederError: no catalogue was set.
        """
        if self.num_items == 0:
            raise SpeederError("this model has no catalogue: load one, or give one to from_backbone")
        outputs, logits = [], []
        for name, expert in self.experts.items():
            features = self._features(name, rows)
            outputs.append(expert(features))
            logits.append(self.gates[name](features).squeeze(-1).float())
        present = self._presence(rows)
        if WORDS in self.names:
            outputs.append(self.words(rows))
            logits.append(self.word_gate.float().expand(len(present)))
        if self.equal_sizes:  # so that the gate's weights are what experts contribute
            outputs = [F.rms_norm(output, output.shape[-1:], eps=1e-6) for output in outputs]
        if ITEM in self.names:  # begins near zero, and counts for more as it learns
            warm = torch.arange(self.num_items, device=present.device) if rows is None else rows
            warm = warm.clamp(max=self.item_embedding.num_embeddings - 1)
            vectors = self.item_embedding(warm).unflatten(-1, (self.tokens_per_item, -1))
            outputs.append(vectors.to(outputs[0].dtype) if outputs else vectors)
            logits.append(self.item_gate.float().expand(len(warm)))
        if self.training:
            is_open = self.gate_offset > CLOSED / 2
            if self.modality_dropout:
                present = drop_modalities(present, self.modality_dropout, is_open)
            fitted = torch.tensor([name in FITTED for name in self.names], device=present.device)
            if self.cold_dropout and bool((fitted & is_open).any()):
                present = drop_fitted(present, self.cold_dropout, fitted, is_open)
        expert_outputs = torch.stack(outputs, dim=2)  # (U, K, M, H)
        gate_logits = torch.stack(logits, dim=1) + self.gate_offset.float()  # (U, M)
        k = self.tokens_per_item
        tokens, gates = compress_items(
            expert_outputs.flatten(0, 1),
            gate_logits.repeat_interleave(k, dim=0),
            present.repeat_interleave(k, dim=0),
            self.norm_weight.to(expert_outputs.dtype),
        )
        return tokens.unflatten(0, (-1, k)), gates.unflatten(0, (-1, k))[:, 0]

    def pieces(self, items: int = PIECE) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Compress the whole catalogue piece by piece, in order, without gradients."""
        with torch.no_grad():
            for rows in torch.arange(self.num_items, device=self.norm_weight.device).split(items):
                yield self(rows)

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Compress the whole catalogue; without gradients piece by piece, which needs little memory beyond the
        tokens."""
        if torch.is_grad_enabled() or self.num_items <= PIECE:
            return self()
        found: tuple[torch.Tensor, torch.Tensor] | None = None
        start = 0
        for piece in self.pieces():
            if found is None:
                found = tuple(part.new_empty(self.num_items, *part.shape[1:]) for part in piece)
            for whole, part in zip(found, piece, strict=True):
                whole[start : start + len(part)] = part
            start += len(piece[0])
        return found


def _read_again(mrc: MRC, _keys: object) -> None:
    """After `load_state_dict`: read the catalogue by the whitening and the vocabulary that were loaded."""
    if mrc.catalogue is not None and mrc._fitted_hash() != mrc.read_by:
        mrc.set_catalogue(mrc.catalogue)


def _how(names: list[str]) -> str:
    """How to leave out items that have none of these modalities."""
    content = " ".join(name for name in names if name in ("text", "image"))
    return f" (speeder prepare --require {content})" if content else ""


def drop_modalities(present: torch.Tensor, probability: float, is_open: torch.Tensor) -> torch.Tensor:
    """Drop each present modality of each item with the given probability, but never an item's last open one.

    Args:
        present: `(U, M)` bool.
        is_open: `(M,)` bool; an item must not depend only on untrained experts.
    """
    kept = present & (torch.rand(present.shape, device=present.device) >= probability)
    return torch.where((kept & is_open).any(dim=1, keepdim=True), kept, present)


def drop_fitted(
    present: torch.Tensor, probability: float, fitted: torch.Tensor, is_open: torch.Tensor
) -> torch.Tensor:
    """Read items as new ones with the given probability: without the modalities that are fitted on interactions.

    An item without any other open modality is not changed.

    Args:
        present: `(U, M)` bool.
        fitted: `(M,)` bool, fitted on interactions.
        is_open: `(M,)` bool, as in `drop_modalities`.
    """
    content = present & ~fitted
    as_new = torch.rand(len(present), 1, device=present.device) < probability
    return torch.where(as_new & (content & is_open).any(dim=1, keepdim=True), content, present)
