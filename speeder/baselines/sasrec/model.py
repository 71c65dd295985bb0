"""SASRec trained with cross-entropy over the whole catalogue: the sequential baseline, tuned to be strong.

A causal pre-norm transformer over item embeddings with learned positions; scores are dot products with the same item
embeddings. The architecture is that of Kang and McAuley (2018, arXiv 1808.09781). The full softmax in place of its
sampled binary loss makes it a strong baseline (Klenitskiy and Vasilev 2023, arXiv 2309.07602).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from speeder.data.item_indices import item_array
from speeder.errors import SpeederError
from speeder.io.files import read_json
from speeder.io.tensors import load_tensors, save_tensors
from speeder.recipes.sasrec import SASRecConfig


class SASRec(nn.Module):
    """The model. ``fit_sasrec`` makes a trained one.

    Attributes:
        label: the name of its row in tables.
        training_hash: hash of what it was fitted on, for the leak check; None if ``fit_sasrec`` did not fit it.
    """

    label = "SASRec (cross-entropy)"

    def __init__(self, num_items: int, config: SASRecConfig | None = None) -> None:
        super().__init__()
        if num_items < 1:
            raise ValueError(f"num_items: expected at least 1, got {num_items}")
        config = config or SASRecConfig()
        self.num_items, self.config = num_items, config
        self.training_hash: str | None = None
        self.items = nn.Embedding(num_items, config.hidden_size)
        self.positions = nn.Embedding(config.max_length, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        for embedding in (self.items, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, items_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Items (B, L) int64, padded on the right with any item -> hidden states (B, L, hidden_size).

        Attention is causal, so padding on the right does not affect a position. Positions count from a sequence's end,
        so the predicting position is always one that occurs in training, even if histories have become longer.
        """
        steps_L = torch.arange(items_BL.shape[1], device=items_BL.device)
        from_end_BL = (lengths_B[:, None] - 1 - steps_L).clamp_min(0)
        # as in the paper's code: else the blocks' outputs drown the items
        scale = self.config.hidden_size**0.5
        hidden = self.dropout(self.items(items_BL) * scale + self.positions(from_end_BL))
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)

    @torch.inference_mode()
    def score(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Histories of item indices, oldest first -> (n, I) float32 scores on the CPU.

        Raises:
            ValueError: an empty history.
            TypeError: an item is not an integer.
            IndexError: an item outside the catalogue.
        """
        if not len(histories):
            return torch.empty(0, self.num_items)
        device = self.items.weight.device
        tails = [item_array("histories", history)[-self.config.max_length :] for history in histories]
        check_sequences("histories", tails, self.num_items)
        lengths = torch.tensor([len(tail) for tail in tails], device=device)
        if not lengths.all():
            raise ValueError(
                f"histories: expected at least one item each, number {int(lengths.argmin())} is empty"
            )
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            hidden = self(pad(tails).to(device), lengths)
        finally:
            for module, mode in modes:
                module.training = mode
        last = hidden[torch.arange(len(tails), device=device), lengths - 1]
        return (last @ self.items.weight.T).float().cpu()

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``model.safetensors`` and ``config.json`` into a folder, each atomically.

        The configuration has the weights' SHA-256, so that an interrupted save is noticed on loading.
        """
        folder = Path(folder)
        weights = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        config = {
            "num_items": self.num_items,
            "training_hash": self.training_hash,
            "config": asdict(self.config),
        }
        save_tensors(folder, weights, config, "weights")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> SASRec:
        """Read what ``save`` wrote, in evaluation mode on the CPU.

        Raises:
            SpeederError: a file is missing or damaged, or the two do not belong together.
        """
        folder = Path(folder)
        saved = read_json(folder / "config.json")
        try:
            weights = load_tensors(folder, saved["weights"])
            model = cls(saved["num_items"], SASRecConfig(**saved["config"]))
            model.load_state_dict(weights)
            model.training_hash = saved["training_hash"]
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise SpeederError(f"{folder}: not a saved SASRec: {error}") from error
        return model.eval()


class _Block(nn.Module):
    """Pre-norm causal attention and a GELU feed-forward layer, each with a residual connection."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm, self.forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        batch, length, _ = x_BLC.shape
        qkv = self.qkv(self.attention_norm(x_BLC)).view(batch, length, 3, self.heads, -1)
        q_BHLD, k_BHLD, v_BHLD = qkv.permute(2, 0, 3, 1, 4)
        # No dropout inside the attention: it would cost the fused kernel.
        mixed_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, is_causal=True)
        x_BLC = x_BLC + self._drop(self.out(mixed_BHLD.transpose(1, 2).flatten(2)))
        return x_BLC + self._drop(self.down(F.gelu(self.up(self.forward_norm(x_BLC)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def pad(sequences: Sequence[np.ndarray]) -> Tensor:
    """Sequences of items -> (n, longest) int64, padded on the right with item 0, which nothing reads."""
    return nn.utils.rnn.pad_sequence([torch.from_numpy(sequence) for sequence in sequences], batch_first=True)


def check_sequences(name: str, sequences: Sequence[np.ndarray], num_items: int) -> None:
    """Raise IndexError unless every item of every sequence lies in ``0..num_items-1``."""
    for number, sequence in enumerate(sequences):
        if len(sequence) and not 0 <= sequence.min() <= sequence.max() < num_items:
            raise IndexError(
                f"{name}: expected items in 0..{num_items - 1}, "
                f"number {number} has {sequence.min()}..{sequence.max()}"
            )
