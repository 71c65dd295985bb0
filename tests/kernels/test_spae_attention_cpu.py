"""spae_attention's compiled CPU kernel: sizes that fill and overflow its tiles and blocks, ranks of every
kind, each instruction set of this machine, and work that is skipped."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder_kernels import _host, spae_attention
from tests.kernels import naive
from tests.kernels.test_spae_attention import DTYPES, NAMES, leaves, make

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "avx512_amx")
GRADS = ("q", "k", "v", "relative_bias", "absolute_bias")


def set_ranks(args: dict, kind: str, seed: int = 0) -> dict:
    """Ranks of a batch whose queries are the last tokens among the keys.

    "history": text, then items of rank 0, 1, ...; "mixed": items with text between them; "far": distances
    and ranks beyond both tables; "late": rises from a large rank; "random": any order; "none": text only.
    """
    draw = torch.Generator().manual_seed(seed)
    args = dict(args)
    parts_q, parts_k = [], []
    for n in range(len(args["cu_seqlens_q"]) - 1):
        queries = int(args["cu_seqlens_q"][n + 1] - args["cu_seqlens_q"][n])
        keys = int(args["cu_seqlens_k"][n + 1] - args["cu_seqlens_k"][n])
        longest = max(queries, keys)
        rank = torch.arange(longest)
        if kind == "history":
            rank = (rank - 5).clamp(min=-1)
        elif kind == "mixed":
            rank = torch.where(torch.rand(longest, generator=draw) < 0.3, -1, rank)
        elif kind == "far":
            rank = rank * 100_000_000 % (2**31 - 1)
        elif kind == "late":
            rank = rank + 2**31 - 1 - longest
        elif kind == "random":
            rank = torch.randint(-1, 9, (longest,), generator=draw)
        else:
            rank = torch.full((longest,), -1)
        parts_q.append(rank[longest - queries :])
        parts_k.append(rank[longest - keys :])
    return {**args, "rank_q": torch.cat(parts_q).int(), "rank_k": torch.cat(parts_k).int()}


KINDS = ("history", "mixed", "far", "late", "random", "none")


def attend(args: dict, dtype: torch.dtype, causal: bool, how: str) -> tuple:
    """Output and gradients by our kernel, by the reference in float64 or by PyTorch's own attention."""
    copy, inputs = leaves(args, torch.float64 if how == "exact" else None)
    if how == "torch":
        out = naive.torch_attention(*(copy[name] for name in NAMES), causal)
    else:
        out = spae_attention(**copy, causal=causal, backend="cpu" if how == "ours" else "reference")
    return out, naive.gradients(out, inputs)


def check(args: dict, dtype: torch.dtype, causal: bool) -> None:
    """The rule for errors, for the output and every gradient."""
    (out, grads), (exact, grads_exact), (torchs, grads_torch) = (
        attend(args, dtype, causal, how) for how in ("ours", "exact", "torch")
    )
    naive.assert_accurate("out", out, exact, torchs, args["v"].abs().max().item())
    # As in test_spae_attention: the dot products whose difference is a score's gradient.
    products = 8 * args["v"].float().norm(dim=-1).max().item() * args["q"].shape[2] ** 0.5
    largest = products * max(1.0, *(args[name].abs().max().item() for name in "qk"))
    names = [name for name in GRADS if args[name] is not None]
    for name, a, b, c in zip(names, grads, grads_exact, grads_torch, strict=True):
        naive.assert_accurate(name, a, b, c, largest)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=5).filter(
        lambda pairs: sum(a for a, _ in pairs) and sum(b for _, b in pairs)
    ),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (7, 1), (2, 2)]),
    size=st.sampled_from([7, 32, 64, 80, 100, 128, 256]),
    buckets=st.tuples(st.sampled_from([None, 1, 6, 40]), st.sampled_from([None, 1, 50])),
    kind=st.sampled_from(KINDS),
    causal=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10_000),
)
def test_matches_float64(lengths, heads, size, buckets, kind, causal, dtype, seed):
    lengths_q, lengths_k = zip(*lengths, strict=True)
    args = set_ranks(make(lengths_q, lengths_k, *heads, size, buckets, dtype, seed), kind, seed)
    check(args, dtype, causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "lengths", [([300], [300]), ([700, 3], [700, 600]), ([40], [530]), ([520], [260])], ids=str
)
def test_long_sequences(dtype, causal, lengths):
    """Several blocks of keys and of queries: sums are rescaled from block to block."""
    for seed, (size, kind) in enumerate([(64, "history"), (128, "mixed")]):
        check(set_ranks(make(*lengths, 6, 2, size, (50, 400), dtype, seed), kind), dtype, causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (4, 1), (8, 1)], ids=str)
def test_few_queries_against_a_long_cache(dtype, heads):
    """One or two new tokens: scored without packing the keys, up to a tile of rows."""
    for seed, size in enumerate((64, 20, 128)):
        args = make([1, 2, 1, 1], [900, 300, 1, 37], *heads, size, (32, 64), dtype, seed)
        check(set_ranks(args, "history"), dtype, True)


@pytest.fixture
def threads():
    """Sets torch's number of threads, and sets it back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_a_long_sequence_is_shared_among_threads(threads, dtype, causal):
    """Its keys go to several tasks, whose gradients of the queries are added up."""
    lengths_q, lengths_k = [3, 900, 0, 7], [3, 900, 5, 0]
    args = set_ranks(make(lengths_q, lengths_k, 4, 2, 32, (50, 400), dtype), "mixed")
    threads(8)
    check(args, dtype, causal)


def test_large_scores():
    """No overflow where scores are far apart, and rising scores rescale what came before."""
    args = make([300], [300], 2, 1, 16)
    args["q"] *= 100
    args["k"] *= torch.linspace(0.1, 3, 300)[:, None, None]
    exact = spae_attention(**{k: v.double() if k in GRADS else v for k, v in args.items()})
    torch.testing.assert_close(spae_attention(**args, backend="cpu").double(), exact, atol=2e-3, rtol=2e-3)


def test_infinite_bias_hides_a_pair():
    """A bias of -inf takes weight away; a row that has nothing else gives zeros, as the reference does."""
    args = make([5], [5], 2, 1, 8, (4, None))
    args |= {"rank_q": torch.arange(5).int(), "rank_k": torch.arange(5).int()}
    args["relative_bias"][:, 0] = float("-inf")
    out = spae_attention(**args, backend="cpu")
    torch.testing.assert_close(out, spae_attention(**args, backend="reference"))
    assert out[0].eq(0).all() and out[1:].ne(0).all()


@pytest.mark.exact
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_bit_identical_from_run_to_run(threads, count):
    """Ragged lengths, both tables, ranks that collide in a bucket: the sums have many terms."""
    torch.use_deterministic_algorithms(False)
    lengths = [50, 1, 0, 17, 600, 40, 33, 9]
    args, inputs = leaves(set_ranks(make(lengths, lengths, 9, 3, 64, (6, 5)), "mixed"))
    threads(count)
    runs = []
    for _ in range(4):
        out = spae_attention(**args, backend="cpu")
        runs.append([out, *naive.gradients(out, inputs)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.exact
@pytest.mark.parametrize("wanted", [(), ("q",), ("k",), ("v",), ("relative_bias",), ("v", "absolute_bias")])
def test_only_what_is_asked_for(wanted):
    """A gradient nobody needs comes back empty, and the others do not change."""
    args = make([30, 5], [30, 9], 4, 2, 16)
    out, lse = torch.ops.speeder.spae_attention(*args.values(), 0.25, True, "cpu")
    grad = torch.randn_like(out)
    rest = [args[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "rank_q", "rank_k", *GRADS[3:])]

    def backward(needs):
        return torch.ops.speeder.spae_attention_backward(
            grad, args["q"], args["k"], args["v"], out, lse, *rest, 30, 30, 0.25, True, needs, "cpu"
        )

    everything = backward([True] * 5)
    some = backward([name in wanted for name in GRADS])
    for name, whole, part in zip(GRADS, everything, some, strict=True):
        assert torch.equal(part, whole) if name in wanted else part.shape == (0, *whole.shape[1:])


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    """The same checks in a process of its own, for each instruction set up to this machine's best."""
    if ISAS.index(isa) > ISAS.index(_host.best_instruction_set()):
        pytest.skip(f"this processor has no {isa}")
    code = (
        "from speeder_kernels import _host\nfrom tests.kernels.test_spae_attention_cpu import *\n"
        f"assert _host.instruction_set() == {isa!r}\n"
        "for n, dtype in enumerate(DTYPES):\n"
        "    for size, kind, causal in ((64, 'history', True), (80, 'mixed', False), (3, 'random', True)):\n"
        "        args = make([40, 1, 33, 270], [40, 7, 33, 270], 6, 2, size, (20, 30), dtype, n)\n"
        "        check(set_ranks(args, kind), dtype, causal)\n"
        "    args = make([1, 2], [900, 1500], 6, 2, 64, (20, 30), dtype, n)  # decoding, keys shared among tasks\n"
        "    check(set_ranks(args, 'history'), dtype, True)\n"
    )
    environ = {**os.environ, "SPEEDER_CPU_ISA": isa}
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
