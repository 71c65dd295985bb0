"""Prompts for titles: history and candidates as item tokens, and the title of one candidate as the answer.

The prompt begins as a ranking sequence does, so with the default template the states over a history are the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from speeder.data.catalogue import ItemCatalogue
from speeder.data.item_indices import item_indices
from speeder.errors import SpeederError
from speeder.evaluation.candidates import draw_items
from speeder.model.config import SpeederConfig
from speeder.model.sequences import IGNORED, TokenSequence
from speeder.recipes.templates import TITLE_FIELDS, template_text

MAX_TITLE_TOKENS = 32  # a longer title is cut, in training and in writing
NUM_CANDIDATES = 20  # as the protocol "vhr" has them
_PARTS = 1_000_000  # in which chances are drawn


class TitlePrompts:
    """Prompts and titles of one catalogue as tokens.

    Args:
        tokenizer: the backbone's.
        config: the model's: vocabulary, history length.
        catalogue: the items.
        template: text with `{history}`, then `{candidates}`, which are replaced by item tokens.

    Raises:
        SpeederError: the template lacks a field, or the tokenizer has no token to end a title.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: SpeederConfig,
        catalogue: ItemCatalogue,
        template: str,
    ):
        self.tokenizer, self.config, self.catalogue = tokenizer, config, catalogue
        self.pieces = [text_ids(tokenizer, piece) for piece in template_pieces(template)]
        self.title_end = line_end(tokenizer)
        self._titles = title_rows(tokenizer, catalogue, MAX_TITLE_TOKENS)

    def title(self, item: int) -> list[int]:
        """An item's title (or its id, without a title) as token ids, and a line end."""
        return self._titles[item]

    def sequence(
        self, history: Sequence[int], candidates: Sequence[int], target: int | None = None
    ) -> TokenSequence:
        """A prompt, and in training the target's title after it, which has the only labels.

        Items of the history have their ranks; candidates have none. The prompt's last token, which predicts the
        title's first token, carries the next item's rank.

        Args:
            history: item indices, oldest first; the newest `config.max_history` are kept. May be empty.
            candidates: item indices, in the order of the prompt.
            target: the item whose title is the answer.
        """
        items = item_indices("history", history)[-self.config.max_history :]
        k, first = self.config.tokens_per_item, self.config.text_vocab_size
        before, between, after = self.pieces
        read = [first + item for item in items for _ in range(k)]
        listed = [first + item for item in item_indices("candidates", candidates) for _ in range(k)]
        ids = [*before, *read, *between, *listed, *after]
        ranks = [-1] * len(ids)
        ranks[len(before) : len(before) + len(read)] = [rank for rank in range(len(items)) for _ in range(k)]
        if after:
            ranks[-1] = len(items)
        answer = [] if target is None else self.title(target)
        return TokenSequence([*ids, *answer], ranks + [-1] * len(answer), [IGNORED] * len(ids) + list(answer))


class TitleExamples(Dataset):
    """Training sequences of which a share, drawn again in each epoch, have a title as the target instead of items.

    Half of these choose: a target of the user's training part, the items before it, and candidates. The other half only
    name: no history, and any item of the catalogue as the only candidate. Naming costs a few tokens; without it most
    titles would be a target a few times at most.

    Args:
        sequences: the ranking sequences, with `whole`: the whole training part of each one's user.
        share: share of title examples, in (0, 1].
        seed: seed of all draws, with the epoch and an example's number.
        stream: the stage's name, so that stages draw differently.
    """

    def __init__(self, sequences: Dataset, share: float, prompts: TitlePrompts, seed: int, stream: str):
        self.sequences, self.share, self.prompts = sequences, share, prompts
        self.seed, self.stream, self.epoch = seed, stream, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the pass over the data."""
        self.epoch = epoch
        if hasattr(self.sequences, "set_epoch"):
            self.sequences.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> TokenSequence:
        stream = f"titles of {self.stream}, epoch {self.epoch}"

        def draw(what: str, count: int) -> int:
            return draw_items(self.seed, f"{stream}, {what}", index, 1, count, ())[0]

        if draw("share", _PARTS) >= self.share * _PARTS:
            return self.sequences[index]
        num_items = len(self.prompts.catalogue)
        if draw("kind", 2):
            item = draw("item", num_items)
            return self.prompts.sequence([], [item], item)
        whole = self.sequences.whole[index].tolist()
        place = 1 + draw("target", len(whole) - 1)
        history, target = whole[:place], whole[place]
        candidates = training_candidates(target, NUM_CANDIDATES, whole, num_items, index, self.seed, stream)
        return self.prompts.sequence(history, candidates, target)


def training_candidates(
    target: int, count: int, known: Collection[int], num_items: int, number: int, seed: int, stream: str
) -> list[int]:
    """The target and negatives of a training example, with the target at a random position.

    Negatives are outside the user's training part. A held-out item may be among them: leaving it out would reveal it.

    Args:
        count: number of candidates; fewer for a user who has nearly all items.
        known: the user's training part.
        number, seed, stream: what the draw depends on.
    """
    known = set(known)
    free = min(count - 1, num_items - len(known))
    candidates = draw_items(seed, stream, number, free, num_items, known) if free > 0 else []
    place = draw_items(seed, f"{stream} place", number, 1, len(candidates) + 1, ())[0]
    candidates.insert(place, target)
    return candidates


def template_pieces(template: str) -> list[str]:
    """A title template's text before, between and after its fields.

    Raises:
        SpeederError: it does not have `{history}` and then `{candidates}`, each once.
    """
    try:
        return template_text(template, TITLE_FIELDS)
    except ValueError as error:
        raise SpeederError(f"title_template: {error}") from error


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text's token ids, without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def line_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a title.

    Raises:
        SpeederError: the tokenizer has none.
    """
    ends = text_ids(tokenizer, "\n") or [tokenizer.eos_token_id]
    if ends[-1] is None:
        raise SpeederError("tokenizer: expected a token for a line end, or an end-of-text token, got neither")
    return ends[-1]


def title_rows(
    tokenizer: PreTrainedTokenizerBase, catalogue: ItemCatalogue, max_tokens: int
) -> list[list[int]]:
    """Every item's title (or its id, without a title), cut at `max_tokens` token ids, and a line end."""
    # all at once: a fast tokenizer takes a second for 10,000
    names = [title or name for title, name in zip(catalogue.titles, catalogue.ids, strict=True)]
    rows, end = tokenizer(names, add_special_tokens=False)["input_ids"], line_end(tokenizer)
    return [[*row[:max_tokens], end] for row in rows]
