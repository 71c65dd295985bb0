"""Small tables in bfloat16 and float16 beside float32 or half-precision states: `model.bfloat16()` and FSDP's mixed
precision bring them. Their gradients have their dtype, and are rounded once, after sums in float32."""

from __future__ import annotations

import pytest
import torch

import speeder_kernels as sk
from speeder_kernels import dispatch
from tests.kernels import naive
from tests.kernels.places import all_places, at

HALVES = [torch.bfloat16, torch.float16]


def served(op: str, backend: str, device: str, dtype: torch.dtype) -> None:
    if dtype not in dispatch.dtypes(op, backend):
        pytest.skip(f"{backend} has no {dtype} for {op}")
    if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")


def everywhere(op: str):
    return pytest.mark.parametrize(("backend", "device"), all_places(op))


def gradients(function, args: dict, names: list[str], upstream: torch.Tensor) -> list[torch.Tensor]:
    leaves = [args[name].detach().clone().requires_grad_() for name in names]
    result = function({**args, **dict(zip(names, leaves, strict=True))})
    return [result, *torch.autograd.grad(result, leaves, upstream.to(result.dtype))]


def assert_rounded(grads: list, exact: list, dtypes: list[torch.dtype], bound: float) -> None:
    """Within a rounding to its dtype of the exact gradient, and `bound` of float32's own error."""
    for grad, right, dtype in zip(grads, exact, dtypes, strict=True):
        assert grad.dtype == dtype
        epsilon = torch.finfo(dtype).eps
        error = (grad.double() - right).abs()
        assert (error <= epsilon * right.abs() + bound * right.abs().max()).all(), (error / right.abs()).max()


@everywhere("spae_attention")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("states", [torch.float32, torch.float16])
def test_attention(backend, device, dtype, states):
    """Many pairs for each entry of a table: a sum in half precision would stop growing."""
    served("spae_attention", backend, device, states)
    torch.manual_seed(3)
    tokens = 40
    args = {name: torch.randn(tokens, heads, 8).to(states) for name, heads in (("q", 2), ("k", 1), ("v", 1))}
    args |= {
        "cu_seqlens_q": torch.tensor([0, tokens]),
        "max_seqlen_q": tokens,
        "rank_q": torch.arange(tokens),
    }
    args |= {
        "cu_seqlens_k": torch.tensor([0, tokens]),
        "max_seqlen_k": tokens,
        "rank_k": torch.arange(tokens),
    }
    args |= {"relative_bias": torch.randn(2, 3).to(dtype), "absolute_bias": torch.randn(2, 4).to(dtype)}
    names, upstream = ["relative_bias", "absolute_bias"], torch.randn(tokens, 2, 8)
    out, *grads = gradients(
        lambda args: at(sk.spae_attention, backend, device)(**args), args, names, upstream.to(states)
    )

    def loops(args):
        places = [args[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "rank_q", "rank_k")]
        return naive.spae_attention(*(args[name] for name in "qkv"), *places, *(args[name] for name in names))

    wide = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in args.items()
    }
    _, *exact = gradients(loops, wide, names, upstream.to(states))
    assert out.dtype == states
    assert_rounded(grads, exact, [dtype, dtype], 1e-5 if states == torch.float32 else 4e-3)
    # As if the caller had widened the tables and narrowed their gradients.
    same = {**args, **{name: args[name].float() for name in names}}
    widened, *wide_grads = gradients(
        lambda args: at(sk.spae_attention, backend, device)(**args), same, names, upstream.to(states)
    )
    assert torch.equal(out, widened)
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(grads, wide_grads, strict=True))


@everywhere("pack_tokens")
@pytest.mark.parametrize("dtype", HALVES)
def test_prompts_and_item_tokens(backend, device, dtype):
    served("pack_tokens", backend, device, torch.float32)
    torch.manual_seed(3)
    tokens = 3000
    args = {"input_ids": torch.zeros(tokens).long(), "text_embedding": torch.randn(3, 8)}
    args |= {"item_tokens": torch.randn(2, 8).to(dtype), "position_prompts": torch.randn(2, 8).to(dtype)}
    args |= {"item_rows": torch.arange(tokens) % 2, "ranks": torch.arange(tokens) % 2}
    names, upstream = ["item_tokens", "position_prompts"], torch.rand(tokens, 8)
    out, *grads = gradients(lambda args: at(sk.pack_tokens, backend, device)(**args), args, names, upstream)
    exact = upstream.double().view(-1, 2, 8).sum(0)
    torch.testing.assert_close(out[:2], args["item_tokens"].float() + args["position_prompts"].float())
    assert out.dtype == torch.float32
    assert_rounded(grads, [exact, exact], [dtype, dtype], 1e-5)


@everywhere("compress_items")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("states", [torch.float32, torch.float16])
def test_gates_and_norm(backend, device, dtype, states):
    served("compress_items", backend, device, states)
    torch.manual_seed(3)
    items = 500
    args = {
        "expert_outputs": torch.randn(items, 3, 8).to(states),
        "gate_logits": torch.randn(items, 3).to(dtype),
    }
    args |= {"present": torch.ones(items, 3, dtype=torch.bool), "norm_weight": torch.randn(8).to(dtype)}
    names, upstream = ["gate_logits", "norm_weight"], torch.rand(items, 8).to(states)
    out, *grads = gradients(
        lambda args: at(sk.compress_items, backend, device)(**args)[0], args, names, upstream
    )
    wide = {name: x.double() if x.is_floating_point() else x for name, x in args.items()}
    _, *exact = gradients(lambda args: sk.compress_items(**args)[0], wide, names, upstream)
    assert out.dtype == states
    assert_rounded(grads, exact, [dtype, dtype], 1e-5)


@everywhere("item_cross_entropy")
@pytest.mark.parametrize("dtype", HALVES)
def test_log_q(backend, device, dtype):
    served("item_cross_entropy", backend, device, torch.float32)
    torch.manual_seed(3)
    hidden, table, log_q = torch.randn(4, 8), torch.randn(9, 8), torch.randn(9).to(dtype)
    loss = at(sk.item_cross_entropy, backend, device)(hidden, table, torch.arange(4), scale=0.5, log_q=log_q)
    logits = 0.5 * hidden.double() @ table.double().T - log_q.double()
    exact = torch.nn.functional.cross_entropy(logits, torch.arange(4), reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
