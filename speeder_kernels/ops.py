"""torch.library registration: schemas, fake kernels, autograd, and the call of the backend that was chosen.

Each public op is `speeder::NAME`, with `speeder::NAME_backward` where there is a gradient; the last argument
is the backend's name, or None to pick one. It is settled inside the op, where the compiler does not look: so a
compiled graph finds and loads backends as any other call does. Compiled kernels are ops of their own,
`speeder::NAME_kernel`, registered under the CPU and CUDA dispatch keys by the compiled libraries, once `dispatch`
has loaded them: the key picks the library. Triton's are functions of the same arguments, in the modules that
`speeder_kernels.triton.MODULES` names.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from speeder_kernels import derivatives, reference, reference_attention, validate
from speeder_kernels.dispatch import choose
from speeder_kernels.triton import MODULES

_LIBRARY = torch.library.Library("speeder", "DEF")
_OPS = torch.ops.speeder


def _define(schema: str, decides: int) -> Callable:
    """Register the decorated function as an op for every device, with autocast off inside it.

    Argument number `decides` is the tensor by which the backend is chosen; the function is called with its name.
    """
    name = schema.split("(")[0]
    op = name.removesuffix("_backward")

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def kernel(*args):
            *rest, backend = args
            tensor = args[decides]
            derivatives.refuse_forward_mode(op, *args)
            with torch.autocast(tensor.device.type, enabled=False):
                results = function(*rest, choose(op, backend, tensor))
            # as the fakes say; the reference's may have the strides of its inputs
            return (
                tuple(x.contiguous() for x in results) if isinstance(results, tuple) else results.contiguous()
            )

        _LIBRARY.define(schema)
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        return function

    return register


def _fake(name: str) -> Callable:
    return torch.library.register_fake(f"speeder::{name}", lib=_LIBRARY)


def _kernel(op: str, backend: str, part: str = "") -> Callable:
    """What runs `op`, or another `part` of it (its backward, say), on `backend`."""
    if backend == "triton":  # imported at the first call: most users never need it
        return getattr(importlib.import_module(f"speeder_kernels.triton.{MODULES[op]}"), part or op)
    return getattr(_OPS, f"{part or op}_kernel")


def _needed(x: Tensor, shape: tuple, need: bool) -> Tensor:
    """The fake of a gradient: `shape`, or `(0,) + shape[1:]` where nobody needs it."""
    return x.new_empty(shape if need else (0, *shape[1:]))


# --- spae_attention -----------------------------------------------------------------------------------------

_SPAE_ARGS = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor rank_q, Tensor rank_k, Tensor? relative_bias, "
    "Tensor? absolute_bias, SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, bool causal"
)
# What _ops.so and _ops_cuda.so implement. `needs` is a bit for each of q, k, v, relative_bias and absolute_bias.
_LIBRARY.define(f"spae_attention_kernel(Tensor q, Tensor k, Tensor v, {_SPAE_ARGS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"spae_attention_backward_kernel(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SPAE_ARGS}, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()


def _nan_unless_they_fit(ranks: tuple[Tensor, Tensor]) -> Tensor:
    """0, or NaN where a rank does not fit int32; found out without waiting for the device."""
    fit = [(rank == rank.to(torch.int32)).all() for rank in ranks]
    return torch.where(torch.stack(fit).all(), 0.0, torch.nan)


def _longest(q: Tensor, k: Tensor, max_q: int, max_k: int) -> tuple[int, int]:
    """As the kernels take them: "or more" may be more than the int32 in which tiles are counted, and where nobody reads
    the lengths, none at all may be told."""
    return max(1, min(max_q, q.shape[0])), max(1, min(max_k, k.shape[0]))


def _dense_rows(x: Tensor) -> Tensor:
    """The kernels take any strides but in the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


@_define(
    "spae_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor rank_q, Tensor rank_k, Tensor? relative_bias, "
    "Tensor? absolute_bias, float softmax_scale, bool causal, str? backend) -> (Tensor, Tensor)",
    decides=0,
)
def _spae_attention(
    q, k, v, cu_q, cu_k, max_q, max_k, rank_q, rank_k, relative_bias, absolute_bias, scale, causal, backend
):
    validate.check_token_count("q", q.shape[0])
    validate.check_token_count("k", k.shape[0])
    tables = [relative_bias, absolute_bias]
    if validate.reads_values(q, backend):
        validate.check_cu_seqlens_values("cu_seqlens_q", cu_q, q.shape[0], "max_seqlen_q", max_q)
        validate.check_cu_seqlens_values("cu_seqlens_k", cu_k, k.shape[0], "max_seqlen_k", max_k)
        validate.check_int32_values("rank_q", rank_q)
        validate.check_int32_values("rank_k", rank_k)
    elif torch.int64 in (rank_q.dtype, rank_k.dtype):
        # No error can be raised without waiting: all scores that a rank takes part in become NaN.
        poison = _nan_unless_they_fit((rank_q, rank_k))
        tables = [None if table is None else table + poison for table in tables]
    if q.shape[0] == 0 or k.shape[0] == 0:  # no query, or none that sees a key
        lse = q.new_full(q.shape[:2], float("inf"), dtype=reference.accumulate_dtype(q.dtype))
        return q.new_zeros(q.shape), lse
    if backend != "reference":
        dense = (_dense_rows(x) for x in (q, k, v))
        small = (_int32(x) for x in (cu_q, cu_k, rank_q, rank_k))
        tables = (None if table is None else table.contiguous() for table in tables)
        longest = _longest(q, k, max_q, max_k)
        return _kernel("spae_attention", backend)(*dense, *small, *tables, *longest, scale, causal)
    return reference_attention.spae_attention(
        q, k, v, cu_q, cu_k, rank_q, rank_k, relative_bias, absolute_bias, scale, causal
    )


@_fake("spae_attention")
def _(
    q, k, v, cu_q, cu_k, max_q, max_k, rank_q, rank_k, relative_bias, absolute_bias, scale, causal, backend
):
    lse = q.new_empty(q.shape[:2], dtype=reference.accumulate_dtype(q.dtype))
    return q.new_empty(q.shape), lse


@_define(
    f"spae_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SPAE_ARGS}, bool[] needs, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    decides=1,
)
def _spae_attention_backward(grad, q, k, v, out, lse, *rest):
    *small, relative_bias, absolute_bias, max_q, max_k, scale, causal, needs, backend = rest
    tables = (relative_bias, absolute_bias)
    if q.shape[0] == 0 or k.shape[0] == 0:
        return tuple(x.zero_() for x in _spae_gradients(q, k, v, *tables, needs))
    if backend == "reference":
        return reference_attention.spae_attention_backward(
            grad, q, k, v, *small, *tables, scale, causal, needs
        )
    dense = (_dense_rows(x) for x in (grad, q, k, v))
    small = (_int32(x) for x in small)
    tables = (None if table is None else table.contiguous() for table in tables)
    longest = _longest(q, k, max_q, max_k)
    bits = sum(need << n for n, need in enumerate(needs))
    kernel = _kernel("spae_attention", backend, "spae_attention_backward")
    return kernel(*dense, out, lse, *small, *tables, *longest, scale, causal, bits)


def _spae_gradients(q, k, v, relative_bias, absolute_bias, needs):
    """Tensors for the gradients; empty where `needs` is false."""
    dense = [_needed(x, x.shape, need) for x, need in zip((q, k, v), needs[:3], strict=True)]
    tables = [
        q.new_empty(0, 0) if table is None else _needed(table, table.shape, need)
        for table, need in zip((relative_bias, absolute_bias), needs[3:], strict=True)
    ]
    return (*dense, *tables)


@_fake("spae_attention_backward")
def _(
    grad,
    q,
    k,
    v,
    out,
    lse,
    cu_q,
    cu_k,
    rank_q,
    rank_k,
    relative_bias,
    absolute_bias,
    max_q,
    max_k,
    scale,
    causal,
    needs,
    backend,
):
    return _spae_gradients(q, k, v, relative_bias, absolute_bias, needs)


def _spae_setup(ctx, inputs, output):
    q, k, v, cu_q, cu_k, max_q, max_k, rank_q, rank_k, *tables, scale, causal, backend = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, rank_q, rank_k, *tables)
    ctx.mark_non_differentiable(lse)
    ctx.constants = (max_q, max_k, scale, causal)
    ctx.backend = backend


def _spae_backward(ctx, grad, _grad_lse):
    needs = [ctx.needs_input_grad[n] for n in (0, 1, 2, 9, 10)]
    grads = _OPS.spae_attention_backward(grad, *ctx.saved_tensors, *ctx.constants, needs, ctx.backend)
    q, k, v, relative, absolute = (g if need else None for g, need in zip(grads, needs, strict=True))
    return q, k, v, None, None, None, None, None, None, relative, absolute, None, None, None


derivatives.register(_LIBRARY, "spae_attention", _spae_backward, _spae_setup)


# --- pack_tokens --------------------------------------------------------------------------------------------

_PACK_ARGS = (
    "Tensor input_ids, Tensor text_embedding, Tensor item_tokens, Tensor item_rows, Tensor ranks, "
    "Tensor position_prompts"
)
_PACK_BACKWARD_ARGS = (
    "Tensor grad, Tensor input_ids, Tensor item_rows, Tensor ranks, SymInt[] sizes, bool[] needs"
)
# What _ops.so (CPU) and _ops_cuda.so (CUDA) implement.
_LIBRARY.define(f"pack_tokens_kernel({_PACK_ARGS}) -> Tensor")
_LIBRARY.define(
    "pack_values_fit_kernel(Tensor input_ids, Tensor item_rows, Tensor ranks, SymInt vocabulary, SymInt items, "
    "SymInt prompts) -> bool"
)
_LIBRARY.define("sum_rows_kernel(Tensor grad, Tensor order, Tensor starts) -> Tensor")


@_define(f"pack_tokens({_PACK_ARGS}, str? backend) -> Tensor", decides=1)
def _pack_tokens(input_ids, text_embedding, item_tokens, item_rows, ranks, position_prompts, backend):
    indices = [x.contiguous() for x in (input_ids, item_rows, ranks)]
    sizes = [table.shape[0] for table in (text_embedding, item_tokens, position_prompts)]
    # The kernel's check is one pass; the other one finds out what is wrong, for the error.
    fit = backend == "cpu" and _OPS.pack_values_fit_kernel(*indices, *sizes)
    if not fit and validate.reads_values(input_ids, backend):
        validate.check_pack_values(input_ids, item_rows, ranks, sizes)
    if input_ids.shape[0] == 0:
        return text_embedding.new_empty(0, text_embedding.shape[1])
    if backend == "reference":
        return reference.pack_tokens(
            input_ids, text_embedding, item_tokens, item_rows, ranks, position_prompts
        )
    text, items, prompts = (x.contiguous() for x in (text_embedding, item_tokens, position_prompts))
    ids, rows, ranks = indices
    return _kernel("pack_tokens", backend)(ids, text, items, rows, ranks, prompts)


@_fake("pack_tokens")
def _(input_ids, text_embedding, item_tokens, item_rows, ranks, position_prompts, backend):
    return text_embedding.new_empty(input_ids.shape[0], text_embedding.shape[1])


@_define(f"pack_tokens_backward({_PACK_BACKWARD_ARGS}, str? backend) -> (Tensor, Tensor, Tensor)", decides=0)
def _pack_tokens_backward(grad, input_ids, item_rows, ranks, sizes, needs, backend):
    if input_ids.shape[0] == 0:
        return tuple(
            grad.new_zeros(size * need, grad.shape[1]) for size, need in zip(sizes, needs, strict=True)
        )
    sum_rows = reference.sum_rows if backend == "reference" else functools.partial(_sum_rows, backend)
    return reference.pack_tokens_backward(grad, input_ids, item_rows, ranks, sizes, needs, sum_rows)


def _sum_rows(backend: str, grad: Tensor, index: Tensor, size: int) -> Tensor:
    """`reference.sum_rows` by the backend's kernel: a stable sort lists each row's tokens in order."""
    rows, order = index.sort(stable=True)
    starts = torch.searchsorted(rows, torch.arange(size + 1, device=rows.device))
    return _kernel("pack_tokens", backend, "sum_rows")(grad.contiguous(), order, starts)


@_fake("pack_tokens_backward")
def _(grad, input_ids, item_rows, ranks, sizes, needs, backend):
    hidden = grad.shape[1]
    return tuple(_needed(grad, (size, hidden), need) for size, need in zip(sizes, needs, strict=True))


def _pack_setup(ctx, inputs, output):
    input_ids, text_embedding, item_tokens, item_rows, ranks, position_prompts, ctx.backend = inputs
    ctx.save_for_backward(input_ids, item_rows, ranks)
    ctx.sizes = [table.shape[0] for table in (text_embedding, item_tokens, position_prompts)]


def _pack_backward(ctx, grad):
    needs = [ctx.needs_input_grad[n] for n in (1, 2, 5)]
    grads = _OPS.pack_tokens_backward(grad, *ctx.saved_tensors, ctx.sizes, needs, ctx.backend)
    text, items, prompts = (g if need else None for g, need in zip(grads, needs, strict=True))
    return None, text, items, None, None, prompts, None


derivatives.register(_LIBRARY, "pack_tokens", _pack_backward, _pack_setup)


# --- compress_items -----------------------------------------------------------------------------------------

_COMPRESS_ARGS = "Tensor expert_outputs, Tensor gate_logits, Tensor present, Tensor norm_weight, float eps"
_COMPRESS_GRADS = "Tensor grad_tokens, Tensor grad_gates"
# What _ops.so implements. `needs` is a bit for each of expert_outputs, gate_logits and norm_weight.
_LIBRARY.define(f"compress_items_kernel({_COMPRESS_ARGS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"compress_items_backward_kernel({_COMPRESS_GRADS}, {_COMPRESS_ARGS}, int needs) -> (Tensor, Tensor, Tensor)"
)


def _compress_tensors(experts: Tensor, logits: Tensor, present: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """As the kernels take them: dense, and the small ones in float32."""
    return experts.contiguous(), _float32(logits), present.contiguous(), _float32(weight)


def _float32(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


@_define(f"compress_items({_COMPRESS_ARGS}, str? backend) -> (Tensor, Tensor)", decides=0)
def _compress_items(expert_outputs, gate_logits, present, norm_weight, eps, backend):
    if validate.reads_values(present, backend):
        validate.check_present_values(present)
    if expert_outputs.shape[0] == 0:
        return _new_tokens(expert_outputs, gate_logits)
    if backend == "reference":
        return reference.compress_items(expert_outputs, gate_logits, present, norm_weight, eps)
    tensors = _compress_tensors(expert_outputs, gate_logits, present, norm_weight)
    return _kernel("compress_items", backend)(*tensors, eps)


def _new_tokens(expert_outputs: Tensor, gate_logits: Tensor) -> tuple[Tensor, Tensor]:
    gates = gate_logits.new_empty(gate_logits.shape, dtype=reference.accumulate_dtype(expert_outputs.dtype))
    return expert_outputs.new_empty(expert_outputs.shape[0], expert_outputs.shape[2]), gates


@_fake("compress_items")
def _(expert_outputs, gate_logits, present, norm_weight, eps, backend):
    return _new_tokens(expert_outputs, gate_logits)


@_define(
    f"compress_items_backward({_COMPRESS_GRADS}, {_COMPRESS_ARGS}, bool[] needs, str? backend) "
    "-> (Tensor, Tensor, Tensor)",
    decides=2,
)
def _compress_items_backward(
    grad_tokens, grad_gates, expert_outputs, gate_logits, present, norm_weight, eps, needs, backend
):
    if expert_outputs.shape[0] == 0:
        inputs = (expert_outputs, gate_logits, norm_weight)
        return tuple(_needed(x, x.shape, need).zero_() for x, need in zip(inputs, needs, strict=True))
    if backend == "reference":
        grads = reference.compress_items_backward(
            grad_tokens, grad_gates, expert_outputs, gate_logits, present, norm_weight, eps
        )
        return tuple(
            g if need else g.new_empty(0, *g.shape[1:]) for g, need in zip(grads, needs, strict=True)
        )
    tensors = _compress_tensors(expert_outputs, gate_logits, present, norm_weight)
    bits = sum(need << n for n, need in enumerate(needs))
    experts, logits, weight = _kernel("compress_items", backend, "compress_items_backward")(
        grad_tokens.contiguous(), _float32(grad_gates), *tensors, eps, bits
    )
    return experts, logits.to(gate_logits.dtype), weight.to(norm_weight.dtype)


@_fake("compress_items_backward")
def _(grad_tokens, grad_gates, expert_outputs, gate_logits, present, norm_weight, eps, needs, backend):
    inputs = (expert_outputs, gate_logits, norm_weight)
    return tuple(_needed(x, x.shape, need) for x, need in zip(inputs, needs, strict=True))


def _compress_setup(ctx, inputs, output):
    *tensors, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _compress_backward(ctx, grad_tokens, grad_gates):
    needs = [ctx.needs_input_grad[n] for n in (0, 1, 3)]
    grads = _OPS.compress_items_backward(
        grad_tokens, grad_gates, *ctx.saved_tensors, ctx.eps, needs, ctx.backend
    )
    experts, logits, weight = (g if need else None for g, need in zip(grads, needs, strict=True))
    return experts, logits, None, weight, None, None


derivatives.register(_LIBRARY, "compress_items", _compress_backward, _compress_setup)


# --- item_cross_entropy -------------------------------------------------------------------------------------


_CROSS_ENTROPY_ARGS = "Tensor hidden, Tensor item_table, Tensor targets"
# What _ops.so implements. `needs` is a bit for each of hidden and item_table.
_LIBRARY.define(
    f"item_cross_entropy_kernel({_CROSS_ENTROPY_ARGS}, float scale, Tensor? log_q) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"item_cross_entropy_backward_kernel(Tensor grad, {_CROSS_ENTROPY_ARGS}, Tensor lse, float scale, "
    "Tensor? log_q, int needs) -> (Tensor, Tensor)"
)


@_define(
    "item_cross_entropy(Tensor hidden, Tensor item_table, Tensor targets, float scale, Tensor? log_q, "
    "str? backend) -> (Tensor, Tensor)",
    decides=0,
)
def _item_cross_entropy(hidden, item_table, targets, scale, log_q, backend):
    if log_q is not None:
        validate.check_constant("log_q", log_q)  # again, since vmap's wrapper does not tell
    if validate.reads_values(targets, backend):
        validate.check_range("targets", targets, 0, item_table.shape[0])
        if log_q is not None:
            validate.check_finite_values("log_q", log_q)
    if hidden.shape[0] == 0:
        return _new_losses(hidden)
    if backend != "reference":
        tensors = (x.contiguous() for x in (hidden, item_table, targets))
        log_q = None if log_q is None else _float32(log_q)
        return _kernel("item_cross_entropy", backend)(*tensors, scale, log_q)
    return reference.item_cross_entropy(hidden, item_table, targets, scale, log_q)


def _new_losses(hidden: Tensor) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulate_dtype(hidden.dtype)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(2))


@_fake("item_cross_entropy")
def _(hidden, item_table, targets, scale, log_q, backend):
    return _new_losses(hidden)


@_define(
    "item_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor item_table, Tensor targets, Tensor lse, "
    "float scale, Tensor? log_q, bool[] needs, str? backend) -> (Tensor, Tensor)",
    decides=1,
)
def _item_cross_entropy_backward(grad, hidden, item_table, targets, lse, scale, log_q, needs, backend):
    if hidden.shape[0] == 0:
        inputs = (hidden, item_table)
        return tuple(_needed(x, x.shape, need).zero_() for x, need in zip(inputs, needs, strict=True))
    if backend == "reference":
        return reference.item_cross_entropy_backward(
            grad, hidden, item_table, targets, lse, scale, log_q, needs
        )
    tensors = (x.contiguous() for x in (grad, hidden, item_table, targets, lse))
    bits = sum(need << n for n, need in enumerate(needs))
    log_q = None if log_q is None else _float32(log_q)
    kernel = _kernel("item_cross_entropy", backend, "item_cross_entropy_backward")
    return kernel(*tensors, scale, log_q, bits)


@_fake("item_cross_entropy_backward")
def _(grad, hidden, item_table, targets, lse, scale, log_q, needs, backend):
    return tuple(_needed(x, x.shape, need) for x, need in zip((hidden, item_table), needs, strict=True))


def _cross_entropy_setup(ctx, inputs, output):
    hidden, item_table, targets, scale, log_q, backend = inputs
    ctx.save_for_backward(hidden, item_table, targets, output[1], log_q)
    ctx.mark_non_differentiable(output[1])
    ctx.constants = (scale, backend)


def _cross_entropy_backward(ctx, grad, _grad_lse):
    hidden, item_table, targets, lse, log_q = ctx.saved_tensors
    scale, backend = ctx.constants
    needs = list(ctx.needs_input_grad[:2])
    grads = _OPS.item_cross_entropy_backward(
        grad, hidden, item_table, targets, lse, scale, log_q, needs, backend
    )
    grad_hidden, grad_table = (g if need else None for g, need in zip(grads, needs, strict=True))
    return grad_hidden, grad_table, None, None, None, None


derivatives.register(_LIBRARY, "item_cross_entropy", _cross_entropy_backward, _cross_entropy_setup)


# --- topk_items ---------------------------------------------------------------------------------------------


# What _ops.so implements.
_LIBRARY.define(
    "topk_items_kernel(Tensor hidden, Tensor item_table, int k, Tensor? exclude_indptr, "
    "Tensor? exclude_items) -> (Tensor, Tensor)"
)


@_define(
    "topk_items(Tensor hidden, Tensor item_table, SymInt k, Tensor? exclude_indptr, Tensor? exclude_items, "
    "str? backend) -> (Tensor, Tensor)",
    decides=0,
)
def _topk_items(hidden, item_table, k, exclude_indptr, exclude_items, backend):
    checked = validate.reads_values(hidden, backend)
    if checked and exclude_indptr is not None:
        validate.check_exclude_values(exclude_indptr, exclude_items, item_table.shape[0])
    if hidden.shape[0] == 0:
        return _new_best(hidden, k)
    if backend == "reference":
        scores, items = reference.topk_items(hidden, item_table, k, exclude_indptr, exclude_items)
    else:
        excluded = (None if x is None else x.contiguous() for x in (exclude_indptr, exclude_items))
        kernel = _kernel("topk_items", backend)
        scores, items = kernel(hidden.contiguous(), item_table.contiguous(), k, *excluded)
    if checked:
        validate.check_finite_scores(scores)
        validate.check_topk_values(items, k)
    return scores, items


def _new_best(hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (hidden.shape[0], k)
    return hidden.new_empty(shape, dtype=torch.float32), hidden.new_empty(shape, dtype=torch.int64)


@_fake("topk_items")
def _(hidden, item_table, k, exclude_indptr, exclude_items, backend):
    return _new_best(hidden, k)
