"""Integers that do not fit the kernels' int32 are refused, or served: none is cut to another number."""

from __future__ import annotations

import pytest
import torch

import speeder_kernels as sk
from tests.kernels.places import all_places, at
from tests.kernels.test_edge_inputs import SIZES, arguments, served

TOP = 2**31 - 1
MILLISECONDS = 1_700_000_000_000

everywhere = pytest.mark.parametrize(("backend", "device"), all_places("spae_attention"))


def attention(backend: str, **changes) -> dict:
    torch.manual_seed(5)
    args = {**arguments("spae_attention", SIZES), "absolute_bias": torch.randn(2, 3)}
    args |= {"rank_q": torch.arange(3), "rank_k": torch.arange(3)}
    return served("spae_attention", backend, {**args, **changes})


@pytest.mark.parametrize("name", ["rank_q", "rank_k"])
@pytest.mark.parametrize("value", [TOP + 1, MILLISECONDS, 2**32, 2**62, -(2**31) - 1, -(2**32)])
@everywhere
def test_ranks_that_do_not_fit(backend, device, name, value, monkeypatch):
    """2^32 would become 0, and milliseconds a negative number, which stands for no item."""
    monkeypatch.setenv("SPEEDER_CHECK", "1")
    args = attention(backend, **{name: torch.tensor([0, value, 2])})
    with pytest.raises(
        IndexError, match=rf"^{name}: expected .*2147483647 \(int32\), got {value} at position 1"
    ):
        at(sk.spae_attention, backend, device)(**args)


@everywhere
@pytest.mark.parametrize("shift", [0, 5, TOP - 2])
def test_ranks_that_fit(backend, device, shift):
    """The same in int64 and int32, up to the largest."""
    ranks = torch.arange(3) + shift
    wide, narrow = (
        at(sk.spae_attention, backend, device)(**attention(backend, rank_q=each, rank_k=each))
        for each in (ranks, ranks.int())
    )
    assert torch.equal(wide, narrow)
    if shift:
        args = attention(backend, rank_q=ranks, rank_k=ranks)
        ones = {name: args[name].double() for name in ("q", "k", "v", "relative_bias", "absolute_bias")}
        torch.testing.assert_close(wide.double(), sk.spae_attention(**{**args, **ones}), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("backend", "device"), [place for place in all_places("spae_attention") if place[0] != "reference"]
)
@pytest.mark.parametrize("bias", ["relative_bias", "absolute_bias"])
@pytest.mark.parametrize("name", ["rank_q", "rank_k"])
def test_ranks_that_nobody_reads(backend, device, name, bias, monkeypatch):
    """As on a GPU, where an error would have to wait for the device: pairs of items score NaN. Without a bias, ranks
    mean nothing."""
    monkeypatch.setattr("speeder_kernels.validate.reads_values", lambda *_: False)
    other = ({"relative_bias", "absolute_bias"} - {bias}).pop()
    args = attention(backend, **{name: torch.tensor([0, 2**32 + 1, 2]), other: None})
    run = at(sk.spae_attention, backend, device)
    assert run(**args).isnan().all()
    q = args["q"].clone().requires_grad_()
    assert torch.autograd.grad(run(**{**args, "q": q}).sum(), q)[0].isnan().all()
    args[bias] = None
    assert torch.equal(run(**args), run(**{**args, name: torch.arange(3)}))


@everywhere
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize(
    ("starts", "message"), [([2**32, 3], "0 at the start"), ([0, 2**32 + 3], "3 .* at the end")]
)
def test_starts_that_do_not_fit(backend, device, name, starts, message, monkeypatch):
    """They would be right if they were cut."""
    monkeypatch.setenv("SPEEDER_CHECK", "1")
    args = attention(backend, **{name: torch.tensor(starts)})
    with pytest.raises(ValueError, match=f"^{name}: expected {message}"):
        at(sk.spae_attention, backend, device)(**args)


@everywhere
@pytest.mark.parametrize("longest", [2**31, 2**32, 2**62])
def test_a_longest_length_that_does_not_fit(backend, device, longest):
    """'Or more' has no end."""
    run = at(sk.spae_attention, backend, device)
    args = attention(backend)
    assert torch.equal(run(**{**args, "max_seqlen_q": longest, "max_seqlen_k": longest}), run(**args))


def test_more_tokens_than_int32_counts():
    q = torch.zeros(1, 1, 1).expand(2**31, 1, 1)
    one = torch.tensor([0, 1])
    ranks = torch.zeros(1, dtype=torch.int32).expand(2**31)
    for name, tensors in (("q", (q, q[:1], q[:1])), ("k", (q[:1], q, q))):
        with pytest.raises(ValueError, match=f"^{name}: expected at most {TOP} tokens, .* got {2**31}"):
            sk.spae_attention(
                *tensors, one, one, 1, 1, ranks[: len(tensors[0])], ranks[: len(tensors[1])], backend="cpu"
            )


@pytest.mark.parametrize("value", [2**32 + 1, 2**31, -(2**32) + 1])
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("pack_tokens", "input_ids"),
        ("pack_tokens", "item_rows"),
        ("pack_tokens", "ranks"),
        ("item_cross_entropy", "targets"),
        ("topk_items", "exclude_items"),
        ("topk_items", "exclude_indptr"),
    ],
)
def test_indices_of_the_other_ops(op, name, value, monkeypatch):
    """In int64 throughout."""
    monkeypatch.setenv("SPEEDER_CHECK", "1")
    args = arguments(op, SIZES)
    if op == "topk_items":
        args |= {"exclude_indptr": torch.tensor([0, 1, 1, 1]), "exclude_items": torch.tensor([2])}
    if name == "input_ids":
        args["item_rows"] = torch.full((3,), -1)
    args[name] = args[name].clone()
    args[name][-1] = value
    for backend, device in all_places(op):
        with pytest.raises((IndexError, ValueError), match=f"^{name}: expected "):
            at(getattr(sk, op), backend, device)(**args)


def test_lengths_to_pack():
    """In Python and compiled."""
    with pytest.raises(
        ValueError, match=r"^max_tokens: expected at most 9223372036854775807, got 9223372036854775808"
    ):
        sk.plan_packing([1, 2], 2**63)
    assert sk.plan_packing([1, 2], 2**63 - 1) == [[1, 0]]


def test_a_longest_length_beyond_int64():
    """PyTorch's own message would not name the argument."""
    starts, ranks, q = torch.tensor([0, 2]), torch.arange(2), torch.randn(2, 1, 8)
    with pytest.raises(ValueError, match=r"^max_seqlen_q: expected at most"):
        sk.spae_attention(q, q, q, starts, starts, 2**63, 2, ranks, ranks)
