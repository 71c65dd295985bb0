"""The words of items' texts: which a model knows, and which an item has."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import regex
import xxhash

# Scripts without spaces between words: each character is a word, so that pairs are two neighbouring characters.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[[\w\p{{M}}\p{{N}}]--[{_UNSPACED}]]+", regex.V1)
MOST_WORDS = 1 << 16
LONGEST_TEXT = (
    1024  # words that are read of a text, so that a whole book takes no more room than a long description
)
_LEAST_ITEMS = 2  # a word of one item tells it from the others, and nothing of any other


def words_of(text: str) -> list[str]:
    """A text's first `LONGEST_TEXT` words and their pairs of neighbours, in lower case. Accents and vowel signs are
    parts of their words, however they are encoded."""
    words = _WORD.findall(unicodedata.normalize("NFC", text.casefold()))[:LONGEST_TEXT]
    return words + [f"{one} {other}" for one, other in pairwise(words)]


def word_hash(word: str) -> int:
    """64 bits that stand for a word, as a signed integer."""
    return xxhash.xxh3_64_intdigest(word.encode()) - (1 << 63)


def fit_vocabulary(texts: Sequence[str], most: int = MOST_WORDS) -> tuple[np.ndarray, np.ndarray]:
    """The words and word pairs that occur in at least two texts; of more than `most`, the most frequent.

    Returns:
        `(V,)` int64 hashes, rising, and `(V,)` int64 numbers of texts that have each.
    """
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update({word_hash(word) for word in words_of(text)})
    kept = sorted((-count, word) for word, count in counts.items() if count >= _LEAST_ITEMS)[:most]
    kept = sorted((word, -count) for count, word in kept)
    table = np.array(kept, dtype=np.int64).reshape(-1, 2)
    return table[:, 0].copy(), table[:, 1].copy()


def count_words(texts: Sequence[str], hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each text has each known word.

    Args:
        hashes: `(V,)` int64, rising.

    Returns:
        the places of words in `hashes`, `(N,)` int64, text by text; how often the text has each, `(N,)` int64; and
        where each text begins, with the end, `(n + 1,)` int64.
    """
    place = {word: number for number, word in enumerate(hashes.tolist())}
    words, counts, starts = [], [], [0]
    for text in texts:
        known = Counter(place[key] for key in map(word_hash, words_of(text)) if key in place)
        for word, count in sorted(known.items()):
            words.append(word)
            counts.append(count)
        starts.append(len(words))
    return tuple(np.array(column, dtype=np.int64) for column in (words, counts, starts))
