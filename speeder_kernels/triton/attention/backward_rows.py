"""The backward pass of attention: what it computes, and its first kernel, which prepares two numbers a query.

No atomics: each sum belongs to one program, which adds in a fixed order.

    p = exp2(score - lse),  dp = grad . v,  ds = p * (dp - delta),  delta = grad . out = sum of p dp over the keys
    grad_v = p^T grad,  grad_k = scale ds^T q,  grad_q = scale ds k;  the tables' gradients are sums of ds.

In half precision `out` has been rounded, and grad . out is off by a little: by the same for a whole row, which adds up
in the tables' gradients. But a row's ds sum to nothing, so what they do sum to is that error. Where a table takes a
gradient, `queries_kernel` comes first, with CORRECT: it sums them up, and leaves delta as exact as float32 has it.

Shape letters: Q queries of a tile, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from speeder_kernels.triton.attention.bias import LOG2E
from speeder_kernels.triton.attention.sequences import load_rows, of_head
from speeder_kernels.triton.attention.tuples import (
    Rows,
    RowTerms,
    TileShape,
)


@triton.jit(do_not_specialize=["tokens", "heads"])
def row_terms_kernel(terms: RowTerms, grad: Rows, out, lse, tokens, heads, TILE: TileShape):
    """lse2 and delta, both (Hq, Tq): the log-sum-exp in base 2, and grad . out. `out` and `lse` are contiguous."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    first = tl.program_id(0) // heads * TILE.Q
    row_Q = (first + tl.arange(0, TILE.Q)).to(tl.int64)
    inside = row_Q < tokens
    grad_QD = load_rows(of_head(grad, head), first, tokens, TILE.Q, TILE, False)
    outs = Rows(data=out + head * TILE.D, stride=heads * TILE.D, head_stride=TILE.D)
    out_QD = load_rows(outs, first, tokens, TILE.Q, TILE, False)
    delta_Q = tl.sum(grad_QD.to(tl.float32) * out_QD.to(tl.float32), axis=1)
    lse_Q = tl.load(lse + row_Q * heads + head, mask=inside, other=0.0)
    tl.store(terms.delta + head * tokens + row_Q, delta_Q, mask=inside)
    tl.store(terms.lse2 + head * tokens + row_Q, lse_Q * LOG2E, mask=inside)
