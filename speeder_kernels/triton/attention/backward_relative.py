"""The gradient of the relative table. A tile's gradients of scores, computed once more, are summed by distance: in
`queries_kernel` there are no registers left for that. `backward_rows.py` has the formulas.

Shape letters: Q queries of a tile, K keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from speeder_kernels.triton.attention.bias import (
    add_absolute,
    add_wide_bias,
    is_far,
    is_wide,
    load_absolute,
    relative_bias,
)
from speeder_kernels.triton.attention.partial_tables import (
    PAD,
    add_bucket,
    add_by_rank,
    add_diagonals,
    clear_row,
)
from speeder_kernels.triton.attention.ranks import ANY_RANKS, NO_ITEM, tile_ranks
from speeder_kernels.triton.attention.sequences import (
    find_sequence,
    first_tile,
    load_rows,
    rows_of,
    seen_keys,
    sequence_span,
)
from speeder_kernels.triton.attention.tuples import (
    Far,
    HeadTables,
    Inputs,
    Keys,
    OutputTile,
    QueryTile,
    Ranks,
    RowTerms,
    Tables,
    TileRanks,
    TileShape,
)


@triton.jit
def tile_gradients(
    row, queries: QueryTile, outputs: OutputTile, keys: Keys, tables: HeadTables,
    far_ranks_q: TileRanks, far_summary_k, end, shift, scale,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, TILE: TileShape, FAR_TILE: TileShape,
):  # fmt: skip
    """Add a tile of queries against keys 0 to `end` to the program's row.

    Tiles of `queries_kernel`, which contain this kernel's, are left out where they are far: it has summed them.
    """
    ranks_q, rank_q_Q = queries.ranks, queries.rank_Q
    row_Q, row_K = tl.arange(0, TILE.Q), tl.arange(0, TILE.K)
    step_QK = row_Q[:, None] - row_K[None, :]
    for first_k in tl.range(0, end, TILE.K, disable_licm=True):
        ranks_k = tile_ranks(keys.summary, first_k // TILE.K, TILE.K)
        far_ranks_k = tile_ranks(far_summary_k, first_k // FAR_TILE.K, FAR_TILE.K)
        far = is_far(far_ranks_q, far_ranks_k, tables.buckets, FAR_TILE.K)
        if (ranks_q.kind != NO_ITEM) & (ranks_k.kind != NO_ITEM) & (far == 0):
            rank_k_K = tl.load(keys.rank + first_k + row_K, mask=first_k + row_K < keys.length, other=-1)
            k_KD = load_rows(keys.k, first_k, keys.length, TILE.K, TILE, False)
            v_KD = load_rows(keys.v, first_k, keys.length, TILE.K, TILE, False)
            scores_QK = tl.dot(queries.q_QD, tl.trans(k_KD), input_precision="ieee") * scale
            wide = is_wide(ranks_q, ranks_k, TILE)
            if wide:
                scores_QK = add_wide_bias(scores_QK, tables, rank_q_Q[:, None], rank_k_K[None, :], TILE)
            else:
                scores_QK += relative_bias(
                    tables, wide, ranks_q, ranks_k, step_QK, rank_q_Q[:, None], rank_k_K[None, :], TILE
                )
            if tables.absolute is not None:
                bias_K = load_absolute(tables.absolute, rank_k_K, tables.positions)
                scores_QK = add_absolute(scores_QK, rank_q_Q, bias_K)
            # Pairs that are not two items have no bias, and what is not seen has no weight.
            counts = (rank_q_Q >= 0)[:, None] & (rank_k_K >= 0)[None, :]
            if CAUSAL:
                counts = counts & ((first_k + row_K)[None, :] <= (queries.first + shift + row_Q)[:, None])
            weights_QK = tl.math.exp2(tl.where(counts, scores_QK - outputs.lse2_Q[:, None], float("-inf")))
            grad_weights_QK = tl.dot(outputs.grad_QD, tl.trans(v_KD), input_precision="ieee")
            grad_scores_QK = weights_QK * (grad_weights_QK - outputs.delta_Q[:, None])
            if (ranks_q.kind == ANY_RANKS) | (ranks_k.kind == ANY_RANKS):
                add_by_rank(row, grad_scores_QK, rank_q_Q, rank_k_K, tables.buckets, PRECISION, TILE)
            else:
                distance = tl.minimum(
                    tl.maximum(ranks_q.low - ranks_k.low, -TILE.Q), tables.buckets - 1 + TILE.K
                )
                add_diagonals(row, grad_scores_QK, distance, TILE)


@triton.jit(
    do_not_specialize=["tokens_q", "heads", "group", "sequences", "buckets", "positions", "tiles", "slots"]
)
def relative_kernel(
    partials, far: Far, x: Inputs, terms: RowTerms, ranks: Ranks, tables: Tables,
    tokens_q, heads, group, sequences, buckets, positions, tiles, slots, scale,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, TILE: TileShape, FAR_TILE: TileShape,
):  # fmt: skip
    """partials (slots, Hq, R + 2 PAD): ds by distance, each slot over every slots-th tile of queries.

    `far` is what `queries_kernel` has summed already, in tiles of FAR_TILE, which are multiples of this kernel's.
    """
    head = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    key_head = head // group
    width = buckets + 2 * PAD
    row = partials + tl.program_id(0).to(tl.int64) * width
    clear_row(row, width)
    row += PAD
    absolute = tables.absolute
    if absolute is not None:
        absolute += head * positions
    biases = HeadTables(
        relative=tables.relative + head * buckets,
        buckets=buckets,
        absolute=absolute,
        positions=positions,
    )
    far_Q = tl.zeros((TILE.Q,), tl.float32)
    for tile in tl.range(slot, tiles, slots, disable_licm=True):
        sequence = find_sequence(ranks.cu_seqlens_q, tile, sequences, TILE.Q)
        first_q = (tile - first_tile(ranks.cu_seqlens_q, sequence, TILE.Q)) * TILE.Q
        start_q, length_q = sequence_span(ranks.cu_seqlens_q, sequence, sequences)
        start_k, length_k = sequence_span(ranks.cu_seqlens_k, sequence, sequences)
        ranks_q = tile_ranks(ranks.summary_q, tile, TILE.Q)
        if (first_q < length_q) & (ranks_q.kind != NO_ITEM):
            q = rows_of(x.q, start_q, head)
            grad = rows_of(x.grad, start_q, head)
            k = rows_of(x.k, start_k, key_head)
            v = rows_of(x.v, start_k, key_head)
            q_QD = load_rows(q, first_q, length_q, TILE.Q, TILE, False)
            grad_QD = load_rows(grad, first_q, length_q, TILE.Q, TILE, False)
            row_Q = first_q + tl.arange(0, TILE.Q)
            inside = row_Q < length_q
            at = head.to(tl.int64) * tokens_q + start_q + row_Q
            lse2_Q = tl.load(terms.lse2 + at, mask=inside, other=float("inf"))
            delta_Q = tl.load(terms.delta + at, mask=inside, other=0.0)
            far_Q += tl.load(far.sums + at, mask=inside, other=0.0)
            rank_q_Q = tl.load(ranks.rank_q + start_q + row_Q, mask=inside, other=-1)
            far_tile = first_tile(ranks.cu_seqlens_q, sequence, FAR_TILE.Q) + first_q // FAR_TILE.Q
            far_ranks_q = tile_ranks(far.summary_q, far_tile, FAR_TILE.Q)
            queries = QueryTile(q_QD=q_QD, rank_Q=rank_q_Q, ranks=ranks_q, first=first_q)
            outputs = OutputTile(grad_QD=grad_QD, lse2_Q=lse2_Q, delta_Q=delta_Q)
            summary_k = ranks.summary_k + 2 * first_tile(ranks.cu_seqlens_k, sequence, TILE.K)
            keys = Keys(k=k, v=v, rank=ranks.rank_k + start_k, summary=summary_k, length=length_k)
            far_summary_k = far.summary_k + 2 * first_tile(ranks.cu_seqlens_k, sequence, FAR_TILE.K)
            _, end = seen_keys(first_q, length_q, length_k, CAUSAL, TILE)
            tile_gradients(
                row, queries, outputs, keys, biases, far_ranks_q, far_summary_k, end, length_k - length_q, scale,
                CAUSAL, PRECISION, TILE, FAR_TILE,
            )  # fmt: skip
    add_bucket(row, buckets - 1, tl.sum(far_Q, axis=0))
