"""From the tensors of a call to what the kernels take: named tuples, lengths, and the shape of their tiles."""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor

from speeder_kernels.dispatch import LARGEST_HEAD
from speeder_kernels.triton.attention.ranks import describe_kernel
from speeder_kernels.triton.attention.tuples import Inputs, Ranks, Rows, Tables, TileShape
from speeder_kernels.triton.tiles import Tile, launch, tile


class Lengths(NamedTuple):
    """What kernels are not specialised for: never passed as a tuple (see `tuples.py`)."""

    tokens_q: int
    tokens_k: int
    heads: int
    key_heads: int
    group: int  # query heads that share a key head
    sequences: int
    buckets: int  # columns of the relative table
    positions: int  # columns of the absolute table

    def of_queries(self) -> tuple[int, ...]:
        """As kernels take them whose programs own queries."""
        return (self.tokens_q, self.heads, self.group, self.sequences, self.buckets, self.positions)

    def of_keys(self) -> tuple[int, ...]:
        """As the kernel takes them whose programs own keys."""
        return (
            self.tokens_q, self.tokens_k, self.key_heads, self.group, self.sequences, self.buckets, self.positions
        )  # fmt: skip


def lengths_of(x: Inputs, ranks: Ranks, tables: Tables) -> Lengths:
    (tokens_q, heads, _), (tokens_k, key_heads, _) = x.q.data.shape, x.k.data.shape
    sequences = ranks.cu_seqlens_q.shape[0] - 1
    buckets, positions = (0 if table is None else table.shape[1] for table in tables)
    return Lengths(tokens_q, tokens_k, heads, key_heads, heads // key_heads, sequences, buckets, positions)


def rows(x: Tensor) -> Rows:
    return Rows(x, *x.stride()[:2])


def tile_shape(q: Tensor, name: str) -> tuple[TileShape, Tile]:
    """A kernel's row of the table of tiles, as the shape of its tiles and the options of its launch."""
    size = q.shape[-1]
    if size > LARGEST_HEAD:  # the table of tiles has no rows for it
        raise ValueError(
            f"q: expected a head dimension of at most {LARGEST_HEAD} for the triton backend, got {size}"
        )
    block_d = max(16, triton.next_power_of_2(size))
    row = tile(q.device, "spae_attention", name, block_d, q.element_size())
    options = {key: value for key, value in row.items() if not key.startswith("block_")}
    return TileShape(size, block_d, row["block_q"], row.get("block_k", 0)), options


def tiles(tokens: int, lengths: Lengths, block: int) -> int:
    """How many there are, as `sequences.py` numbers them: of the sequences, and of the tail behind them."""
    return tokens // block + lengths.sequences + 1


def describe(ranks: Ranks, tables: Tables, lengths: Lengths, shape: TileShape) -> Ranks:
    """`ranks` with the summaries of all tiles, where the relative bias asks for them."""
    if tables.relative is None:
        return ranks
    tiles_q, tiles_k = tiles(lengths.tokens_q, lengths, shape.Q), tiles(lengths.tokens_k, lengths, shape.K)
    summary_q, summary_k = (
        rank.new_empty(count, 2) for rank, count in ((ranks.rank_q, tiles_q), (ranks.rank_k, tiles_k))
    )
    ranks = ranks._replace(summary_q=summary_q, summary_k=summary_k)
    launch(
        describe_kernel, (tiles_q + tiles_k,), ranks, lengths.sequences, tiles_q,
        BLOCK_Q=shape.Q, BLOCK_K=shape.K, num_warps=4, fuse=True,
    )  # fmt: skip
    return ranks
