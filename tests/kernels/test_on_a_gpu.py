"""The Triton and CUDA backends as a GPU runs them: their own tiles in every head size, long sequences, strided inputs,
decoding; another device, a side stream, and CUDA graphs.

All of it needs a GPU. So that the checks themselves are known to work, `test_the_checks_on_a_cpu` runs each of them
here, on the compiled CPU kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import speeder_kernels as sk
from speeder_kernels import dispatch
from tests.kernels import test_compress_items as compress
from tests.kernels import test_item_cross_entropy as cross_entropy
from tests.kernels import test_pack_tokens as pack
from tests.kernels.places import at
from tests.kernels.test_spae_attention import NAMES
from tests.kernels.test_spae_attention_triton import check, check_forward, draw

GPUS = torch.cuda.device_count()
BACKENDS = ("triton", "cuda")
SIZES = (32, 64, 96, 128, 256)
needs_gpu = pytest.mark.skipif(GPUS == 0, reason="needs a GPU, and PyTorch finds no CUDA device")
needs_two = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, and PyTorch finds {GPUS}")
# Backends and the element types that they take for attention.
everywhere = pytest.mark.parametrize(
    ("backend", "dtype"),
    [(backend, dtype) for backend in BACKENDS for dtype in dispatch.dtypes("spae_attention", backend)],
    ids=str,
)


# --- attention against float64 and PyTorch --------------------------------------------------------------------


def strided(extra: int, q: Tensor, k: Tensor, v: Tensor, **arguments) -> Tensor:
    """spae_attention of parts of larger tensors, whose rows are `extra` elements wider; of its gradient, too."""
    parts = (pad(x, (0, extra, 1, 0))[:, 1:, : x.shape[2]] for x in (q, k, v))
    out = sk.spae_attention(*parts, **arguments)
    return torch.cat((out, out.new_zeros(*out.shape[:2], extra)), dim=2)[..., : out.shape[2]]


def check_attention(
    backend: str, device: str, size: int, dtype: torch.dtype, kind: str, causal: bool
) -> None:
    """Several tiles in both directions, both tables ending within; a short sequence, and one of another length."""
    args = draw(kind, [150, 3, 66], [290, 3, 66], 4, 2, size, (70, 90), dtype=dtype)
    check(args, causal, at(sk.spae_attention, backend, device))


def check_strided(backend: str, device: str, extra: int, dtype: torch.dtype) -> None:
    args = draw("answered", [150, 66], [190, 66], 4, 2, 64, (70, 90), dtype=dtype)
    check(args, True, at(partial(strided, extra), backend, device))


def check_decoding(backend: str, device: str, size: int, dtype: torch.dtype) -> None:
    """A key head's group of queries in one tile, or in several; caches in one split, in many, and none."""
    for queries in ([1, 1, 1, 1], [12, 1, 5, 1]):
        args = draw("answered", queries, [1500, 40, 300, 0], 8, 2, size, (70, 90), dtype=dtype)
        with torch.no_grad():
            check_forward(args, True, at(sk.spae_attention, backend, device))


# --- every op, with its gradients, on tensors that stay where they are ----------------------------------------


def _attention(
    queries: list[int], keys: list[int], seed: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Callable]:
    args = draw("random", queries, keys, 4, 2, 64, (20, 30), dtype=dtype, seed=seed)
    return [
        args[name] for name in NAMES
    ], lambda q, k, v, cu_q, cu_k, rank_q, rank_k, *tables, backend: sk.spae_attention(
        q, k, v, cu_q, cu_k, max(queries), max(keys), rank_q, rank_k, *tables, backend=backend
    )


def _pack_tokens(seed: int) -> tuple[list[Tensor], Callable]:
    return list(pack.make(300, 50, 70, 40, 96, seed=seed).values()), sk.pack_tokens


def _compress_items(seed: int) -> tuple[list[Tensor], Callable]:
    return compress.make(50, 3, 96, seed=seed), sk.compress_items


def _item_cross_entropy(seed: int) -> tuple[list[Tensor], Callable]:
    def loss(hidden: Tensor, table: Tensor, targets: Tensor, log_q: Tensor, backend: str) -> Tensor:
        return sk.item_cross_entropy(hidden, table, targets, scale=0.1, log_q=log_q.detach(), backend=backend)

    return list(cross_entropy.make(70, 700, 96, seed=seed)), loss


def _topk_items(seed: int) -> tuple[list[Tensor], Callable]:
    hidden, table, excluded, _ = cross_entropy.make(70, 700, 96, seed=seed)
    starts = torch.arange(71)  # each row excludes one item

    def best(hidden: Tensor, table: Tensor, starts: Tensor, excluded: Tensor, backend: str) -> tuple:
        lists = {"exclude_indptr": starts, "exclude_items": excluded}
        return sk.topk_items(hidden, table, 20, **lists, backend=backend)

    return [hidden, table, starts, excluded], best


STEPS: dict[str, Callable[[int], tuple[list[Tensor], Callable]]] = {
    "spae_attention": lambda seed: _attention([150, 66], [190, 66], seed),
    "spae_attention, decoding": lambda seed: _attention([1, 1], [1500, 40], seed),
    "spae_attention, float16": lambda seed: _attention([150, 66], [190, 66], seed, torch.float16),
    "spae_attention, decoding, float16": lambda seed: _attention([1, 1], [1500, 40], seed, torch.float16),
    "pack_tokens": _pack_tokens,
    "compress_items": _compress_items,
    "item_cross_entropy": _item_cross_entropy,
    "topk_items": _topk_items,
}


def step_dtype(name: str) -> torch.dtype:
    return torch.float16 if name.endswith("float16") else torch.float32


# Backends and steps that go together.
PAIRS = [
    (backend, name)
    for backend in BACKENDS
    for name, op, dtype in ((name, name.partition(",")[0], step_dtype(name)) for name in STEPS)
    if op in dispatch.KERNELS[backend] and dtype in dispatch.dtypes(op, backend)
]


def results(op: Callable, tensors: list[Tensor], backend: str) -> list[Tensor]:
    """What the op returns, and its gradients."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    out = op(*inputs, backend=backend)
    out = out if isinstance(out, tuple) else (out,)
    live = [x for x in out if x.requires_grad]
    leaves = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(live, leaves, [x.detach() for x in live], allow_unused=True) if live else ()
    return [x.detach() for x in (*out, *grads) if x is not None]


def moved(tensors: list[Tensor], device: str) -> list[Tensor]:
    return [x.to(device) for x in tensors]


def assert_same(ours: list[Tensor], expected: list[Tensor]) -> None:
    """To the last bit: the kernels promise it."""
    assert len(ours) == len(expected) > 1
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def check_against_the_reference(backend: str, device: str, name: str) -> None:
    """Roughly: the accuracy is judged elsewhere, here that it is the right numbers, where they should be."""
    tensors, op = STEPS[name](0)
    ours = results(op, moved(tensors, device), backend)
    assert all(x.device == torch.device(device) for x in ours)
    for a, b in zip(ours, results(op, tensors, "reference"), strict=True):
        tolerance = 1e-3 if step_dtype(name) == torch.float32 else 1e-2
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)


Record = Callable[[Callable[[], list[Tensor]]], tuple[Callable[[], None], list[Tensor]]]


def by_cuda_graph(run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """What replays `run`, and the tensors that it then fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and loaded before
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


def check_replay(backend: str, device: str, name: str, record: Record) -> None:
    """A recorded step gives, for other numbers in the same places, what the op gives for them."""
    tensors, op = STEPS[name](0)
    static = moved(tensors, device)
    replay, out = record(lambda: results(op, static, backend))
    for seed in (1, 2):
        others = moved(STEPS[name](seed)[0], device)
        for place, x in zip(static, others, strict=True):
            place.copy_(x)
        replay()
        assert_same(out, results(op, others, backend))


@contextlib.contextmanager
def late_stream() -> Iterator[None]:
    """A side stream that is held up, so that kernels on another one would come before its copies."""
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        yield


def check_stream(backend: str, device: str, name: str, stream: AbstractContextManager) -> None:
    """Inputs that arrive late on a stream are read by kernels on that stream, after they have arrived."""
    tensors, op = STEPS[name](0)
    late = moved(tensors, device)
    expected = results(op, late, backend)
    static = [torch.zeros_like(x) for x in late]
    with stream:
        for place, x in zip(static, late, strict=True):
            place.copy_(x)
        ours = results(op, static, backend)
        assert_same(ours, expected)


# --- on a GPU -------------------------------------------------------------------------------------------------


@needs_gpu
@everywhere
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "causal"), [("answered", True), ("late", True), ("random", False)])
def test_attention(backend, dtype, size, kind, causal):
    check_attention(backend, "cuda", size, dtype, kind, causal)


@needs_gpu
@everywhere
@pytest.mark.parametrize("extra", [8, 7])  # rows that start at multiples of 16 bytes, and rows that do not
def test_strided_attention(backend, dtype, extra):
    check_strided(backend, "cuda", extra, dtype)


@needs_gpu
@everywhere
@pytest.mark.parametrize("size", SIZES)
def test_decoding(backend, dtype, size):
    check_decoding(backend, "cuda", size, dtype)


@needs_gpu
@pytest.mark.parametrize(("backend", "name"), PAIRS)
def test_numbers_of_every_op(backend, name):
    check_against_the_reference(backend, "cuda:0", name)


@needs_two
@pytest.mark.parametrize(("backend", "name"), PAIRS)
def test_a_device_that_is_not_the_current_one(backend, name):
    with torch.cuda.device(0):
        check_against_the_reference(backend, "cuda:1", name)
        assert torch.cuda.current_device() == 0


@needs_gpu
@pytest.mark.parametrize(("backend", "name"), PAIRS)
def test_a_side_stream(backend, name):
    check_stream(backend, "cuda", name, late_stream())


@needs_gpu
@pytest.mark.parametrize(("backend", "name"), PAIRS)
def test_a_cuda_graph(backend, name):
    check_replay(backend, "cuda", name, by_cuda_graph)


@needs_gpu
@everywhere
@pytest.mark.parametrize("told", [1, 20])
def test_longer_sequences_than_were_told(backend, dtype, told, monkeypatch):
    """Refused where the lengths are read; else a row, or its gradient, is right or NaN."""
    args = draw("answered", [150, 3, 66], [290, 3, 66], 4, 2, 64, (70, 90), dtype=dtype)
    wrong = {**args, "max_seqlen_q": told, "max_seqlen_k": told}
    results = []
    for case in (args, wrong):
        leaves = {name: case[name].cuda().requires_grad_() for name in "qkv"}
        out = sk.spae_attention(**{**on_gpu(case), **leaves}, backend=backend)
        results.append([out, *torch.autograd.grad(out.nan_to_num().sum(), list(leaves.values()))])
    for right, got in zip(*results, strict=True):
        is_nan = got.isnan()
        torch.testing.assert_close(got[~is_nan], right[~is_nan], atol=0.05, rtol=0.05)
    assert results[1][0][150].isfinite().all()
    monkeypatch.setenv("SPEEDER_CHECK", "1")
    with pytest.raises(ValueError, match="max_seqlen_q: expected at least 150"):
        sk.spae_attention(**on_gpu(wrong), backend=backend)


def on_gpu(args: dict) -> dict:
    return {name: x.cuda() if isinstance(x, Tensor) else x for name, x in args.items()}


@needs_gpu
def test_the_reference_on_a_gpu_refuses_what_it_does_on_a_cpu():
    """It waits for the device anyway."""
    table = torch.randn(200, 8, device="cuda")
    with pytest.raises(IndexError, match=r"targets: expected 0\.\.199, got -100 at position 0"):
        sk.item_cross_entropy(table[:1], table, torch.tensor([-100]).cuda(), scale=1.0, backend="reference")


# --- the checks, on a CPU ---------------------------------------------------------------------------------------


def by_hand(run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """As a CUDA graph: writes the results of a new run into the same tensors."""
    out = run()

    def replay() -> None:
        for place, x in zip(out, run(), strict=True):
            place.copy_(x)

    return replay, out


def test_the_checks_on_a_cpu():
    check_attention("cpu", "cpu", 32, torch.bfloat16, "answered", True)
    check_strided("cpu", "cpu", 7, torch.float32)
    check_decoding("cpu", "cpu", 32, torch.float16)
    with pytest.raises(AssertionError):  # other queries
        wrong = at(lambda q, **rest: sk.spae_attention(q.flip(0), **rest), "cpu", "cpu")
        check(draw("none", [20], [20], 1, 1, 8), True, wrong)


@pytest.mark.parametrize("name", STEPS)
def test_the_steps_on_a_cpu(name):
    check_against_the_reference("cpu", "cpu", name)
    check_replay("cpu", "cpu", name, by_hand)
    check_stream("cpu", "cpu", name, contextlib.nullcontext())
    with pytest.raises(AssertionError):  # that records nothing
        check_replay("cpu", "cpu", name, lambda run: (lambda: None, run()))


def test_strided_is_strided():
    """What reaches the op, forward and backward."""
    strides = []
    q = torch.randn(5, 2, 8, requires_grad=True)
    cu, rank = torch.tensor([0, 5]), torch.arange(5)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "speeder::spae_attention" in func.name():
                strides.extend(x.stride() for x in args[:4] if x.ndim == 3)
            return func(*args, **(kwargs or {}))

    with Watch():
        rest = dict(
            cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=5, max_seqlen_k=5, rank_q=rank, rank_k=rank
        )
        strided(7, q, q, q, **rest, backend="cpu").sum().backward()
    assert strides[:3] == [(45, 15, 1)] * 3  # q, k, v
    assert strides[3] == (30, 15, 1)  # the gradient of the result
