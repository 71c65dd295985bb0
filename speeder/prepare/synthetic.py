"""A small synthetic world in which the next item depends only on one chosen modality, or only on order.

Each item has three independent attributes: the topic of its text, the shape and colour of its picture, and its
collaborative cluster; each has 6 values. Sequences follow one of two rules.

`follows` a modality: the next item's attribute of that modality is the successor (plus 1, modulo 6) of the current
item's; the item is uniformly random among the unseen ones with that attribute. At some steps the sequence jumps to any
item, so the current item's attribute cannot be inferred from the ones before it.

`follows="order"`: sequences are episodes of four items: two of topics 0 and 1 in random order, one of topic 2 or 3, and
an outcome, of topic 4 if topic 0 came first, else of topic 5. Neither the last item nor the bag of items predicts the
outcome.

Held-out (cold) items never occur in a training part. Half of the users have one as their validation item, so their test
target can only be predicted from the features of an item that was never trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from speeder.data.catalogue import ItemCatalogue
from speeder.data.interactions import SPLIT_RULE, Interactions
from speeder.data.prepared import PreparedData
from speeder.prepare.features import EncodesImages, EncodesTexts
from speeder.prepare.synthetic_items import GROUPS, draw_pictures, write_descriptions

MODALITIES = ("text", "image", "collaborative")
_JUMP = 1 / 3
_EPISODE = 4
_FEATURES = 16
_NOISE = 0.1  # per feature; an attribute's code has length 1, so groups stay linearly separable
_TRIES = 1000


@dataclass(frozen=True)
class SyntheticWorld(PreparedData):
    """Prepared data with its ground truth, which `save` does not keep. All users have both targets.

    Attributes:
        follows: what the next item depends on.
        attributes: modality -> `(I,)` int64 in 0..5.
        cold_items: `(I,)` bool, items that occur in no training part.
        cold_users: `(U,)` bool, users whose validation item is cold.
    """

    follows: str = "text"
    attributes: dict[str, np.ndarray] = field(default_factory=dict)
    cold_items: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    cold_users: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    @property
    def groups(self) -> np.ndarray:
        """`(I,)` int64: the attribute that the sequences depend on (for `"order"`, the text's)."""
        return self.attributes["text" if self.follows == "order" else self.follows]

    def rule_applies(self, split: str) -> np.ndarray:
        """`(U,)` bool: whether the user's target in this split follows the rule; else it is random."""
        if split == "test":
            return np.ones(len(self.cold_users), dtype=bool)
        return ~self.cold_users & (self.follows != "order")

    def group_accuracy(self, scores: torch.Tensor, split: str, users: np.ndarray | None = None) -> float:
        """How often the best-scored item has the target's attribute. Bayes-optimal: 1. Chance: 1/6, and for
        `"order"` 1/2, the best that a model blind to order can do.

        Args:
            scores: `(U, I)`, one row per user of `split.histories(split)`.
            users: `(U,)` bool, the users to count, such as `cold_users`; always within `rule_applies(split)`.
        """
        counted = self.rule_applies(split) if users is None else users & self.rule_applies(split)
        if not counted.any():
            raise ValueError(f"no target of the {split} split follows the rule for these users")
        best = self.groups[scores.argmax(dim=1).numpy()]
        return float((best == self.groups[self.split.targets(split)])[counted].mean())

    def bayes_hit_rate(self, split: str) -> float:
        """The highest HR@1 that any model can expect, over the users whose target follows the rule.

        The rule gives the target's attribute; the target is random among the warm, unseen items with that attribute.
        """
        counted = np.flatnonzero(self.rule_applies(split))
        if not len(counted):
            raise ValueError(f"no target of the {split} split follows the rule")
        histories, targets = self.split.histories(split), self.split.targets(split)
        rates = []
        for user in counted:
            likely = (self.groups == self.groups[targets[user]]) & ~self.cold_items
            likely[histories[user]] = False
            rates.append(1 / likely.sum())
        return float(np.mean(rates))


def synthetic_world(
    num_items: int = 48,
    num_users: int = 200,
    history: int = 12,
    follows: str = "text",
    *,
    held_out: float = 0.25,
    seed: int = 0,
    folder: str | Path | None = None,
    text_encoder: EncodesTexts | None = None,
    image_encoder: EncodesImages | None = None,
) -> SyntheticWorld:
    """Makes a world; the same arguments give the same one.

    Args:
        num_items: at least 36.
        history: items per user, all different; the last two are the held-out targets. A multiple of 4 for
            `follows="order"`.
        follows: `"text"`, `"image"`, `"collaborative"` or `"order"`.
        held_out: share of cold items.
        folder: folder of the items' pictures as PNG files; None draws none.
        text_encoder, image_encoder: encode the texts and the pictures. Without one, that modality's features are a
            short code of its attribute and noise; collaborative features always are.

    Raises `ValueError` for a wrong argument.
    """
    if follows not in (*MODALITIES, "order"):
        raise ValueError(f"follows must be one of {(*MODALITIES, 'order')}, but got {follows!r}")
    if num_items < GROUPS**2:
        raise ValueError(f"num_items must be at least {GROUPS**2}, but got {num_items}")
    if history < _EPISODE or (follows == "order" and history % _EPISODE):
        raise ValueError(f"history must be at least 4, and a multiple of 4 for 'order', but got {history}")
    if not 0 <= held_out < 0.5:
        raise ValueError(f"held_out must be in [0, 0.5), but got {held_out}")
    if image_encoder is not None and folder is None:
        raise ValueError("image_encoder needs a folder to draw pictures in")
    random = np.random.default_rng(seed)
    attributes = _independent_attributes(num_items, random)
    groups = attributes["text" if follows == "order" else follows]
    cold_items = np.zeros(num_items, dtype=bool)
    for group in range(GROUPS):
        members = np.flatnonzero(groups == group)
        cold_items[random.permutation(members)[: round(held_out * len(members))]] = True
    cold_users = (random.permutation(num_users) < num_users // 2) & cold_items.any()

    make = _episodes if follows == "order" else _chain
    sequences = [
        _retry(partial(make, groups, cold_items, bool(cold), history, random), history) for cold in cold_users
    ]
    time = np.tile(np.arange(history), num_users)
    user = np.repeat(np.arange(num_users), history)
    interactions = Interactions(
        user, np.concatenate(sequences), time, [f"user-{u}" for u in range(num_users)]
    )

    titles, texts = write_descriptions(attributes["text"], random)
    images = (
        [None] * num_items if folder is None else draw_pictures(attributes["image"], Path(folder), random)
    )
    catalogue = ItemCatalogue([f"item-{i}" for i in range(num_items)], titles, texts, images)
    features = {name: _coded(values, random) for name, values in attributes.items()}
    if text_encoder is not None:
        features["text"] = text_encoder.encode(texts)[0]
    if image_encoder is not None:
        features["image"] = image_encoder.encode(images)[0]
    manifest = {"dataset": "synthetic", "follows": follows, "seed": seed, "split": SPLIT_RULE}
    data = PreparedData(catalogue, interactions, manifest)
    encoders = {"text": text_encoder, "image": image_encoder}
    for name in MODALITIES:  # sequences were drawn from the attributes, and no features from sequences
        made_by = getattr(encoders.get(name), "name", "planted attributes")
        data = data.with_features(name, features[name], made_by=made_by, training_hash=None)
    return SyntheticWorld(
        data.catalogue, interactions, data.manifest, follows, attributes, cold_items, cold_users
    )


def _independent_attributes(count: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Each value equally often; of many draws the one with the least dependent attributes."""

    def draw() -> list[np.ndarray]:
        return [random.permutation(np.arange(count) % GROUPS) for _ in MODALITIES]

    def crowding(values: list[np.ndarray]) -> float:
        pairs = [(0, 1), (0, 2), (1, 2)]
        return max(float((np.bincount(values[a] * GROUPS + values[b]) ** 2).sum()) for a, b in pairs)

    best = min((draw() for _ in range(50)), key=crowding)
    return {name: values.astype(np.int64) for name, values in zip(MODALITIES, best, strict=True)}


def _coded(values: np.ndarray, random: np.random.Generator) -> torch.Tensor:
    """`(I, 16)`: an orthonormal code per attribute value, and noise."""
    codes = np.linalg.qr(random.normal(size=(_FEATURES, GROUPS)))[0].T
    return torch.from_numpy(codes[values] + _NOISE * random.normal(size=(len(values), _FEATURES))).float()


class _DeadEnd(Exception):
    """No unseen item matches: the sequence is drawn again."""


def _retry(make: Callable[[], list[int]], history: int) -> list[int]:
    for _ in range(_TRIES):
        try:
            return make()
        except _DeadEnd:
            continue
    raise ValueError(f"history {history} is too long for items that may each occur once; take more items")


def _take(fits: np.ndarray, seen: Sequence[int], random: np.random.Generator) -> int:
    """A random item among those that match and were not seen."""
    fits = fits.copy()
    fits[list(seen)] = False
    if not fits.any():
        raise _DeadEnd
    return int(random.choice(np.flatnonzero(fits)))


def _chain(
    groups: np.ndarray, cold_items: np.ndarray, cold: bool, history: int, random: np.random.Generator
) -> list[int]:
    """A sequence in which each item's group is the successor of the one before, except at jumps."""
    items: list[int] = []
    for step in range(history):
        held_out = step >= history - 2
        if cold and step == history - 2:
            items.append(_take(cold_items, items, random))
        elif step == 0 or (not held_out and random.random() < _JUMP):
            items.append(_take(~cold_items, items, random))
        else:
            follower = (groups[items[-1]] + 1) % GROUPS
            items.append(_take(~cold_items & (groups == follower), items, random))
    return items


def _episodes(
    groups: np.ndarray, cold_items: np.ndarray, cold: bool, history: int, random: np.random.Generator
) -> list[int]:
    """Episodes (two cues in random order, a filler, the outcome that their order decides)."""
    items: list[int] = []
    for start in range(0, history, _EPISODE):
        first = int(random.integers(2))
        for cue in (first, 1 - first):
            items.append(_take(~cold_items & (groups == cue), items, random))
        allowed = cold_items if cold and start + _EPISODE == history else ~cold_items
        items.append(_take(allowed & np.isin(groups, (2, 3)), items, random))
        items.append(_take(~cold_items & (groups == 4 + first), items, random))
    return items
