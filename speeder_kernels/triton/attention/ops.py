"""spae_attention in Triton: which kernels run, over which grids, with which tiles.

No launch depends on what stands in a tensor, so the host never waits for the device.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from speeder_kernels.dispatch import LARGEST_HEAD
from speeder_kernels.triton.attention.backward import keys_kernel, queries_kernel, row_terms_kernel
from speeder_kernels.triton.attention.bias import LOG2E, describe_kernel
from speeder_kernels.triton.attention.decode import combine_kernel, decode_kernel
from speeder_kernels.triton.attention.forward import forward_kernel
from speeder_kernels.triton.attention.tables import PAD, absolute_kernel, reduce_kernel, relative_kernel
from speeder_kernels.triton.tiles import Tile, cdiv, launch, processors, tile

OP = "spae_attention"
MOST_ROWS = 64  # queries of a sequence times query heads of a key head, up to which `decode_kernel` serves
MOST_SPLITS = 32  # of a sequence's keys, for `combine_kernel` holds them all
KEYS_OF_SPLIT = 256  # fewer are not worth a program of their own
KEYS_OF_BLOCK = 64  # whose sums `absolute_kernel` takes at once
PARTS_AT_ONCE = 32  # of the partial tables that `reduce_kernel` adds up: it waits on memory once for them
PROGRAMS_PER_PROCESSOR = 8  # that share out tiles among them, each with a partial table: so many even out


def _tile(x: Tensor, name: str) -> tuple[Tile, Tile]:
    """A kernel's row of the table of tiles, as the constants of its blocks and the options of its launch."""
    size = x.shape[-1]
    if size > LARGEST_HEAD:  # the table of tiles has no rows for it
        raise ValueError(
            f"q: expected a head dimension of at most {LARGEST_HEAD} for the triton backend, got {size}"
        )
    block_d = max(16, triton.next_power_of_2(size))
    row = tile(x.device, OP, name, block_d, x.element_size())
    blocks = {key.upper(): row[key] for key in ("block_q", "block_k") if key in row}
    options = {key: value for key, value in row.items() if not key.startswith("block_")}
    return {"D": size, "BLOCK_D": block_d, **blocks}, options


def _tiles(tokens: int, cu_seqlens: Tensor, block: int) -> int:
    """As `bias.py` numbers them: of the sequences, and of the tail behind them."""
    return tokens // block + cu_seqlens.shape[0]


def _heads_strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:2])


def _summaries(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    rank_q: Tensor,
    rank_k: Tensor,
    relative: Tensor | None,
    blocks: Tile,
) -> tuple[Tensor | None, Tensor | None]:
    """What the ranks of each tile of queries and of keys are, which the relative bias depends on."""
    if relative is None:
        return None, None
    block_q, block_k = blocks["BLOCK_Q"], blocks["BLOCK_K"]
    tiles_q, tiles_k = _tiles(q.shape[0], cu_seqlens_q, block_q), _tiles(k.shape[0], cu_seqlens_k, block_k)
    summaries = rank_q.new_empty(tiles_q, 2), rank_k.new_empty(tiles_k, 2)
    launch(
        describe_kernel, (tiles_q + tiles_k,), *summaries, cu_seqlens_q, cu_seqlens_k, rank_q, rank_k,
        cu_seqlens_q.shape[0] - 1, tiles_q, BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=4, fuse=True,
    )  # fmt: skip
    return summaries


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
    arguments = (
        q, k, v, cu_seqlens_q, cu_seqlens_k, rank_q, rank_k, relative_bias, absolute_bias
    )  # fmt: skip
    if max_seqlen_q * (q.shape[1] // k.shape[1]) <= MOST_ROWS:
        return _decode(*arguments, max_seqlen_q, max_seqlen_k, scale, causal)
    return _forward(*arguments, scale, causal)


def _sizes(relative: Tensor | None, absolute: Tensor | None) -> tuple[int, int]:
    return tuple(0 if table is None else table.shape[1] for table in (relative, absolute))


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[:2], dtype=torch.float32
    )


def _forward(q, k, v, cu_q, cu_k, rank_q, rank_k, relative, absolute, scale, causal):
    heads, sequences = q.shape[1], cu_q.shape[0] - 1
    blocks, options = _tile(q, "forward")
    summaries = _summaries(q, k, cu_q, cu_k, rank_q, rank_k, relative, blocks)
    buckets, positions = _sizes(relative, absolute)
    out, lse = _outputs(q)
    launch(
        forward_kernel, (_tiles(q.shape[0], cu_q, blocks["BLOCK_Q"]) * heads,),
        out, lse, q, k, v, cu_q, cu_k, rank_q, rank_k, relative, absolute, *summaries,
        *_heads_strides(q, k, v), q.shape[0], heads, heads // k.shape[1], sequences, buckets, positions,
        scale * LOG2E.value, CAUSAL=causal, **blocks, **options, fuse=True,
    )  # fmt: skip
    return out, lse


def _decode(q, k, v, cu_q, cu_k, rank_q, rank_k, relative, absolute, max_q, max_k, scale, causal):
    (tokens, heads, size), key_heads, sequences = q.shape, k.shape[1], cu_q.shape[0] - 1
    group = heads // key_heads
    blocks, options = _tile(q, "decode")
    blocks_q = cdiv(max_q * group, blocks["BLOCK_Q"])
    programs = sequences * key_heads * blocks_q
    # As many parts as fill the device twice over.
    splits = max(1, min(MOST_SPLITS, 2 * processors(q.device) // programs, cdiv(max_k, KEYS_OF_SPLIT)))
    out, lse = _outputs(q)
    target = (out, lse)
    if splits == 1:  # rows behind the last sequence belong to no program
        out.zero_()
        lse.fill_(float("inf"))
    else:
        target = (
            q.new_empty((tokens, heads, splits, size), dtype=torch.float32),
            q.new_empty((tokens, heads, splits), dtype=torch.float32),
        )
    buckets, positions = _sizes(relative, absolute)
    launch(
        decode_kernel, (programs * splits,), *target, q, k, v, cu_q, cu_k, rank_q, rank_k, relative, absolute,
        *_heads_strides(q, k, v), key_heads, group, splits, blocks_q, buckets, positions, scale * LOG2E.value,
        CAUSAL=causal, SPLIT=splits > 1, **blocks, **options, fuse=True,
    )  # fmt: skip
    if splits > 1:
        launch(
            combine_kernel, (tokens * heads,), out, lse, *target, cu_q, splits, heads, sequences,
            D=size, BLOCK_D=blocks["BLOCK_D"], BLOCK_S=MOST_SPLITS, num_warps=4, fuse=True,
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
    (tokens_q, heads, _), (tokens_k, key_heads, _) = q.shape, k.shape
    group, sequences = heads // key_heads, cu_seqlens_q.shape[0] - 1
    buckets, positions = _sizes(relative_bias, absolute_bias)
    ranks = (cu_seqlens_q, cu_seqlens_k, rank_q, rank_k)
    grad_q, grad_k, grad_v = (
        x.new_empty(x.shape if need else (0, *x.shape[1:]))
        for x, need in ((q, need_q), (k, need_k), (v, need_v))
    )
    grad_relative, grad_absolute = (
        q.new_empty((0, columns), dtype=torch.float32) for columns in (buckets, positions)
    )
    if not needs:
        return grad_q, grad_k, grad_v, grad_relative, grad_absolute

    lse2, delta = (q.new_empty((heads, tokens_q), dtype=torch.float32) for _ in range(2))
    blocks, options = _tile(q, "row_terms")
    launch(
        row_terms_kernel, (cdiv(tokens_q, blocks["BLOCK_Q"]) * heads,), lse2, delta, grad, out, lse,
        *_heads_strides(grad), tokens_q, heads, **blocks, **options, fuse=True,
    )  # fmt: skip

    # The tables' gradients need a delta that is not of the rounded output: see backward.py.
    correct = (need_relative or need_absolute) and q.dtype != torch.float32
    if need_q or need_relative or correct:
        blocks, options = _tile(q, "queries")
        summaries = _summaries(q, k, *ranks, relative_bias, blocks)
        far = torch.empty_like(delta) if need_relative else None
        launch(
            queries_kernel, (_tiles(tokens_q, cu_seqlens_q, blocks["BLOCK_Q"]) * heads,), grad,
            grad_q if need_q else None, far, q, k, v, lse2, delta, *ranks, relative_bias, absolute_bias,
            *summaries, *_heads_strides(grad, q, k, v), tokens_q, heads, group, sequences, buckets, positions,
            scale, scale * LOG2E.value, CORRECT=correct, CAUSAL=causal, **blocks, **options, fuse=True,
        )  # fmt: skip
    if need_relative:
        far_summaries, far_sizes = summaries, {"FAR_Q": blocks["BLOCK_Q"], "FAR_K": blocks["BLOCK_K"]}
        blocks, options = _tile(q, "relative")
        summaries = _summaries(q, k, *ranks, relative_bias, blocks)
        tiles = _tiles(tokens_q, cu_seqlens_q, blocks["BLOCK_Q"])
        slots = _slots(q, tiles)
        partials = relative_bias.new_empty(slots, heads, buckets + 2 * PAD.value)
        launch(
            relative_kernel, (slots * heads,), partials, far, grad, q, k, v, lse2, delta, *ranks,
            relative_bias, absolute_bias, *summaries, *far_summaries, *_heads_strides(grad, q, k, v), tokens_q,
            heads, group, sequences, buckets, positions, scale * LOG2E.value, tiles, slots,
            CAUSAL=causal, PRECISION=_one_hot_precision(q),
            **blocks, **far_sizes, **options, fuse=True,
        )  # fmt: skip
        grad_relative = _reduce(partials, relative_bias, PAD.value)

    if need_k or need_v or need_absolute:
        blocks, options = _tile(q, "keys")
        summaries = _summaries(q, k, *ranks, relative_bias, blocks)
        column_sums = q.new_empty((heads, tokens_k), dtype=torch.float32) if need_absolute else None
        tiles_k = _tiles(tokens_k, cu_seqlens_k, blocks["BLOCK_K"])
        both = (grad_k if need_k else None, grad_v if need_v else None, column_sums)
        # Where the registers do not hold both gradients, the kernel runs once for each.
        passes = [(None, both[1], None), (both[0], None, both[2])] if options.pop("separate", 0) else [both]
        for targets in passes:
            if any(target is not None for target in targets):
                launch(
                    keys_kernel, (tiles_k * key_heads,), grad, *targets, q, k, v, lse2, delta,
                    *ranks, relative_bias, absolute_bias, *summaries,
                    *_heads_strides(grad, q, k, v), tokens_q, tokens_k, key_heads, group, sequences, buckets,
                    positions, scale, scale * LOG2E.value, CAUSAL=causal, **blocks, **options, fuse=True,
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
