"""Prompt templates: text with named fields in braces, each once and in order."""

from __future__ import annotations

import re
from collections.abc import Sequence

TITLE_FIELDS = ("history", "candidates")  # of the prompt for titles
_FIELD = re.compile(r"\{([^\W\d]\w*)\}")


def template_text(template: str, fields: Sequence[str]) -> list[str]:
    """A template's text before, between and after its fields.

    Raises:
        ValueError: it has another field, or lacks one, or has them twice or in another order.
    """
    found = _FIELD.findall(template)
    if found != list(fields):
        wanted = ", then ".join("{" + name + "}" for name in fields)
        raise ValueError(f"expected {wanted}, each once, and no other field, got {template!r}")
    pieces, rest = [], template
    for name in fields:
        before, _, rest = rest.partition("{" + name + "}")
        pieces.append(before)
    return [*pieces, rest]
