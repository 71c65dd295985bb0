"""spae_attention: which kernels run, over which grids, with which tiles.

No launch depends on what stands in a tensor, so the host never waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speeder_kernels.triton.attention.arguments import (
    Lengths,
    describe,
    lengths_of,
    rows,
    tile_shape,
    tiles,
)
from speeder_kernels.triton.attention.backward_absolute import absolute_kernel
from speeder_kernels.triton.attention.backward_keys import keys_kernel
from speeder_kernels.triton.attention.backward_queries import queries_kernel
from speeder_kernels.triton.attention.backward_relative import relative_kernel
from speeder_kernels.triton.attention.backward_rows import row_terms_kernel
from speeder_kernels.triton.attention.bias import LOG2E
from speeder_kernels.triton.attention.decode import combine_kernel, decode_kernel
from speeder_kernels.triton.attention.forward import forward_kernel
from speeder_kernels.triton.attention.partial_tables import PAD, reduce_kernel
from speeder_kernels.triton.attention.tuples import Far, Inputs, KeyGradients, Ranks, RowTerms, Scales, Tables
from speeder_kernels.triton.tiles import cdiv, launch, processors

MOST_ROWS = 64  # queries of a sequence times query heads of a key head, up to which `decode_kernel` serves
MOST_SPLITS = 32  # of a sequence's keys, for `combine_kernel` holds them all
KEYS_OF_SPLIT = 256  # fewer are not worth a program of their own
KEYS_OF_BLOCK = 64  # whose sums `absolute_kernel` takes at once
PARTS_AT_ONCE = 32  # of the partial tables that `reduce_kernel` adds up: it waits on memory once for them
PROGRAMS_PER_PROCESSOR = 8  # that share out tiles among them, each with a partial table: so many even out


def spae_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rank_q: Tensor,
    rank_k: Tensor,
    relative_bias: Tensor | None,
    absolute_bias: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Output `(Tq, Hq, D)` and log-sum-exp `(Tq, Hq)` float32, +inf where a query sees no key.

    q, k, v: any strides but 1 in the last dimension. All else contiguous; lengths and ranks int32.
    """
    x = Inputs(rows(q), rows(k), rows(v))
    ranks = Ranks(cu_seqlens_q, cu_seqlens_k, rank_q, rank_k)
    tables = Tables(relative_bias, absolute_bias)
    lengths = lengths_of(x, ranks, tables)
    if max_seqlen_q * lengths.group <= MOST_ROWS:
        return _decode(x, ranks, tables, lengths, max_seqlen_q, max_seqlen_k, scale, causal)
    return _forward(x, ranks, tables, lengths, scale, causal)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[:2], dtype=torch.float32
    )


def _forward(
    x: Inputs, ranks: Ranks, tables: Tables, lengths: Lengths, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    q = x.q.data
    shape, options = tile_shape(q, "forward")
    ranks = describe(ranks, tables, lengths, shape)
    out, lse = _outputs(q)
    launch(
        forward_kernel, (tiles(lengths.tokens_q, lengths, shape.Q) * lengths.heads,),
        out, lse, x, ranks, tables, *lengths.of_queries(), scale * LOG2E.value,
        CAUSAL=causal, TILE=shape.constants(), **options, fuse=True,
    )  # fmt: skip
    return out, lse


def _decode(
    x: Inputs,
    ranks: Ranks,
    tables: Tables,
    lengths: Lengths,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    q, (tokens, heads, size) = x.q.data, x.q.data.shape
    shape, options = tile_shape(q, "decode")
    blocks_q = cdiv(max_seqlen_q * lengths.group, shape.Q)
    programs = lengths.sequences * lengths.key_heads * blocks_q
    # As many parts as fill the device twice over.
    most = min(MOST_SPLITS, cdiv(max_seqlen_k, KEYS_OF_SPLIT))
    splits = max(1, min(most, 2 * processors(q.device) // programs))
    out, lse = _outputs(q)
    parts = q.new_empty((tokens, heads, splits, size), dtype=torch.float32)
    # A row of a sequence that is longer than was told belongs to no program, and becomes NaN.
    parts_lse2 = q.new_full((tokens, heads, splits), float("nan"), dtype=torch.float32)
    launch(
        decode_kernel, (programs * splits,),
        parts, parts_lse2, x, ranks, tables,
        lengths.key_heads, lengths.group, splits, blocks_q, lengths.buckets, lengths.positions, scale * LOG2E.value,
        CAUSAL=causal, TILE=shape.constants(), **options, fuse=True,
    )  # fmt: skip
    launch(
        combine_kernel, (tokens * heads,),
        out, lse, parts, parts_lse2, ranks.cu_seqlens_q, splits, heads, lengths.sequences,
        D=size, BLOCK_D=shape.BLOCK_D, BLOCK_S=MOST_SPLITS, num_warps=4, fuse=True,
    )  # fmt: skip
    return out, lse


def spae_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rank_q: Tensor,
    rank_k: Tensor,
    relative_bias: Tensor | None,
    absolute_bias: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the two tables; empty where the bit of `needs` is 0. Tensors as in `spae_attention`.

    The longest lengths, which CUDA's grids need, are not used.
    """
    need_q, need_k, need_v, need_relative, need_absolute = (bool(needs >> n & 1) for n in range(5))
    x = Inputs(rows(q), rows(k), rows(v), rows(grad))
    ranks = Ranks(cu_seqlens_q, cu_seqlens_k, rank_q, rank_k)
    tables = Tables(relative_bias, absolute_bias)
    lengths = lengths_of(x, ranks, tables)
    tokens_q, tokens_k, heads = lengths.tokens_q, lengths.tokens_k, lengths.heads
    scales = Scales(scale, scale * LOG2E.value)
    grad_q, grad_k, grad_v = (
        like.new_empty(like.shape if need else (0, *like.shape[1:]))
        for like, need in ((q, need_q), (k, need_k), (v, need_v))
    )
    grad_relative, grad_absolute = (
        q.new_empty((0, columns), dtype=torch.float32) for columns in (lengths.buckets, lengths.positions)
    )
    if not needs:
        return grad_q, grad_k, grad_v, grad_relative, grad_absolute

    terms = RowTerms(*(q.new_empty((heads, tokens_q), dtype=torch.float32) for _ in range(2)))
    shape, options = tile_shape(q, "row_terms")
    launch(
        row_terms_kernel, (cdiv(tokens_q, shape.Q) * heads,),
        terms, x.grad, out, lse, tokens_q, heads, TILE=shape.constants(), **options, fuse=True,
    )  # fmt: skip

    # The tables' gradients need a delta that is not of the rounded output: see backward_rows.py.
    correct = (need_relative or need_absolute) and q.dtype != torch.float32
    if need_q or need_relative or correct:
        shape, options = tile_shape(q, "queries")
        described = describe(ranks, tables, lengths, shape)
        far = torch.empty_like(terms.delta) if need_relative else None
        launch(
            queries_kernel, (tiles(tokens_q, lengths, shape.Q) * heads,),
            grad_q if need_q else None, far, x, terms, described, tables, *lengths.of_queries(), scales,
            CORRECT=correct, CAUSAL=causal, TILE=shape.constants(), **options, fuse=True,
        )  # fmt: skip
    if need_relative:
        far = Far(far, described.summary_q, described.summary_k)
        far_tile = shape
        shape, options = tile_shape(q, "relative")
        described = describe(ranks, tables, lengths, shape)
        pieces = tiles(tokens_q, lengths, shape.Q)
        slots = _slots(q, pieces)
        partials = relative_bias.new_empty(slots, heads, lengths.buckets + 2 * PAD.value)
        launch(
            relative_kernel, (slots * heads,),
            partials, far, x, terms, described, tables, *lengths.of_queries(), pieces, slots, scales.base2,
            CAUSAL=causal, PRECISION=_one_hot_precision(q), TILE=shape.constants(), FAR_TILE=far_tile.constants(),
            **options, fuse=True,
        )  # fmt: skip
        grad_relative = _reduce(partials, relative_bias, PAD.value)

    if need_k or need_v or need_absolute:
        shape, options = tile_shape(q, "keys")
        described = describe(ranks, tables, lengths, shape)
        column_sums = q.new_empty((heads, tokens_k), dtype=torch.float32) if need_absolute else None
        grads = KeyGradients(grad_k if need_k else None, grad_v if need_v else None, column_sums)
        # Where the registers do not hold both gradients, the kernel runs once for each.
        passes = [grads._replace(k=None, column_sums=None), grads._replace(v=None)]
        for wanted in passes if options.pop("separate", 0) else [grads]:
            if any(target is not None for target in wanted):
                launch(
                    keys_kernel, (tiles(tokens_k, lengths, shape.K) * lengths.key_heads,),
                    wanted, x, terms, described, tables, *lengths.of_keys(), scales,
                    CAUSAL=causal, TILE=shape.constants(), **options, fuse=True,
                )  # fmt: skip
        if need_absolute:
            grad_absolute = _absolute_gradient(column_sums, rank_k, absolute_bias)
    return grad_q, grad_k, grad_v, grad_relative, grad_absolute


def _one_hot_precision(q: Tensor) -> str:
    """How `multiply_in_parts` does: in bfloat16 where the rest is no more exact."""
    if q.dtype == torch.bfloat16:
        return "bf16"
    return "ieee" if torch.version.hip else "tf32"


def _slots(q: Tensor, pieces: int) -> int:
    """How many programs a head of `q (T, Hq, ...)` share its pieces of work, and hold a partial table each."""
    return min(pieces, cdiv(PROGRAMS_PER_PROCESSOR * processors(q.device), q.shape[1]))


def _absolute_gradient(column_sums: Tensor, rank_k: Tensor, absolute: Tensor) -> Tensor:
    """`(Hq, A)` from the sums `(Hq, Tk)` over each key's queries."""
    heads, tokens = column_sums.shape
    slots = _slots(column_sums.T, cdiv(tokens, KEYS_OF_BLOCK))
    partials = absolute.new_empty(slots, *absolute.shape)
    launch(
        absolute_kernel, (slots * heads,), partials, column_sums, rank_k, tokens, heads,
        absolute.shape[1], slots,
        BLOCK_K=KEYS_OF_BLOCK, num_warps=4, fuse=True,
    )  # fmt: skip
    return _reduce(partials, absolute, 0)


def _reduce(partials: Tensor, table: Tensor, padding: int) -> Tensor:
    """The sum of partial tables `(slots, Hq, R + 2 padding)`, shaped as `table`."""
    out = torch.empty_like(table)
    heads, buckets = table.shape
    launch(
        reduce_kernel, (heads * cdiv(buckets, 128),), out, partials, heads, buckets, partials.shape[0],
        PADDING=padding, BLOCK=128, BLOCK_P=PARTS_AT_ONCE, num_warps=8, fuse=True,
    )  # fmt: skip
    return out
