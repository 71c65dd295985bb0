"""Neighbours: which items follow each other, and whose texts and pictures are alike. Nothing is trained.

An item's score is the weighted sum of parts. Each part has a row of likeness per item, and adds the rows of the
history's newest items, each newer one counting more:

- item pairs: how often two items are near each other in a training history, divided by the roots of their own counts;
- one for each modality of contents: the cosine of whitened features (`speeder.model.whitening`).

A row's entries are at most about 1 in every part, so parts are added as they are. `fit_neighbours` makes one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from scipy.sparse import csr_array
from torch import Tensor

from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError
from speeder.io.files import read_json
from speeder.io.tensors import load_tensors, save_tensors
from speeder.model.item_pairs import ARRAYS, recent_items
from speeder.model.whitening import Whitening
from speeder.recipes.neighbours import NeighboursConfig

ITEM_PAIRS = "item pairs"  # a modality's name has no space


@dataclass(frozen=True)
class Content:
    """One modality.

    Attributes:
        whitening: fitted on the catalogue's own features.
        rows: `(I, F)` float32, whitened, of length 1 or zeros.
    """

    whitening: Whitening
    rows: Tensor


class Neighbours:
    """The recommender.

    Attributes:
        label: the name of its row in tables.
        pairs: `(I, I)` sparse float32; row i has what item i of a history gives to every item.
        contents: modality -> `Content`.
        weights: `ITEM_PAIRS` and modalities -> weight.
        training_hash: hash of what it was fitted on, for the leak check.
        features_hashes: modality -> hash of the features that it was fitted on, for the leak check.
        split_hash: hash of the split whose validation items chose the weights.
    """

    label = "neighbours"

    def __init__(
        self,
        config: NeighboursConfig,
        pairs: csr_array,
        contents: Mapping[str, Content],
        weights: Mapping[str, float],
        *,
        training_hash: str,
        features_hashes: Mapping[str, str],
        split_hash: str,
    ) -> None:
        names = {ITEM_PAIRS, *contents}
        if set(weights) != names:
            raise ValueError(f"weights: expected one for each of {sorted(names)}, got {sorted(weights)}")
        if pairs.shape[0] != pairs.shape[1]:
            raise ValueError(f"pairs: expected (I, I), got {pairs.shape}")
        for name, content in contents.items():
            if len(content.rows) != pairs.shape[0]:
                raise ValueError(f"{name}: expected {pairs.shape[0]} rows, got {len(content.rows)}")
        self.config, self.pairs = config, pairs
        self.contents, self.weights = dict(contents), dict(weights)
        self.training_hash, self.split_hash = training_hash, split_hash
        self.features_hashes = dict(features_hashes)

    @property
    def num_items(self) -> int:
        """`I`."""
        return self.pairs.shape[0]

    def score(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """Histories of item indices, oldest first -> `(n, I)` float32; an empty history gives zeros.

        Raises:
            TypeError: an item is not an integer.
            IndexError: an item outside the catalogue.
        """
        used = [name for name, weight in self.weights.items() if weight]
        return self.weighted({name: self.part(name, histories) for name in used}, self.weights)

    def part(self, name: str, histories: Sequence[Sequence[int]]) -> Tensor:
        """The `(n, I)` float32 scores of one part, without its weight. Raises as `score`."""
        config = self.config
        if name == ITEM_PAIRS:
            read = recent_items(histories, config.pair_history, config.pair_decay, self.num_items)
            return torch.from_numpy((read @ self.pairs).toarray())
        rows = self.contents[name].rows
        read = recent_items(histories, config.content_history, config.content_decay, self.num_items)
        return torch.from_numpy(read @ rows.numpy()) @ rows.T

    @staticmethod
    def weighted(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
        """The sum of `(n, I)` float32 parts; those without a weight are not read. By numpy, as its single thread does
        not wait for others where the machine is busy."""
        used = [(parts[name].numpy(), np.float32(weight)) for name, weight in weights.items() if weight]
        if not used:
            raise ValueError(f"weights: expected one above 0, got {dict(weights)}")
        (first, weight), *others = used
        scores = first * weight
        for part, weight in others:
            scores += part * weight
        return torch.from_numpy(scores)

    def with_items(self, catalogue: ItemCatalogue) -> Neighbours:
        """The same, over a catalogue that begins with the items it was fitted on. New items are in no pair, and their
        contents are whitened as the others were.

        Raises:
            ValueError: the catalogue has fewer items. KeyError: it lacks a modality.
        """
        count, total = self.num_items, len(catalogue)
        if total < count:
            raise ValueError(f"catalogue: expected at least {count} items, got {total}")
        starts = np.pad(self.pairs.indptr, (0, total - count), mode="edge")
        pairs = csr_array((self.pairs.data, self.pairs.indices, starts), shape=(total, total))
        contents = {}
        for name, content in self.contents.items():
            new = content.whitening(catalogue.features[name][count:], catalogue.present[name][count:])
            contents[name] = Content(content.whitening, torch.cat([content.rows, new]))
        hashes = {
            "training_hash": self.training_hash,
            "features_hashes": self.features_hashes,
            "split_hash": self.split_hash,
        }
        return Neighbours(self.config, pairs, contents, self.weights, **hashes)

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``model.safetensors`` and ``config.json`` into a folder, each atomically.

        The configuration has the tensors' SHA-256, so that an interrupted save is noticed on loading.
        """
        folder = Path(folder)
        tensors = {f"pairs/{name}": torch.from_numpy(getattr(self.pairs, name)) for name in ARRAYS}
        for name, content in self.contents.items():
            tensors[f"rows/{name}"] = content.rows
            tensors[f"mean/{name}"], tensors[f"matrix/{name}"] = (
                content.whitening.mean,
                content.whitening.matrix,
            )
        config = {
            "baseline": "neighbours",
            "config": asdict(self.config),
            "num_items": self.num_items,
            "weights": list(self.weights.items()),  # sums are in this order
            "training_hash": self.training_hash,
            "features_hashes": self.features_hashes,
            "split_hash": self.split_hash,
        }
        save_tensors(folder, tensors, config, "tensors")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Neighbours:
        """Read what ``save`` wrote.

        Raises:
            SpeederError: a file is missing or damaged, or the two do not belong together.
        """
        folder = Path(folder)
        saved = read_json(folder / "config.json")
        try:
            if saved.get("baseline") != "neighbours":
                raise ValueError(f"baseline: expected 'neighbours', got {saved.get('baseline')!r}")
            tensors = load_tensors(folder, saved["tensors"])
            arrays = tuple(tensors[f"pairs/{name}"].numpy() for name in ARRAYS)
            pairs = csr_array(arrays, shape=(saved["num_items"], saved["num_items"]))
            pairs.check_format()
            weights = dict(saved["weights"])
            contents = {
                name: Content(
                    Whitening(tensors[f"mean/{name}"], tensors[f"matrix/{name}"]), tensors[f"rows/{name}"]
                )
                for name in weights
                if name != ITEM_PAIRS
            }
            hashes = {name: saved[name] for name in ("training_hash", "features_hashes", "split_hash")}
            return cls(NeighboursConfig(**saved["config"]), pairs, contents, weights, **hashes)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise SpeederError(f"{folder}: not saved neighbours: {error}") from error
