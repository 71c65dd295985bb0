"""What a history scores items by: a dense query, and the few items that its pairs add something to.

`score(i) = dense · vector(i) + added[i]`. `added` is never negative and has few entries a row. So the best of the sum
are among the best of the dense part and the items with an entry, which are scored one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array, vstack


@dataclass(frozen=True)
class Queries:
    """Queries of `n` histories.

    Attributes:
        dense: `(n, H)` float32; dot products with scoring vectors.
        added: `(n, I)` float32, what is added to the dot products, none below 0; None: nothing.
    """

    dense: torch.Tensor
    added: csr_array | None = None

    @classmethod
    def of(cls, queries: Queries | torch.Tensor) -> Queries:
        """Queries as they are, or a tensor of dense ones."""
        return queries if isinstance(queries, Queries) else cls(queries)

    @classmethod
    def cat(cls, parts: Iterable[Queries]) -> Queries:
        """The queries of one model end to end."""
        parts = list(parts)
        dense = torch.cat([part.dense for part in parts])
        if parts[0].added is None:
            return cls(dense)
        return cls(dense, csr_array(vstack([part.added for part in parts], format="csr")))

    def __len__(self) -> int:
        return len(self.dense)

    def __getitem__(self, rows: slice | Sequence[int]) -> Queries:
        return Queries(self.dense[rows], None if self.added is None else self.added[rows])

    def split(self, size: int) -> Iterator[Queries]:
        """Parts of `size` queries; the last may have fewer."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def scores(self, vectors: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """`(n, m)` float32 scores of `(m,)` items by their `(m, H)` scoring vectors."""
        scores = self.dense @ vectors.float().T
        if self.added is None:
            return scores
        chosen = self.added[:, items.cpu().numpy()].toarray()
        return scores + torch.from_numpy(chosen).to(scores.device)

    def best_of_sum(
        self,
        scores: torch.Tensor,
        items: torch.Tensor,
        vectors_of: Callable[[torch.Tensor], torch.Tensor],
        hidden: Sequence[Sequence[int]] | None = None,
        allowed: np.ndarray | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The `k` best items of the whole sum, from the `k` best of the dense part.

        Args:
            scores, items: `(n, k)`, the dense part's, without the hidden items and of the allowed ones alone.
            vectors_of: `(u,)` int64 items to their `(u, H)` scoring vectors, on their device.
            hidden: items to leave out for each query.
            allowed: the items that may be chosen; None: all.

        Returns:
            scores `(n, k)` float32, descending, and items `(n, k)` int64; equal scores are in the order of items.
        """
        if self.added is None or not self.added.nnz:
            return scores, items
        width, k = self.added.shape[1], items.shape[1]
        row, item, value = _entries(self.added, hidden, allowed)
        if not len(row):
            return scores, items
        wanted, place = np.unique(item, return_inverse=True)
        device = scores.device
        vectors = vectors_of(torch.from_numpy(wanted).to(device))
        # rounded as in the search
        dense = self.dense.to(vectors.dtype).float() @ vectors.float().T
        at = (torch.from_numpy(index).to(device) for index in (row, place))
        sums = dense[tuple(at)] + torch.from_numpy(value).to(device)
        column = np.arange(len(row)) - np.searchsorted(row, row)  # of an entry within its row
        longest = int(column.max(initial=-1)) + 1
        index = tuple(torch.from_numpy(part).to(device) for part in (row, column))
        own = torch.full((len(items), longest), -1, dtype=torch.int64, device=device)
        own[index] = torch.from_numpy(item).to(device)
        exact = torch.full((len(items), longest), -torch.inf, device=device)
        exact[index] = sums
        keys = items.cpu().numpy() + np.arange(len(items))[:, None] * width
        twice = torch.from_numpy(np.isin(keys, row * width + item)).to(device)
        every = (
            torch.cat([scores.masked_fill(twice, -torch.inf), exact], dim=1),
            torch.cat([items, own], dim=1),
        )
        order = every[1].argsort(dim=1)
        every = tuple(part.gather(1, order) for part in every)
        order = every[0].sort(dim=1, descending=True, stable=True).indices[:, :k]
        return every[0].gather(1, order), every[1].gather(1, order)


def add_sparse(logits: torch.Tensor, added: csr_array | None) -> torch.Tensor:
    """`(n, I)` float32 logits with what is added to some, in place."""
    if added is not None:
        row, item, value = _entries(added)
        index = tuple(torch.from_numpy(part).to(logits.device) for part in (row, item))
        logits.index_put_(index, torch.from_numpy(value).to(logits.device), accumulate=True)
    return logits


def _entries(
    added: csr_array, hidden: Sequence[Sequence[int]] | None = None, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, items and values, row by row, of the entries that may be chosen."""
    width = added.shape[1]
    row = np.repeat(np.arange(added.shape[0]), np.diff(added.indptr))
    item = added.indices.astype(np.int64)
    keep = np.ones(len(row), dtype=bool)
    if hidden is not None:
        seen = [np.asarray(items, dtype=np.int64) + number * width for number, items in enumerate(hidden)]
        keep &= ~np.isin(row * width + item, np.concatenate([np.empty(0, dtype=np.int64), *seen]))
    if allowed is not None:
        keep &= np.isin(item, allowed)
    return row[keep], item[keep], added.data[keep]
