"""spae_attention against a loop over every pair, in every dtype, and its edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder_kernels import reference_attention, spae_attention
from tests.kernels import naive

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "cpu")


def make(
    lengths_q, lengths_k, heads=4, kv_heads=2, size=8, buckets=(5, 3), dtype=torch.float32, seed=0
) -> dict:
    """Random arguments; values are rounded to bfloat16 so that every dtype sees the same numbers."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=draw).to(torch.bfloat16).to(dtype)

    total_q, total_k = sum(lengths_q), sum(lengths_k)
    bias_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    tables = [None if n is None else randn(heads, n).to(bias_dtype) for n in buckets]
    return {
        "q": randn(total_q, heads, size),
        "k": randn(total_k, kv_heads, size),
        "v": randn(total_k, kv_heads, size),
        "cu_seqlens_q": torch.tensor([0, *lengths_q]).cumsum(0).to(torch.int32),
        "cu_seqlens_k": torch.tensor([0, *lengths_k]).cumsum(0).to(torch.int32),
        "max_seqlen_q": max(lengths_q),
        "max_seqlen_k": max(lengths_k),
        "rank_q": torch.randint(-1, 9, (total_q,), generator=draw, dtype=torch.int32),
        "rank_k": torch.randint(-1, 9, (total_k,), generator=draw, dtype=torch.int32),
        "relative_bias": tables[0],
        "absolute_bias": tables[1],
    }


NAMES = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "rank_q", "rank_k", "relative_bias", "absolute_bias")


def run_naive(args: dict, causal: bool, scale=None) -> torch.Tensor:
    return naive.spae_attention(*(args[name] for name in NAMES), scale, causal)


def leaves(args: dict, dtype=None) -> tuple[dict, list[torch.Tensor]]:
    """A copy whose float tensors are leaves that take gradients, and those leaves."""
    out = dict(args)
    for name in ("q", "k", "v", "relative_bias", "absolute_bias"):
        if args[name] is not None:
            out[name] = args[name].detach().to(dtype or args[name].dtype).clone().requires_grad_()
    return out, [x for x in out.values() if isinstance(x, torch.Tensor) and x.requires_grad]


lengths = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=4).filter(
    lambda pairs: sum(a for a, _ in pairs) and sum(b for _, b in pairs)
)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None)
@given(
    lengths=lengths,
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (6, 2)]),
    size=st.sampled_from([1, 3, 8, 65]),
    buckets=st.tuples(st.sampled_from([None, 1, 5]), st.sampled_from([None, 1, 4])),
    causal=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10_000),
)
def test_matches_the_loop(backend, lengths, heads, size, buckets, causal, dtype, seed):
    """Output and every gradient, against float64 and against PyTorch in the same dtype."""
    lengths_q, lengths_k = zip(*lengths, strict=True)
    args = make(lengths_q, lengths_k, *heads, size, buckets, dtype, seed)
    ours, our_leaves = leaves(args)
    exact, exact_leaves = leaves(args, torch.float64)
    same, same_leaves = leaves(args)
    out, out_exact = spae_attention(**ours, causal=causal, backend=backend), run_naive(exact, causal)
    out_torch = naive.torch_attention(*(same[name] for name in NAMES), causal)
    grads, grads_exact, grads_torch = (
        naive.gradients(o, x)
        for o, x in ((out, our_leaves), (out_exact, exact_leaves), (out_torch, same_leaves))
    )
    naive.assert_accurate("out", out, out_exact, out_torch, args["v"].abs().max().item())
    # d score = p * (grad.v - grad.out): the two dot products may cancel, so they set the size of an error.
    products = 8 * args["v"].norm(dim=-1).max().item() * size**0.5
    largest = products * max(1.0, *(args[name].abs().max().item() for name in "qk"))
    names = [name for name in ("q", "k", "v", "relative_bias", "absolute_bias") if args[name] is not None]
    for name, a, b, c in zip(names, grads, grads_exact, grads_torch, strict=True):
        naive.assert_accurate(name, a, b, c, largest)


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal):
    args, inputs = leaves(make([3, 0, 4], [4, 2, 2], dtype=torch.float64))
    names = [name for name, value in args.items() if any(value is x for x in inputs)]

    def run(*values):
        return spae_attention(**{**args, **dict(zip(names, values, strict=True))}, causal=causal)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_no_key_are_zero_and_take_no_gradient(backend):
    args, _ = leaves(make([4, 2], [2, 0]))
    out = spae_attention(**args, backend=backend)
    assert out[[0, 1, 4, 5]].eq(0).all() and out[[2, 3]].ne(0).all()
    grad_q, grad_k, grad_v = torch.autograd.grad(out.sum(), (args["q"], args["k"], args["v"]))
    assert grad_q[[0, 1, 4, 5]].eq(0).all()
    assert all(torch.isfinite(grad).all() for grad in (grad_q, grad_k, grad_v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_does_not_see_its_neighbours(backend):
    """Each sequence alone gives what it gives in the batch, and NaN in one leaves the others alone."""
    args = {**make([3, 5], [4, 5]), "backend": backend}
    together = spae_attention(**args)
    alone = {**args, "q": args["q"][:3], "rank_q": args["rank_q"][:3], "max_seqlen_q": 3, "max_seqlen_k": 4}
    alone |= {name: args[name][:4] for name in ("k", "v", "rank_k")}
    alone |= {"cu_seqlens_q": args["cu_seqlens_q"][:2], "cu_seqlens_k": args["cu_seqlens_k"][:2]}
    torch.testing.assert_close(spae_attention(**alone), together[:3])
    args["v"][5] = float("nan")
    out = spae_attention(**args)
    assert torch.isfinite(out[:3]).all() and out[-1].isnan().any()


@pytest.mark.parametrize("budget", [1, 40, 200])
def test_blocks_change_nothing(monkeypatch, budget):
    """Cutting the batch into more and smaller blocks gives the same output and gradients."""
    args, inputs = leaves({**make([9, 1, 0, 6], [9, 3, 1, 4]), "backend": "reference"})
    out = spae_attention(**args)
    grads = naive.gradients(out, inputs)
    monkeypatch.setattr(reference_attention, "SCORES_PER_BLOCK", budget)
    again = spae_attention(**args)
    torch.testing.assert_close(again, out)
    for a, b in zip(naive.gradients(again, inputs), grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.exact
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [1, 2])
def test_strided_inputs(backend, step):
    """Slices of a fused projection, as a model makes them; with a step in the last dimension too."""
    args = {**make([4, 3], [4, 3], heads=2, kv_heads=2, size=8), "backend": backend}
    fused = torch.randn(7, 3, 2, 8 * step)[..., ::step]
    strided = {**args, "q": fused[:, 0], "k": fused[:, 1], "v": fused[:, 2]}
    dense = {**strided, **{name: strided[name].contiguous() for name in "qkv"}}
    assert not strided["q"].is_contiguous()
    assert torch.equal(spae_attention(**strided), spae_attention(**dense))


def test_softmax_scale_and_int64_indices():
    args = make([4], [5])
    for name in ("cu_seqlens_q", "cu_seqlens_k", "rank_q", "rank_k"):
        args[name] = args[name].long()
    args = {**args, "q": args["q"].double(), "k": args["k"].double(), "v": args["v"].double()}
    args = {name: x.double() if name.endswith("bias") else x for name, x in args.items()}
    torch.testing.assert_close(spae_attention(**args, softmax_scale=0.7), run_naive(args, True, 0.7))


@pytest.mark.exact
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_bit_identical(backend):
    torch.use_deterministic_algorithms(False)  # it must hold without torch's help
    args, inputs = leaves({**make([60] * 8, [60] * 8, dtype=torch.bfloat16), "backend": backend})
    runs = [naive.gradients(spae_attention(**args), inputs) for _ in range(4)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_frozen_bias_costs_no_gradient(monkeypatch):
    """Where a table takes no gradient, the scatter into it never runs."""
    calls = []
    original = reference_attention._sum_by_column
    monkeypatch.setattr(
        reference_attention, "_sum_by_column", lambda *args: calls.append(1) or original(*args)
    )
    args, _ = leaves({**make([4], [4]), "backend": "reference"})
    frozen = {
        **args,
        "relative_bias": args["relative_bias"].detach(),
        "absolute_bias": args["absolute_bias"].detach(),
    }
    spae_attention(**frozen).sum().backward()
    assert not calls
    spae_attention(**args).sum().backward()
    assert len(calls) == 2


@pytest.mark.exact
def test_autocast_changes_nothing():
    args = make([4, 2], [4, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = spae_attention(**args)
    assert torch.equal(inside, spae_attention(**args))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("buckets", [(5, 3), (None, None), (4, None)])
def test_opcheck(backend, buckets):
    args, _ = leaves(make([3, 2], [3, 4], buckets=buckets))
    torch.library.opcheck(torch.ops.speeder.spae_attention.default, (*args.values(), 0.5, True, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend):
    args, inputs = leaves({**make([3, 2], [3, 4]), "backend": backend})
    compiled = torch.compile(spae_attention, backend="aot_eager", fullgraph=True)
    out, eager = compiled(**args), spae_attention(**args)
    assert torch.equal(out, eager)
    for a, b in zip(naive.gradients(out, inputs), naive.gradients(eager, inputs), strict=True):
        assert torch.equal(a, b)


BAD = {
    "q_type": ({"q": [1.0]}, TypeError, r"q: expected a tensor, got list"),
    "q_empty": (
        {"q": torch.zeros(5, 0, 8)},
        ValueError,
        r"q: expected at least one element .* got shape \(5, 0, 8\)",
    ),
    "q_dims": ({"q": torch.zeros(5, 8)}, ValueError, r"q: expected shape \(Tq, Hq, D\), got \(5, 8\)"),
    "q_dtype": (
        {"q": torch.zeros(5, 4, 8, dtype=torch.int32)},
        TypeError,
        r"q: expected dtype float32, .* got int32",
    ),
    "k_dtype": ({"k": torch.zeros(5, 2, 8).half()}, TypeError, r"k: expected dtype float32, got float16"),
    "k_size": ({"k": torch.zeros(5, 2, 4)}, ValueError, r"k: expected shape \(Tk, Hkv, 8\), got \(5, 2, 4\)"),
    "k_empty": ({"k": torch.zeros(5, 0, 8)}, ValueError, r"k: expected at least one element in dimension 1"),
    "k_heads": (
        {"k": torch.zeros(5, 3, 8), "v": torch.zeros(5, 3, 8)},
        ValueError,
        r"k: expected a number of heads that divides q's 4, got 3",
    ),
    "v_shape": ({"v": torch.zeros(6, 2, 8)}, ValueError, r"v: expected shape \(5, 2, 8\), got \(6, 2, 8\)"),
    "v_device": ({"v": torch.zeros(5, 2, 8, device="meta")}, ValueError, r"v: expected device cpu, got meta"),
    "cu_empty": (
        {"cu_seqlens_q": torch.zeros(0).int()},
        ValueError,
        r"cu_seqlens_q: expected at least one element",
    ),
    "cu_short": (
        {"cu_seqlens_q": torch.tensor([0]), "cu_seqlens_k": torch.tensor([0])},
        ValueError,
        r"cu_seqlens_q: expected at least 2 elements \(B\+1\) where there are tokens, got 1",
    ),
    "cu_count": (
        {"cu_seqlens_k": torch.tensor([0, 5])},
        ValueError,
        r"cu_seqlens_k: expected shape \(3,\), got \(2,\)",
    ),
    "cu_float": (
        {"cu_seqlens_q": torch.zeros(3)},
        TypeError,
        r"cu_seqlens_q: expected dtype int32 or int64, got float32",
    ),
    "cu_start": (
        {"cu_seqlens_q": torch.tensor([1, 2, 5])},
        ValueError,
        r"cu_seqlens_q: expected 0 at the start, got 1",
    ),
    "cu_end": (
        {"cu_seqlens_k": torch.tensor([0, 2, 4])},
        ValueError,
        r"cu_seqlens_k: expected 5 .* at the end, got 4",
    ),
    "cu_falls": (
        {"cu_seqlens_q": torch.tensor([0, 6, 5])},
        ValueError,
        r"cu_seqlens_q: .* never fall, got 5 after 6",
    ),
    "max_small": (
        {"max_seqlen_k": 2},
        ValueError,
        r"max_seqlen_k: expected at least 3, the longest sequence, got 2",
    ),
    "max_zero": ({"max_seqlen_q": 0}, ValueError, r"max_seqlen_q: expected at least 3, the longest .* got 0"),
    "max_negative": ({"max_seqlen_q": -1}, ValueError, r"max_seqlen_q: expected at least 0, got -1"),
    "max_float": ({"max_seqlen_q": 3.0}, TypeError, r"max_seqlen_q: expected a whole number, got float"),
    "rank_shape": (
        {"rank_q": torch.zeros(4).int()},
        ValueError,
        r"rank_q: expected shape \(5,\), got \(4,\)",
    ),
    "rank_dtype": (
        {"rank_k": torch.zeros(5)},
        TypeError,
        r"rank_k: expected dtype int32 or int64, got float32",
    ),
    "bias_heads": (
        {"relative_bias": torch.zeros(3, 5)},
        ValueError,
        r"relative_bias: expected shape \(4, R\), got \(3, 5\)",
    ),
    "bias_dtype": (
        {"absolute_bias": torch.zeros(4, 5).double()},
        TypeError,
        r"absolute_bias: expected dtype float32, bfloat16 or float16, got float64",
    ),
    "bias_empty": (
        {"absolute_bias": torch.zeros(4, 0)},
        ValueError,
        r"absolute_bias: expected at least one element",
    ),
    "backend": (
        {"backend": "tpu"},
        ValueError,
        r"backend: expected None or one of triton, cuda, .* got 'tpu'",
    ),
    "backend_op": (
        {"backend": "cuda"},
        ValueError,
        r"'cuda' cannot run spae_attention here: .*; available: (triton, )?cpu, reference",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        spae_attention(**{**make([2, 3], [2, 3]), **changes})


@pytest.mark.parametrize("score", [1e4, 1e6, 1e30])
def test_the_reference_is_exact_beside_large_scores(score):
    """All keys score the same, so each has the same weight, whatever the score; gradients too."""
    torch.manual_seed(0)
    q, k = torch.full((6, 1, 4), score**0.5 / 2), torch.full((6, 1, 4), score**0.5 / 2)
    v, starts, ranks = torch.randn(6, 1, 4).requires_grad_(), torch.tensor([0, 6]), torch.arange(6)
    k.requires_grad_()
    out = spae_attention(
        q, k, v, starts, starts, 6, 6, ranks, ranks, softmax_scale=1.0, causal=False, backend="reference"
    )
    torch.testing.assert_close(out, v.mean(dim=0, keepdim=True).expand_as(out))
    up = torch.randn(6, 1, 4)
    grad_k, grad_v = torch.autograd.grad(out, (k, v), up)
    torch.testing.assert_close(grad_v, up.mean(dim=0, keepdim=True).expand_as(v))
    scores = (up[:, 0] @ (v - v.mean(dim=0))[:, 0].T / 6).sum(dim=0)  # the gradient of each key's score
    torch.testing.assert_close(
        grad_k, (scores[:, None, None] * q[0]).detach(), rtol=1e-4, atol=1e-5 * score**0.5
    )
