"""The candidate that a generated text names: LLaRA's validity, with titles normalised and matched by whole words."""

import re
import unicodedata
from collections.abc import Sequence


def normalise_title(title: str) -> str:
    """A title's words, without case, accents, punctuation and repeated spaces."""
    letters = unicodedata.normalize("NFKD", title.casefold())
    letters = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return re.sub(r"[\W_]+", " ", re.sub(r"['\u2019]", "", letters)).strip()


def named_candidate(text: str, titles: Sequence[str]) -> int | None:
    """The index of the one candidate whose title is in the first line of `text`; None unless it is exactly one.

    A title inside a longer one that is also there does not count: "Alien 3" names "Alien 3", not "Alien". Candidates
    that share a title cannot be distinguished, so neither can be named.
    """
    lines = text.strip().splitlines()
    line = f" {normalise_title(lines[0])} " if lines else ""
    padded = [f" {normalise_title(title)} " for title in titles]
    found = [place for place, title in enumerate(padded) if title.strip() and title in line]
    longest = [
        place
        for place in found
        if not any(padded[place] != padded[other] and padded[place] in padded[other] for other in found)
    ]
    return longest[0] if len(longest) == 1 else None
