"""Which items may be recommended (`allow`, `deny`, `where`), and the best of a part of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from speeder.data.catalogue import ItemCatalogue
from speeder.model.item_store import ItemStore, best, hide, seen_table, vectors_of
from speeder.model.mrc import PIECE
from speeder.model.queries import Queries
from speeder_kernels import topk_items

UNKNOWN = ("error", "skip")
FALLBACKS = ("popularity",)
Where = Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class Choice:
    """The items that may be recommended, as indices.

    Attributes:
        allowed: `(A,)` int64, rising; None: all.
        denied: indices that are left out in any case.
    """

    allowed: np.ndarray | None = None
    denied: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        catalogue: ItemCatalogue,
        allow: Sequence[int | str] | None = None,
        deny: Sequence[int | str] = (),
        where: Where | None = None,
        unknown: str = "error",
    ) -> Choice:
        """Resolve ids and columns.

        Args:
            allow: recommend these alone; None: all.
            deny: never recommend these.
            where: column -> the value, or one of the values, that an item must have in it.
            unknown: `"error"`, or `"skip"`: ids that the catalogue lacks are left out.

        Raises:
            KeyError: an unknown id. ValueError: an index out of range, or a column that the catalogue lacks.
        """
        check_word("unknown", unknown, UNKNOWN)
        if unknown == "skip":
            allow = None if allow is None else catalogue.known(allow)
            deny = catalogue.known(deny)
        allowed = None if allow is None else np.unique(catalogue.indices_of(allow)).astype(np.int64)
        for name, wanted in (where or {}).items():
            found = catalogue.rows_where(name, [wanted] if isinstance(wanted, str) else wanted)
            allowed = found if allowed is None else np.intersect1d(allowed, found)
        return cls(allowed, tuple(sorted(set(catalogue.indices_of(deny)))))

    def hidden(self, seen: Sequence[int]) -> list[int]:
        """A user's seen items and the denied ones, rising, each once."""
        return sorted({*seen, *self.denied})

    def left(self, hidden: Sequence[int], items: int) -> int:
        """How many of `items` items can be recommended beside the hidden ones."""
        if self.allowed is None:
            return items - len(hidden)
        return len(self.allowed) - int(np.isin(self.allowed, np.asarray(hidden, dtype=np.int64)).sum())


EVERYTHING = Choice()


def check_word(name: str, value: str | None, words: Sequence[str]) -> None:
    """Raise `ValueError` unless a word is one of those that are known."""
    if value not in words:
        raise ValueError(f"{name}: expected one of {', '.join(words)}, got {value!r}")


def best_among(
    queries: Queries | torch.Tensor,
    vectors: torch.Tensor | ItemStore,
    k: int,
    hidden: Sequence[Sequence[int]],
    allowed: np.ndarray,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` best of the allowed items for each of `n` queries, read a piece at a time.

    Args:
        vectors: `(I, H)` scoring vectors, or a store.
        hidden: items to leave out for each query; there must be `k` others.
        allowed: `(A,)` int64, rising.

    Returns:
        scores `(n, k)` float32, descending, and items `(n, k)` int64.
    """
    queries = Queries.of(queries)
    dense = queries.dense
    excluded = seen_table(hidden, len(dense), dense.device)
    scores = dense.new_empty(len(dense), 0, dtype=torch.float32)
    items = torch.empty(len(dense), 0, dtype=torch.int64, device=dense.device)
    for part in torch.tensor(allowed, device=dense.device).split(PIECE):
        rows = vectors_of(vectors, part)
        most = int(torch.isin(excluded, part).sum(dim=1).max()) if excluded.shape[1] else 0
        found, places = topk_items(dense.to(rows.dtype), rows, min(len(part), k + most))
        here = part[places]
        found = hide(found, here, excluded) if most else found
        scores, items = best(torch.cat([scores, found], dim=1), torch.cat([items, here], dim=1), k)
    return queries.best_of_sum(scores, items, partial(vectors_of, vectors), hidden, allowed)
