"""What every system is given: the same users, histories of a chosen length, item texts of a chosen length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from speeder.data.catalogue import ItemCatalogue
from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.evaluation.candidates import draw_items

USERS = 2048  # at most, whose training parts and histories are used
LONGEST = 50  # items read of users' own histories
TITLE_TOKENS = 32  # a longer title is cut, as in the recipes of the text baselines
CANDIDATES = 20  # to choose from, target included, where a system cannot rank the catalogue


@dataclass(frozen=True)
class Workload:
    """One point of the measurement.

    Attributes:
        history: items in every history; None: users' own, the newest `LONGEST` of each.
        text: tokens of every item's text; None: titles as they are, up to `TITLE_TOKENS`.
    """

    history: int | None = LONGEST
    text: int | None = None

    @property
    def name(self) -> str:
        """As tables call it."""
        text = "titles" if self.text is None else f"{self.text}-token texts"
        length = f"users' own, up to {LONGEST}" if self.history is None else f"{self.history} items"
        return f"{text}; {length}"

    @property
    def max_history(self) -> int:
        return self.history or LONGEST

    @property
    def max_text(self) -> int:
        return self.text or TITLE_TOKENS


@dataclass(frozen=True)
class Users:
    """Users in an order that chance decided once, the same for every system.

    Attributes:
        training: each one's training items, oldest first.
        histories: what is known of each before the test target.
        candidates: `(U, CANDIDATES)` items: the target and items outside the history.
        filled: share of the histories' items that were drawn, because the users' own are fewer.
    """

    training: list[np.ndarray]
    histories: list[np.ndarray]
    candidates: np.ndarray
    filled: float


def choose_users(data: PreparedData, workload: Workload, seed: int = 0) -> Users:
    """The users of a workload.

    A history that is too short is filled at its old end with items drawn as often as they occur in the data; one that
    is too long loses its oldest.

    Raises:
        SpeederError: no user has a test target, or the catalogue is too small for so long a history.
    """
    split, random = data.split, np.random.default_rng(seed)
    users, histories, targets = split.users("test"), split.histories("test"), split.targets("test")
    if not len(users):
        raise SpeederError(f"data: expected a user with a test item, got none; {split.requirement}")
    rows = random.permutation(len(users))[:USERS]
    everyone = split.training()
    training = [everyone[users[row]] for row in rows]
    histories = [histories[row] for row in rows]
    filled = 0.0
    if workload.history is not None:
        short = sum(max(0, workload.history - len(items)) for items in histories)
        filled = short / (workload.history * len(histories))
        pool = data.interactions.item
        # one more than a history: the target that follows
        training = [_of_length(items, workload.history + 1, pool, random) for items in training]
        histories = [_of_length(items, workload.history, pool, random) for items in histories]
    negatives = min(CANDIDATES - 1, len(data.catalogue) - max(map(len, histories)) - 1)
    if negatives < 1:
        raise SpeederError(
            f"data: expected a catalogue of more items than a history of {workload.max_history}, "
            f"got {len(data.catalogue)}"
        )
    candidates = [
        [
            int(targets[row]),
            *draw_items(
                seed,
                "bench",
                int(users[row]),
                negatives,
                len(data.catalogue),
                {*history.tolist(), int(targets[row])},
            ),
        ]
        for row, history in zip(rows, histories, strict=True)
    ]
    return Users(training, histories, np.array(candidates), filled)


def _of_length(items: np.ndarray, length: int, pool: np.ndarray, random: np.random.Generator) -> np.ndarray:
    missing = max(0, length - len(items))
    return np.concatenate([random.choice(pool, missing), items[len(items) - (length - missing) :]])


def with_texts(
    catalogue: ItemCatalogue, workload: Workload, tokenizer: PreTrainedTokenizerBase
) -> ItemCatalogue:
    """The catalogue whose titles are what the text systems read: in a workload with texts of N tokens, each item's
    title and description, again and again, until there are N tokens or more (the systems cut them at N)."""
    if workload.text is None:
        return catalogue
    units = [
        " ".join(filter(None, (title, text))) or name
        for title, text, name in zip(catalogue.titles, catalogue.texts, catalogue.ids, strict=True)
    ]
    counts = [len(ids) for ids in tokenizer(units, add_special_tokens=False)["input_ids"]]
    # one more than enough: where two copies meet, fewer tokens may come of them
    texts = [
        " ".join([unit] * (2 + workload.text // max(1, count)))
        for unit, count in zip(units, counts, strict=True)
    ]
    return ItemCatalogue(
        catalogue.ids, texts, catalogue.texts, catalogue.images, catalogue.features, catalogue.present
    )
