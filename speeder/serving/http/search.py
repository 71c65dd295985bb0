"""Items by title: every word of the query is a prefix of a word of the title.

The cost of a query is bounded, however large the catalogue is and however common the words are.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from heapq import nsmallest
from itertools import accumulate, islice

from speeder.data.catalogue import ItemCatalogue
from speeder.data.titles import natural_title, split_year, title_keys

MEANT = 50  # hits among which a title is looked for
MOST_WORDS = 16  # words of a query; further ones are ignored
MOST_ITEMS = 5000  # items with the query's rarest word; of more, those whose word comes first in the alphabet
_WORD = re.compile(r"\w+")
_APOSTROPHE = re.compile(r"['\u2019`]")


def words(text: str) -> list[str]:
    """The words of a text, without case, accents and punctuation."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    letters = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return _WORD.findall(_APOSTROPHE.sub("", letters))


class TitleIndex:
    """An index over a catalogue's titles; items without a title are found only by their id."""

    def __init__(self, catalogue: ItemCatalogue):
        self._catalogue = catalogue
        rows: dict[str, list[int]] = defaultdict(list)
        self._titles: list[tuple[list[str], list[str]]] = []  # words of the title, and without its year
        for row, title in enumerate(catalogue.titles):
            natural = natural_title(title)
            self._titles.append((words(natural), words(split_year(natural)[0])))
            for word in set(self._titles[-1][0]):
                rows[word].append(row)
        self._rows = dict(rows)
        self._words = sorted(rows)
        # items of all words before a place: the frequency of a prefix without a scan
        self._before = [0, *accumulate(len(rows[word]) for word in self._words)]

    def search(self, query: str, limit: int) -> list[int]:
        """Item indices, best first: exact titles, then titles that begin with the query, then shorter ones."""
        asked = words(query)[:MOST_WORDS]
        by_id = [self._catalogue.index_of(query)] if self._known(query) else []
        if not asked:
            return by_id[:limit]
        rarest = min(asked, key=self._frequency)
        found = [row for row in self._with_prefix(rarest).difference(by_id) if self._has(row, asked)]
        ranked = nsmallest(limit, found, key=lambda row: self._rank(row, asked))
        return (by_id + ranked)[:limit]

    def resolve(self, title: str) -> list[int]:
        """The items that a title matches: those with this title, with or without its year, else the search's hits.

        Only the first `MEANT` hits are compared: an item with the title is among them.
        """
        name, year = split_year(title)
        keys = set(title_keys(name)[:1])
        hits = self.search(title, MEANT)
        exact = []
        for row in hits:
            other_name, other_year = split_year(self._catalogue.titles[row])
            if keys & set(title_keys(other_name)[:1]) and (year is None or year == other_year):
                exact.append(row)
        return exact or hits

    def _known(self, external: str) -> bool:
        try:
            self._catalogue.index_of(external)
        except KeyError:
            return False
        return True

    def _range(self, prefix: str) -> range:
        """Places of the words with a prefix."""
        return range(bisect_left(self._words, prefix), bisect_left(self._words, prefix + chr(sys.maxunicode)))

    def _frequency(self, prefix: str) -> int:
        places = self._range(prefix)
        return self._before[places.stop] - self._before[places.start]

    def _with_prefix(self, prefix: str) -> set[int]:
        found: set[int] = set()
        for place in self._range(prefix):
            found.update(islice(self._rows[self._words[place]], MOST_ITEMS - len(found)))
            if len(found) >= MOST_ITEMS:
                break
        return found

    def _has(self, row: int, asked: list[str]) -> bool:
        title, _ = self._titles[row]
        return all(any(word.startswith(prefix) for word in title) for prefix in asked)

    def _rank(self, row: int, asked: list[str]) -> tuple:
        title, name = self._titles[row]
        starts = " ".join(title).startswith(" ".join(asked))
        whole_words = sum(word in title for word in asked)
        return (asked not in (title, name), not starts, -whole_words, len(title), row)
