"""The named tuples of attention's kernels: what a launch passes to them, and what they pass on within.

Triton takes a tuple apart: each member reaches the kernel as if it were an argument of its own, and None is known when
compiling. It specialises every member by its alignment and value, and does not look for it in `do_not_specialize`: so
lengths, which differ from batch to batch and would each compile a kernel of its own, stay out of tuples.

Within kernels tuples are made with the members' names, since Triton's cache of compiled kernels looks at the calls
alone: it would not see that members have changed places.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

# --- what a launch passes: in the kernel, a tensor is a pointer ---------------------------------------------


class TileShape(NamedTuple):
    """D elements of a head, in blocks of BLOCK_D; Q queries and K keys of a tile."""

    D: int
    BLOCK_D: int
    Q: int
    K: int = 0

    def constants(self) -> TileShape:
        """As kernels take it: known when compiling."""
        return TileShape(*map(tl.constexpr, self))


class Rows(NamedTuple):
    """A vector of D elements for each token and head; the elements of a vector are dense."""

    data: Tensor
    stride: int  # from a token to the next
    head_stride: int


class Inputs(NamedTuple):
    """q, k and v; for the backward pass also the gradient of the output."""

    q: Rows
    k: Rows
    v: Rows
    grad: Rows | None = None


class Ranks(NamedTuple):
    """Where sequences begin, and the ranks of their tokens; what the ranks of a tile are, where a kernel asks (see
    `ranks.py`)."""

    cu_seqlens_q: Tensor  # (B + 1,)
    cu_seqlens_k: Tensor
    rank_q: Tensor  # (Tq,)
    rank_k: Tensor  # (Tk,)
    summary_q: Tensor | None = None  # (tiles, 2)
    summary_k: Tensor | None = None


class Tables(NamedTuple):
    """The biases by distance `(Hq, R)` and by the key's rank `(Hq, A)`; None where there is no such bias."""

    relative: Tensor | None
    absolute: Tensor | None


class RowTerms(NamedTuple):
    """Two numbers a query, both (Hq, Tq) in float32: the log-sum-exp in base 2, and the sum of its output times its
    gradient."""

    lse2: Tensor
    delta: Tensor


class Scales(NamedTuple):
    """The factor of the scores, and the same times log2(e)."""

    natural: float
    base2: float


class Far(NamedTuple):
    """Scores' gradients summed over the keys that are far (Hq, Tq), and the ranks of the tiles that were summed."""

    sums: Tensor
    summary_q: Tensor
    summary_k: Tensor


class KeyGradients(NamedTuple):
    """What `keys_kernel` writes; None for what nobody needs."""

    k: Tensor | None  # (Tk, Hkv, D)
    v: Tensor | None
    column_sums: Tensor | None  # (Hq, Tk): scores' gradients summed over a key's item queries


# --- what kernels pass on: members are tensors and pointers of Triton ---------------------------------------


class TileRanks(NamedTuple):
    """What the ranks of a tile are: see `ranks.py`."""

    kind: tl.tensor
    low: tl.tensor
    high: tl.tensor


class HeadTables(NamedTuple):
    """A head's rows of the two tables, or None, and how long they are."""

    relative: Any
    buckets: tl.tensor
    absolute: Any
    positions: tl.tensor


class QueryTile(NamedTuple):
    """The queries that a program owns; `first` is the number of the first within its sequence."""

    q_QD: tl.tensor
    rank_Q: tl.tensor
    ranks: TileRanks
    first: tl.tensor


class OutputTile(NamedTuple):
    """What the backward pass knows of the outputs of a tile of queries."""

    grad_QD: tl.tensor
    lse2_Q: tl.tensor
    delta_Q: tl.tensor


class Keys(NamedTuple):
    """The keys of a sequence that a program walks over."""

    k: Rows
    v: Rows
    rank: tl.tensor
    summary: Any
    length: tl.tensor


class KeyTile(NamedTuple):
    """The keys that a program owns; `bias_K` is their own bias, or None."""

    k_KD: tl.tensor
    v_KD: tl.tensor
    rank_K: tl.tensor
    bias_K: Any
    ranks: TileRanks
    first: tl.tensor


class Queries(NamedTuple):
    """The queries of a sequence and head that a program walks over."""

    q: Rows
    grad: Rows
    lse2: tl.tensor
    delta: tl.tensor
    rank: tl.tensor
    summary: Any
    length: tl.tensor
