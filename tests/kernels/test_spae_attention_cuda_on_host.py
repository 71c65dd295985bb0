"""spae_attention's CUDA kernels, run on the host block by block, against float64 and against PyTorch in the same dtype."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels import naive
from tests.kernels.host_device import HostDevice, HostDeviceError, compile_program, plant
from tests.kernels.test_spae_attention import NAMES, leaves, make, run_naive
from tests.kernels.test_spae_attention_cpu import KINDS, set_ranks

pytestmark = pytest.mark.slow

# Which head sizes are compiled for which element type: every size and every type, and float32 where it has tiles of
# its own.
BUILDS = {
    torch.bfloat16: ("BFloat16", (32, 64, 96, 128, 256)),
    torch.float16: ("Half", (64,)),
    torch.float32: ("float", (32, 128, 256)),
}
ALL = (True,) * 5


def build(folder, dtype, sizes=None, csrc=None):
    name, all_sizes = BUILDS[dtype]
    defines = (f"SPEEDER_TYPE={name}", f"SPEEDER_SIZES={','.join(map(str, sizes or all_sizes))}")
    folder.mkdir()
    return compile_program("spae_attention", folder, *([csrc] if csrc else []), defines=defines)


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spae")
    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(lambda dtype: build(folder / str(dtype), dtype), BUILDS))
    running = {dtype: HostDevice(program) for dtype, program in zip(BUILDS, programs, strict=True)}
    yield running
    for device in running.values():
        device.__exit__()


def view(x: torch.Tensor) -> tuple:
    """The tensor as the kernels take it: memory, where it begins in it, strides of tokens and heads."""
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return memory, x.storage_offset(), x.stride(0), x.stride(1)


def common(args: dict, causal: bool) -> list:
    tables = [args["relative_bias"], args["absolute_bias"]]
    sizes = [0 if table is None else table.shape[1] for table in tables]
    q, k = args["q"], args["k"]
    small = [args[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "rank_q", "rank_k")]
    counts = [args["cu_seqlens_q"].numel() - 1, q.shape[1], k.shape[1], q.shape[2], *sizes]
    extents = [q.shape[0], k.shape[0], args["max_seqlen_q"], args["max_seqlen_k"]]
    views = [part for name in "qkv" for part in view(args[name])]
    return [*views, *small, *tables, *counts, 1 / math.sqrt(q.shape[2]), int(causal), *extents]


def forward(device: HostDevice, args: dict, causal: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.full(args["q"].shape, float("nan"), dtype=args["q"].dtype)
    lse = torch.full(out.shape[:2], float("nan"))
    device.call("forward", *common(args, causal), out, lse, seed=seed)
    return out, lse


def backward(device, args, causal, grad, out, lse, needs=ALL, seed: int = 0) -> list[torch.Tensor | None]:
    inputs = [args[name] for name in ("q", "k", "v", "relative_bias", "absolute_bias")]
    grads = [
        torch.full(x.shape, float("nan"), dtype=x.dtype) if need and x is not None else None
        for x, need in zip(inputs, needs, strict=True)
    ]
    device.call("backward", *common(args, causal), *view(grad), out, lse, *grads, seed=seed)
    return grads


def upstream(args: dict) -> torch.Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(args["q"].shape, generator=draw).to(torch.bfloat16).to(args["q"].dtype)


def check(device: HostDevice, args: dict, causal: bool = True, needs=ALL, seed: int = 0) -> None:
    """Output and every gradient that is needed: our error is at most twice PyTorch's."""
    grad = upstream(args)
    out, lse = forward(device, args, causal, seed)
    grads = backward(device, args, causal, grad, out, lse, needs, seed)
    exact, exact_leaves = leaves(args, torch.float64)
    same, same_leaves = leaves(args)
    out_exact = torch_exact(exact, causal)
    out_torch = naive.torch_attention(*(same[name] for name in NAMES), causal)
    naive.assert_accurate("out", out, out_exact, out_torch, args["v"].abs().max().item())

    def gradients(result, inputs):
        if not result.requires_grad:
            return [torch.zeros_like(x) for x in inputs]
        up = grad.to(result.dtype)
        return torch.autograd.grad(result, inputs, up, allow_unused=True, materialize_grads=True)

    grads_exact, grads_torch = gradients(out_exact, exact_leaves), gradients(out_torch, same_leaves)
    size = args["q"].shape[2]
    products = 8 * args["v"].norm(dim=-1).max().item() * size**0.5
    largest = products * max(1.0, *(args[name].abs().max().item() for name in "qk"))
    names = [name for name in ("q", "k", "v", "relative_bias", "absolute_bias") if args[name] is not None]
    ours = [
        g
        for g, x in zip(grads, map(args.get, ("q", "k", "v", "relative_bias", "absolute_bias")), strict=True)
        if x is not None
    ]
    for name, a, b, c in zip(names, ours, grads_exact, grads_torch, strict=True):
        if a is not None:
            naive.assert_accurate(name, a, b, c, largest)


def torch_exact(args: dict, causal: bool) -> torch.Tensor:
    """In float64: the loop over pairs where that is quick, PyTorch's attention where it is not."""
    if args["q"].shape[0] * args["k"].shape[0] * args["q"].shape[1] < 300:
        return run_naive(args, causal)
    return naive.torch_attention(*(args[name] for name in NAMES), causal)


def strided(args: dict, seed: int) -> dict:
    """q, k and v as parts of larger tensors, as a fused projection gives them; sometimes off 16 bytes."""
    out = dict(args)
    for name in "qkv":
        x = args[name]
        wide = torch.full(
            (x.shape[0], x.shape[1] + 1, x.shape[2] + 8 - seed % 2), float("nan"), dtype=x.dtype
        )
        wide[:, 1:, : x.shape[2]] = x
        out[name] = wide[:, 1:, : x.shape[2]]
    return out


lengths = st.lists(
    st.tuples(st.sampled_from([0, 1, 2, 5, 17, 40, 70]), st.sampled_from([0, 1, 3, 16, 33, 65, 100])),
    min_size=1,
    max_size=3,
).filter(lambda pairs: sum(a for a, _ in pairs) and sum(b for _, b in pairs))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=lengths,
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (5, 1)]),
    case=st.sampled_from([(dtype, size) for dtype in BUILDS for size in (32, 40, 64, 96, 128, 256)]).filter(
        lambda case: case[0] != torch.float16 or case[1] in (40, 64)
    ),
    buckets=st.tuples(st.sampled_from([None, 1, 5, 200]), st.sampled_from([None, 1, 4, 60])),
    kind=st.sampled_from(KINDS),
    causal=st.booleans(),
    layout=st.sampled_from([None, 0, 1]),
    seed=st.integers(0, 10_000),
)
def test_matches_float64(devices, lengths, heads, case, buckets, kind, causal, layout, seed):
    dtype, size = case
    lengths_q, lengths_k = zip(*lengths, strict=True)
    args = set_ranks(make(lengths_q, lengths_k, *heads, size, buckets, dtype, seed), kind, seed)
    check(devices[dtype], args if layout is None else strided(args, layout), causal, seed=seed)
