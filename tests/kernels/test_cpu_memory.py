"""Scratch memory of the CPU kernels' backward passes: bounded, whatever the number of threads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from speeder_kernels import spae_attention
from tests.kernels.test_spae_attention_cpu import GRADS, leaves, make, set_ranks

# The rise of the process's high-water mark in a backward pass, less the gradients, in MiB. A small pass goes first,
# so that threads and their stacks are there.
ATTENTION = """
import sys, torch
threads, queries, keys, heads, key_heads, size, buckets = map(int, sys.argv[1:])
torch.set_num_threads(threads)
import speeder_kernels; speeder_kernels.backends()

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

def passes(queries, keys, buckets):
    q, grad = torch.randn(2, queries, heads, size)
    k, v = torch.randn(2, keys, key_heads, size)
    cu = [torch.tensor([0, count], dtype=torch.int32) for count in (queries, keys)]
    ranks = [torch.arange(count, dtype=torch.int32) for count in (queries, keys)]
    rest = (torch.randn(heads, buckets), torch.randn(heads, 50), queries, keys, size**-0.5, True)
    out, lse = torch.ops.speeder.spae_attention(q, k, v, *cu, *rest[2:4], *ranks, *rest[:2], *rest[4:], "cpu")
    def backward():
        return torch.ops.speeder.spae_attention_backward(
            grad, q, k, v, out, lse, *cu, *ranks, *rest, [True] * 5, "cpu"
        )
    return backward

passes(300, 300, 5)()
backward = passes(queries, keys, buckets)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
grads = backward()
print(status("VmHWM") - before - sum(x.numel() * x.element_size() for x in grads) / 2**20)
"""


ITEMS = """
import sys, torch
threads, rows, items, size = map(int, sys.argv[1:])
torch.set_num_threads(threads)
import speeder_kernels; speeder_kernels.backends()

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

def passes(rows, items):
    hidden, table, targets = torch.randn(rows, size), torch.randn(items, size) / 9, torch.zeros(rows).long()
    _, lse = torch.ops.speeder.item_cross_entropy(hidden, table, targets, 1.0, None, "cpu")
    return lambda: torch.ops.speeder.item_cross_entropy_backward(
        torch.ones(rows), hidden, table, targets, lse, 1.0, None, [True, True], "cpu"
    )

passes(300, 10000)()
backward = passes(rows, items)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
grads = backward()
print(status("VmHWM") - before - sum(x.numel() * x.element_size() for x in grads) / 2**20)
"""


def scratch(code: str, *arguments: int) -> float:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("shape", "most"),
    [
        ((4096, 4096, 4, 1, 64, 32), 4),  # the gradient of q of one key head: 4 MiB
        ((3000, 3000, 16, 4, 128, 32), 4 * 6),  # 6 MiB, of all four at once
        ((20_000, 0, 4, 1, 64, 32), 0),  # no keys: nothing to sum
        ((500, 500, 8, 1, 16, 500_000), 3 * 16),  # a table of 16 MiB as the kernel reads it, and two sums
    ],
)
@pytest.mark.parametrize("threads", [1, 16])
def test_attention(shape, most, threads):
    """docs/kernels.md states the bound: sums of q's and the tables' gradients, and 2 MiB for each thread."""
    assert scratch(ATTENTION, threads, *shape) < most + 2 * threads + 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("threads", [1, 16])
def test_item_cross_entropy(threads):
    """Hidden rows, 8 MiB, packed twice; at most 64 MiB of sums of their gradient; 3 MiB for each thread."""
    assert scratch(ITEMS, threads, 4096, 3500, 512) < 2 * 8 + min(64, threads * 8) + 3 * threads


@pytest.mark.exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_that_take_turns(dtype):
    """Rows whose gradient has fewer sums than there are threads: as on one thread, but for the order of sums."""
    torch.manual_seed(2)
    rows, items, size = 3000, 2500, 1024  # 12 MiB: five sums
    hidden, table = (torch.randn(n, size).to(dtype) / 9 for n in (rows, items))
    targets, grad = torch.randint(0, items, (rows,)), torch.rand(rows)
    _, lse = torch.ops.speeder.item_cross_entropy(hidden, table, targets, 1.0, None, "cpu")
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 16, 16, 16):
            torch.set_num_threads(count)
            results.append(
                torch.ops.speeder.item_cross_entropy_backward(
                    grad, hidden, table, targets, lse, 1.0, None, [True, True], "cpu"
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[2:] for a, b in zip(other, results[1], strict=True))
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][0], results[1][0])


@pytest.mark.exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_do_not_depend_on_the_number_of_threads(dtype, causal):
    """Those of q, k and v; the tables' are summed in as many parts as the threads ask for. Several pairs of a long
    sequence and a key head wait for a few slots, and tasks for each other."""
    lengths = [700, 3, 1500, 0, 290, 40, 900]
    args = set_ranks(make(lengths, [640, 9, 1500, 7, 0, 40, 1000], 6, 3, 48, (50, 400), dtype), "mixed")
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8, 16, 16, 16):
            torch.set_num_threads(count)
            copy, inputs = leaves(args)
            out = spae_attention(**copy, causal=causal, backend="cpu")
            torch.manual_seed(1)
            results.append(torch.autograd.grad(out, inputs, torch.randn_like(out)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, a, b in zip(GRADS, results[0], other, strict=True):
            if name in "qkv":
                assert torch.equal(a, b), name
            else:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(results[-1], results[-2], strict=True))
