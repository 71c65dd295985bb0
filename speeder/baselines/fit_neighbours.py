"""Fits neighbours: counts pairs of items, whitens contents, and chooses the parts' weights on validation items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from speeder.baselines.neighbours import ITEM_PAIRS, Content, Neighbours
from speeder.data.fingerprints import features_hash, training_hash
from speeder.errors import SpeederError
from speeder.evaluation.metrics import metric_values
from speeder.model.item_pairs import count_pairs
from speeder.model.whitening import Whitening
from speeder.recipes.neighbours import NeighboursConfig

if TYPE_CHECKING:
    from speeder.data.catalogue import ItemCatalogue
    from speeder.data.interactions import Split
    from speeder.data.prepared import PreparedData

WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)  # of a modality, beside 1 for item pairs
_MOST_USERS = 10_000  # of validation, evenly spaced
_CELLS = 1 << 20  # scores held at once: they stay in the cache
_MOST_CELLS = 1 << 28  # of all validation users together, but at least 1,000 users


def content_modalities(data: PreparedData) -> list[str]:
    """The modalities that were made of contents alone: not collaborative ones, and by the data's record of no
    interactions."""
    records = data.manifest.get("encoders", {})
    return [
        name
        for name in data.catalogue.modalities
        if name != "collaborative" and records.get(name, {}).get("training_hash") is None
    ]


def fit_neighbours(
    split: Split,
    catalogue: ItemCatalogue,
    modalities: Sequence[str],
    config: NeighboursConfig | None = None,
    *,
    log: Callable[[dict], None] | None = None,
) -> Neighbours:
    """Count on the split's training part, and choose weights by the NDCG@10 of its validation items (seen ones masked).

    The same arguments give the same result.

    Args:
        modalities: of contents; see `content_modalities`.
        log: called for every choice of weights with ``weights`` and ``NDCG@10``.

    Raises:
        SpeederError: the catalogue lacks a modality, or no user has a validation item.
        IndexError: an item outside the catalogue.
    """
    unknown = [name for name in modalities if name not in catalogue.features]
    if unknown:
        raise SpeederError(
            f"modalities: expected some of {', '.join(catalogue.features) or 'none'}, got {unknown[0]!r}"
        )
    if not len(split.users("validation")):
        raise SpeederError(f"neighbours: no user has a validation item; {split.requirement}")
    config, training = config or NeighboursConfig(), split.training()
    contents, hashes = {}, {}
    for name in modalities:
        features, present = catalogue.features[name], catalogue.present[name]
        whitening = Whitening.fit(features, present)
        contents[name] = Content(whitening, whitening(features, present))
        hashes[name] = features_hash(features, present)
    model = Neighbours(
        config,
        count_pairs(training, len(catalogue), config),
        contents,
        {ITEM_PAIRS: 1.0, **dict.fromkeys(contents, 0.0)},
        training_hash=training_hash(training),
        features_hashes=hashes,
        split_hash=split.hash(),
    )
    model.weights = _chosen_weights(model, split, log or (lambda record: None))
    return model


def fits(model: Neighbours, data: PreparedData) -> bool:
    """Whether `fit_neighbours` with the default settings would make the same again from these data."""
    catalogue = data.catalogue
    hashes = {
        name: features_hash(catalogue.features[name], catalogue.present[name])
        for name in content_modalities(data)
    }
    found = (model.config, model.num_items, model.split_hash, model.training_hash, model.features_hashes)
    fitted_on = (data.split.hash(), training_hash(data.split.training()), hashes)
    return found == (NeighboursConfig(), len(catalogue), *fitted_on)


def _chosen_weights(model: Neighbours, split: Split, log: Callable[[dict], None]) -> dict[str, float]:
    """One modality after another gets the best of `WEIGHTS`; at last, item pairs are left out if that is better.

    Among equals the smaller weight of a modality stays, and item pairs.
    """
    best = {ITEM_PAIRS: 1.0, **dict.fromkeys(model.contents, 0.0)}
    choices = [(name, WEIGHTS) for name in model.contents] or [(ITEM_PAIRS, (1.0,))]
    if model.contents:
        choices.append((ITEM_PAIRS, (1.0, 0.0)))
    known: dict[tuple, float] = {}
    for name, weights in choices:
        tried = [best | {name: weight} for weight in weights]
        new = [each for each in tried if any(each.values()) and tuple(each.values()) not in known]
        for each, value in zip(new, _validation_ndcg(model, split, new), strict=True):
            known[tuple(each.values())] = value
            log({"weights": each, "NDCG@10": value})
        best = max(tried, key=lambda each: known.get(tuple(each.values()), -1.0))
    return best


def _validation_ndcg(model: Neighbours, split: Split, weights: Sequence[Mapping[str, float]]) -> list[float]:
    """The NDCG@10 of each choice of weights, over validation users."""
    if not weights:
        return []
    histories, targets = split.histories("validation"), split.targets("validation")
    most = min(len(histories), _MOST_USERS, max(1000, _MOST_CELLS // model.num_items))
    users = np.linspace(0, len(histories) - 1, most).astype(np.int64)
    size = max(1, _CELLS // model.num_items)
    ranks = [np.empty(most, dtype=np.int64) for _ in weights]
    used = [name for name in model.weights if any(each[name] for each in weights)]
    for start in range(0, most, size):
        chosen = users[start : start + size]
        read, rows = [histories[user] for user in chosen], np.arange(len(chosen))
        parts = {name: model.part(name, read) for name in used}
        seen = rows.repeat([len(history) for history in read]), np.concatenate(read)
        for found, each in zip(ranks, weights, strict=True):
            scores = model.weighted(parts, each).numpy()
            scores[seen] = -np.inf  # and so a seen target comes last
            own = scores[rows, targets[chosen]][:, None]
            found[start : start + size] = (scores >= own).sum(axis=1)  # as `target_ranks`, in less time
    return [float(metric_values(found, "NDCG@10").mean()) for found in ranks]
