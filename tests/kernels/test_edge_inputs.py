"""Empty tensors, and numbers that are none: every backend gives the right answer or names the argument."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import speeder_kernels as sk
from speeder_kernels import dispatch
from tests.kernels.places import all_places, at, places

FLOATS = {"q", "k", "v", "text_embedding", "item_tokens", "position_prompts", "expert_outputs", "gate_logits"}
FLOATS |= {"norm_weight", "hidden", "item_table", "relative_bias"}
SIZES = {"Tq": 3, "Tk": 3, "Hq": 2, "Hkv": 1, "D": 4, "B1": 2, "R": 2, "T": 3, "V": 5, "U": 2, "P": 2, "M": 2}
SIZES |= {"H": 4, "N": 3, "I": 5}
SHAPES = {
    "spae_attention": {
        "q": ("Tq", "Hq", "D"), "k": ("Tk", "Hkv", "D"), "v": ("Tk", "Hkv", "D"), "cu_seqlens_q": ("B1",),
        "cu_seqlens_k": ("B1",), "rank_q": ("Tq",), "rank_k": ("Tk",), "relative_bias": ("Hq", "R"),
    },
    "pack_tokens": {
        "input_ids": ("T",), "text_embedding": ("V", "H"), "item_tokens": ("U", "H"), "item_rows": ("T",),
        "ranks": ("T",), "position_prompts": ("P", "H"),
    },
    "compress_items": {
        "expert_outputs": ("U", "M", "H"), "gate_logits": ("U", "M"), "present": ("U", "M"), "norm_weight": ("H",),
    },
    "item_cross_entropy": {"hidden": ("N", "H"), "item_table": ("I", "H"), "targets": ("N",)},
    "topk_items": {"hidden": ("N", "H"), "item_table": ("I", "H")},
}  # fmt: skip
OTHERS = {
    "spae_attention": {"max_seqlen_q": 3, "max_seqlen_k": 3},
    "item_cross_entropy": {"scale": 1.0},
    "topk_items": {"k": 2},
}
# Sizes that may be 0 where nothing refers to what is not there; their results are looked at below.
ALLOWED = {("pack_tokens", "V"), ("pack_tokens", "U"), ("pack_tokens", "P"), ("spae_attention", "Tk")}
# Those of a batch of nothing, whose results are empty.
EMPTY = {
    "spae_attention": "Tq", "pack_tokens": "T", "compress_items": "U", "item_cross_entropy": "N", "topk_items": "N",
}  # fmt: skip


def everywhere(*cases: tuple) -> pytest.MarkDecorator:
    """Each `(op, ...)` with each backend and device that has the op."""
    table = [(*case, *place) for case in cases for place in all_places(case[0])]
    return pytest.mark.parametrize(("op", "case", "backend", "device"), table)


def arguments(op: str, sizes: dict[str, int]) -> dict:
    args = dict(OTHERS.get(op, {}))
    for name, shape in SHAPES[op].items():
        size = [sizes[letter] for letter in shape]
        if name in FLOATS:
            args[name] = torch.randn(size)
        elif name.startswith("cu_"):
            args[name] = torch.tensor([0, sizes["T" + name[-1]]][: size[0]], dtype=torch.int64)
        else:
            args[name] = torch.ones(size, dtype=torch.bool if name == "present" else torch.int64)
    return args


@everywhere(
    *(
        (op, size)
        for op, shapes in SHAPES.items()
        for size in dict.fromkeys(letter for shape in shapes.values() for letter in shape)
        if (op, size) not in ALLOWED and EMPTY[op] != size
    )
)
def test_an_empty_size_is_refused_by_name(op, case, backend, device):
    args = arguments(op, {**SIZES, case: 0})
    named = next(name for name, shape in SHAPES[op].items() if case in shape)
    with pytest.raises(ValueError, match=f"^{named}: expected at least one element"):
        at(getattr(sk, op), backend, device)(**args)


@pytest.fixture
def compiler():
    """What is compiled here counts in no other test: PyTorch compiles one function for few shapes only."""
    yield
    torch._dynamo.reset()


def answers(op: str, backend: str, device: str, args: dict) -> list[torch.Tensor]:
    """Results and gradients."""
    leaves = [args[name].requires_grad_() for name in SHAPES[op] if name in FLOATS]
    results = at(getattr(sk, op), backend, device)(**args)
    results = list(results) if isinstance(results, tuple) else [results]
    if results[0].requires_grad:
        grads = torch.autograd.grad(results[0].square().sum(), leaves, allow_unused=True)
        results += [grad for grad in grads if grad is not None]
    return results


def served(op: str, backend: str, args: dict) -> dict:
    """In a dtype that the backend takes."""
    if torch.float32 in dispatch.dtypes(op, backend):
        return args
    return args | {name: args[name].bfloat16() for name in "qkv"}


def no_queries() -> dict:
    """Two sequences, one of them with keys."""
    args = arguments("spae_attention", {**SIZES, "Tq": 0})
    lengths = {"cu_seqlens_q": torch.tensor([0, 0, 0]), "cu_seqlens_k": torch.tensor([0, 3, 3])}
    return {**args, **lengths, "max_seqlen_q": 0}


def no_sequences() -> dict:
    args = arguments("spae_attention", {**SIZES, "Tq": 0, "Tk": 0})
    lengths = {"cu_seqlens_q": torch.tensor([0]), "cu_seqlens_k": torch.tensor([0])}
    return {**args, **lengths, "max_seqlen_q": 0, "max_seqlen_k": 0}


def no_keys() -> dict:
    return {**arguments("spae_attention", {**SIZES, "Tk": 0}), "absolute_bias": torch.randn(2, 3)}


def no_rows() -> dict:
    lists = {"exclude_indptr": torch.zeros(1).long(), "exclude_items": torch.zeros(0).long()}
    return {**arguments("topk_items", {**SIZES, "N": 0}), **lists}


def no_targets() -> dict:
    return {**arguments("item_cross_entropy", {**SIZES, "N": 0}), "log_q": torch.zeros(5)}


NOTHING = {
    "spae_attention": [no_queries, no_sequences, no_keys],
    "pack_tokens": [lambda: arguments("pack_tokens", {**SIZES, "T": 0})],
    "compress_items": [lambda: arguments("compress_items", {**SIZES, "U": 0})],
    "item_cross_entropy": [no_targets],
    "topk_items": [no_rows],
}
RESULTS = {
    "spae_attention": [("Tq", "Hq", "D")], "pack_tokens": [("T", "H")], "compress_items": [("U", "H"), ("U", "M")],
    "item_cross_entropy": [("N",)], "topk_items": [("N", 2), ("N", 2)],
}  # fmt: skip


@everywhere(*((op, case) for op, cases in NOTHING.items() for case in cases))
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_of_nothing(op, case, backend, device, compiled):
    """Empty results (zeros for queries without keys) and zero gradients, in the shapes and dtypes of any batch."""
    sizes = {
        letter: size
        for name, shape in SHAPES[op].items()
        for letter, size in zip(shape, case()[name].shape, strict=True)
    }
    full = answers(op, backend, device, served(op, backend, arguments(op, SIZES)))
    args = served(op, backend, case())
    leaves = {name: args[name].requires_grad_() for name in SHAPES[op] if name in FLOATS}
    function = torch.compile(getattr(sk, op), backend="aot_eager") if compiled else getattr(sk, op)
    results = at(function, backend, device)(**args)
    results = list(results) if isinstance(results, tuple) else [results]
    shapes = [tuple(sizes.get(letter, letter) for letter in shape) for shape in RESULTS[op]]
    assert [tuple(result.shape) for result in results] == shapes
    assert [result.dtype for result in results] == [result.dtype for result in full[: len(results)]]
    assert all(result.eq(0).all() for result in results)
    assert results[0].requires_grad == (op != "topk_items")
    if op != "topk_items":
        sum(result.square().sum() for result in results).backward()
        for name, leaf in leaves.items():
            assert leaf.grad is not None and leaf.grad.shape == leaf.shape and leaf.grad.eq(0).all(), name


def nothing_but_text() -> dict:
    return {**arguments("pack_tokens", {**SIZES, "U": 0, "P": 0}), "item_rows": torch.full((3,), -1)}


def nothing_but_items() -> dict:
    return {**arguments("pack_tokens", {**SIZES, "V": 0, "P": 0}), "ranks": torch.full((3,), -1)}


def empty_lists() -> dict:
    lists = {"exclude_indptr": torch.zeros(4).long(), "exclude_items": torch.zeros(0).long()}
    return {**arguments("topk_items", SIZES), **lists}


def empty_sequences() -> dict:
    """The first has no tokens, the second no keys, the last no queries."""
    args = arguments("spae_attention", SIZES)
    return {
        **args,
        "cu_seqlens_q": torch.tensor([0, 0, 1, 3, 3]),
        "cu_seqlens_k": torch.tensor([0, 0, 0, 2, 3]),
    }


@everywhere(
    ("pack_tokens", nothing_but_text),
    ("pack_tokens", nothing_but_items),
    ("topk_items", empty_lists),
    ("spae_attention", empty_sequences),
)
def test_what_may_be_empty(op: str, case: Callable, backend, device):
    torch.manual_seed(1)
    args = served(op, backend, case())
    expected = answers(op, "reference", "cpu", args)
    assert len(expected) > 1
    torch.testing.assert_close(answers(op, backend, device, args), expected)


@everywhere(*(("item_cross_entropy", value) for value in (-torch.inf, torch.inf, torch.nan)))
def test_a_log_q_that_is_not_finite_is_refused(op, case, backend, device, monkeypatch):
    """-inf, the log of an item that is never drawn, would make the loss of every row infinite or NaN."""
    monkeypatch.setenv("SPEEDER_CHECK", "1")
    log_q = torch.zeros(5)
    log_q[3] = case
    message = f"log_q: expected finite numbers, got {case} at position 3"
    with pytest.raises(ValueError, match=message):
        at(sk.item_cross_entropy, backend, device)(**arguments(op, SIZES), log_q=log_q)


RAW_KERNELS = """
import torch
import speeder_kernels as sk
from speeder_kernels import dispatch

sk.backends()  # loads the kernels
ops, i64, i32 = torch.ops.speeder, dict(dtype=torch.int64), dict(dtype=torch.int32)
zeros, ids, one = torch.zeros, torch.zeros(2, **i64), torch.tensor([0, 1], **i32)

def attention(heads, key_heads, size):
    q, k, rank = zeros(1, heads, size), zeros(1, key_heads, size), zeros(1, **i32)
    rest = (one, one, rank, rank, None, None, 1, 1, 1.0, True)
    yield lambda: ops.spae_attention_kernel(q, k, k, *rest)
    yield lambda: ops.spae_attention_backward_kernel(q, q, k, k, q, zeros(1, heads), *rest, 7)

def compress(modalities, size):
    experts, gates, weight = zeros(2, modalities, size), zeros(2, modalities), zeros(size)
    yield lambda: ops.compress_items_kernel(experts, gates, gates == 0, weight, 1e-6)

rows = zeros(2, 0)
calls = [lambda: ops.pack_tokens_kernel(ids, rows, rows, ids, ids, rows)]
calls += [lambda: ops.item_cross_entropy_kernel(zeros(2, 4), zeros(0, 4), ids, 1.0, None)]
calls += [*attention(0, 1, 4), *attention(2, 0, 4), *attention(2, 1, 0), *attention(1, 3, 4), *attention(4, 3, 4)]
calls += [*compress(0, 4), *compress(2, 0)]
for n, call in enumerate(calls):
    print("call", n, flush=True)
    try:
        call()
    except RuntimeError:
        continue
    raise SystemExit(f"call {n} was not refused")
"""


def test_compiled_kernels_refuse_sizes_that_they_divide_by():
    """Called as they are, without the checks of the Python functions: an error, not the end of the process."""
    result = subprocess.run([sys.executable, "-c", RAW_KERNELS], capture_output=True, text=True)
    assert result.returncode == 0, (result.returncode, result.stdout[-20:], result.stderr[-2000:])


# --- what is not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "device"), all_places("topk_items"))
@pytest.mark.parametrize("sign", [1, -1])
def test_a_score_that_is_no_number_is_noticed_whatever_its_sign(backend, device, sign):
    """x86's own NaN has its sign bit set."""
    table = torch.tensor([[0.0, 9.0], [1.0, 0.0], [2.0, 0.0]])
    table[1, 0] = torch.copysign(torch.tensor(torch.nan), torch.tensor(float(sign)))
    with pytest.raises(ValueError, match="expected scores that are numbers, got NaN in row 0"):
        at(sk.topk_items, backend, device)(torch.tensor([[1.0, 1.0]]), table, 1)


@pytest.mark.parametrize(("backend", "device"), all_places("item_cross_entropy"))
def test_infinite_logits_give_no_finite_loss_or_gradient(backend, device):
    """As in PyTorch: a model that has diverged must not train on."""
    hidden, table = torch.ones(3, 4), torch.ones(6, 4)
    table[5] = torch.inf
    hidden, table = hidden.requires_grad_(), table.requires_grad_()
    loss = at(sk.item_cross_entropy, backend, device)(hidden, table, torch.tensor([0, 1, 2]), scale=1.0)
    assert loss.isnan().all()
    loss.sum().backward()
    assert hidden.grad.isnan().all() and table.grad.isnan().all()


@pytest.mark.parametrize(("backend", "device"), all_places("spae_attention"))
def test_an_infinite_score_gives_no_finite_output(backend, device):
    torch.manual_seed(0)
    q, k, v = (torch.rand(3, 1, 16) + 0.5 for _ in range(3))
    dtype = torch.float32 if torch.float32 in dispatch.dtypes("spae_attention", backend) else torch.bfloat16
    k[0] = torch.inf
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    starts, ranks = torch.tensor([0, 3], dtype=torch.int32), torch.arange(3, dtype=torch.int32)
    out = at(sk.spae_attention, backend, device)(q, k, v, starts, starts, 3, 3, ranks, ranks)
    assert out.isnan().all()
    out.float().sum().backward()
    assert v.grad[0].isnan().all() and q.grad.isnan().all()


# Triton multiplies an absent modality's gate, 0, with the item's gradient; to ask first would cost it registers.
@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), ("cpu", "cpu")])
def test_what_is_not_finite_does_not_leak_into_absent_modalities(backend, device):
    torch.manual_seed(0)
    experts, logits, weight = torch.randn(2, 2, 4), torch.randn(2, 2), torch.ones(4)
    present = torch.tensor([[True, False], [True, True]])
    experts, logits = experts.requires_grad_(), logits.requires_grad_()
    tokens, _ = at(sk.compress_items, backend, device)(experts, logits, present, weight)
    upstream = torch.ones(2, 4)
    upstream[0, 0] = torch.inf
    tokens.backward(upstream.to(tokens.device))
    assert (experts.grad[0, 1] == 0).all() and logits.grad[0, 1] == 0
    assert not experts.grad[0, 0].isfinite().all() and experts.grad[1].isfinite().all()


@pytest.mark.parametrize(("op", "backend", "device"), [(op, *place) for op in SHAPES for place in places(op)])
def test_results_are_dense_whatever_the_strides(op, backend, device):
    """Gradients too: a compiled graph takes them to be, and would not run."""
    args = served(op, backend, arguments(op, SIZES))
    for name in FLOATS & set(SHAPES[op]):
        args[name] = args[name].transpose(0, -1).contiguous().transpose(0, -1)
    parts = answers(op, backend, device, args)
    assert all(part.is_contiguous() for part in parts), [part.stride() for part in parts]
