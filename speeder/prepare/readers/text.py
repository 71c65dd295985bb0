"""Titles and texts of items from raw files, which have HTML, lists in place of strings, and very long texts."""

import html
import re
from collections.abc import Sequence
from typing import NamedTuple

MAX_TITLE = 1000  # characters
MAX_TEXT = 2000  # about 450 tokens; text encoders read 256 or 512
_MAX_RAW = 50_000  # characters of a field that are looked at: the rest could only be cut off again
_MAX_PARTS = 200  # entries of a list that are looked at
_HIDDEN = re.compile(r"<(script|style)\b.*?(</\1\s*>|$)", re.IGNORECASE | re.DOTALL)
_INLINE = re.compile(r"</?(a|b|em|font|i|small|span|strong|sub|sup|u)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>|<!--.*?(-->|$)", re.DOTALL)
# what is no text: control characters and lone surrogates, which no UTF-8 file can hold
_BREAKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


class ItemText(NamedTuple):
    """Title, text and picture of one item for the catalogue.

    Attributes:
        image: a file's name or path as in the raw data.
        blanked: whether the raw data's title was not a title, such as a piece of script, and became `""`.
        columns: values of further columns, such as a category; None where empty.
    """

    title: str
    text: str
    image: str | None = None
    blanked: bool = False
    columns: tuple[str | None, ...] = ()


def clean(value: object) -> str:
    """Readable text of a string, a number, or a list of such (nested ones too), `""` of anything else.

    Entities become characters; tags, and text between `<script>` tags, are removed; white space becomes one space.
    """
    if isinstance(value, list | tuple):
        return " ".join(part for part in map(clean, value[:_MAX_PARTS]) if part)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    if not isinstance(value, str):
        return str(value) if abs(value) < 1 << 64 else ""  # also not for NaN
    text = value[:_MAX_RAW]
    if "&" in text:
        text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub(" ", _INLINE.sub("", _HIDDEN.sub(" ", text)))
    return _BREAKS.sub(" ", text).strip()


def parts(value: object) -> list[str]:
    """The readable entries of a list, flattened, each once; or a string as the only entry."""
    values = value if isinstance(value, list | tuple) else [value]
    flat: list[str] = []
    for entry in values[:_MAX_PARTS]:
        flat += parts(entry) if isinstance(entry, list | tuple) else [clean(entry)]
    return list(dict.fromkeys(part for part in flat if part))


def compose(title: str, facts: Sequence[tuple[str, Sequence[str]]], *passages: str) -> str:
    """`"Title. Brand: B. Categories: C, D. Passage."`, without what is empty; `""` where all is.

    Args:
        title: clean text.
        facts: names and values.
        passages: clean text, in order; repeated ones, and those that only repeat the title, are left out.
    """
    sentences = [title] if title else []
    sentences += [f"{name}: {', '.join(values)}" for name, values in facts if values]
    for passage in passages:
        if passage and passage not in sentences:
            sentences.append(passage)
    return " ".join(
        sentence if sentence.endswith((".", "!", "?")) else f"{sentence}." for sentence in sentences
    )
