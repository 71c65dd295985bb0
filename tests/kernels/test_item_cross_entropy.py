"""item_cross_entropy against a loop over items, in chunks smaller than the catalogue."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder_kernels import item_cross_entropy, reference
from tests.kernels import naive
from tests.kernels.places import at, places

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(rows=4, items=11, hidden=6, dtype=torch.float32, seed=0) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, hidden, generator=draw).to(dtype),
        torch.randn(items, hidden, generator=draw).to(dtype),
        torch.randint(0, items, (rows,), generator=draw),
        torch.randn(items, generator=draw),
    )


def leaves(hidden, table, dtype=None):
    return [x.to(dtype or x.dtype).clone().requires_grad_() for x in (hidden, table)]


@pytest.fixture(params=[3, 8192])
def chunk(request, monkeypatch) -> int:
    monkeypatch.setattr(reference, "ITEMS_PER_CHUNK", request.param)
    return request.param


@pytest.mark.parametrize(
    ("backend", "device", "items_per_chunk"),
    [("reference", "cpu", 1), ("reference", "cpu", 4), *((*p, 8192) for p in places("item_cross_entropy"))],
)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 6),
    items=st.integers(1, 20),
    hidden=st.sampled_from([1, 5, 32]),
    scale=st.sampled_from([0.2, 1.0, 20.0]),
    corrected=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10_000),
)
def test_matches_the_loop(
    backend, device, items_per_chunk, rows, items, hidden, scale, corrected, dtype, seed
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "ITEMS_PER_CHUNK", items_per_chunk)
        run = at(item_cross_entropy, backend, device)
        check(naive.item_cross_entropy, run, rows, items, hidden, scale, corrected, dtype, seed)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([1, 17, 64, 65, 256, 300]),
    items=st.sampled_from([1, 5, 96, 193, 1100, 2300]),
    hidden=st.sampled_from([1, 31, 64, 100, 577]),
    scale=st.sampled_from([0.05, 0.5]),
    corrected=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 10_000),
)
def test_blocks_of_rows_and_items(rows, items, hidden, scale, corrected, dtype, threads, seed):
    """Sizes that fill and overflow the compiled kernel's tiles, blocks and groups, and items shared by threads."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        run = at(item_cross_entropy, "cpu", "cpu")
        check(full_logits, run, rows, items, hidden, scale / hidden**0.5, corrected, dtype, seed)
    finally:
        torch.set_num_threads(before)


def full_logits(hidden, table, targets, scale, log_q):
    """What PyTorch users write, in the dtype of the inputs; the loop over items would take minutes here."""
    logits = hidden @ table.T
    logits = scale * (logits if logits.dtype == torch.float64 else logits.float())
    logits = logits if log_q is None else logits - log_q
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def check(exactly, run, rows, items, hidden, scale, corrected, dtype, seed):
    """`run`, the op by whatever means, in `dtype` against `exactly` in float64; PyTorch's own error in `dtype` is
    the measure."""
    h, table, targets, log_q = make(rows, items, hidden, dtype, seed)
    log_q = log_q if corrected else None
    ours, exact, same = leaves(h, table), leaves(h, table, torch.float64), leaves(h, table)
    loss = run(*ours, targets, scale=scale, log_q=log_q)
    loss_exact = exactly(*exact, targets, scale, None if log_q is None else log_q.double())
    loss_torch = full_logits(*same, targets, scale, log_q)
    largest = 1 + scale * (h.float().norm(dim=1).max() * table.float().norm(dim=1).max()).item()
    naive.assert_accurate("loss", loss, loss_exact, loss_torch, largest)
    results = [naive.gradients(x, y) for x, y in ((loss, ours), (loss_exact, exact), (loss_torch, same))]
    sizes = sizes_of_gradients(*(x.detach() for x in exact), targets, scale, log_q)
    for name, size, a, b, c in zip(("hidden", "item_table"), sizes, *results, strict=True):
        naive.assert_accurate(name, a, b, c, size * largest)  # a probability's error is that of its logit


def sizes_of_gradients(hidden, table, targets, scale, log_q):
    """The largest sum of absolute terms that an element of each gradient is, `gradients` drawing at most 4."""
    logits = scale * hidden @ table.T - (0.0 if log_q is None else log_q)
    terms = logits.softmax(dim=1) + torch.nn.functional.one_hot(targets, len(table))
    return [4 * scale * x.max().item() for x in (terms @ table.abs(), terms.T @ hidden.abs())]


def test_gradcheck(chunk):
    h, table, targets, log_q = make(dtype=torch.float64)
    run = lambda a, b: item_cross_entropy(a, b, targets, scale=0.7, log_q=log_q.double())  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves(h, table))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_large_logits_stay_finite(chunk, backend):
    """exp() of these would overflow: the sum must be taken relative to the largest."""
    h, table, targets, _ = make()
    hidden, items = leaves(h * 100, table * 100)
    loss = item_cross_entropy(hidden, items, targets, scale=50.0, backend=backend)
    grads = torch.autograd.grad(loss.sum(), (hidden, items))
    assert torch.isfinite(loss).all() and all(torch.isfinite(grad).all() for grad in grads)


def test_no_matrix_of_all_logits_is_held(monkeypatch):
    """Forward and backward never allocate as much as an (N, I) matrix."""
    monkeypatch.setattr(reference, "ITEMS_PER_CHUNK", 64)
    rows, items = 512, 2048
    h, table, targets, _ = make(rows, items, hidden=8)
    hidden, table = leaves(h, table)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    with Watch():
        _, lse = reference.item_cross_entropy(hidden.detach(), table.detach(), targets, 1.0, None)
        reference.item_cross_entropy_backward(
            torch.ones(rows), hidden.detach(), table.detach(), targets, lse, 1.0, None, [True, True]
        )
    assert rows * 64 <= largest < rows * items / 8


def test_memory_of_the_compiled_kernel():
    """In a process of its own: forward and backward take a small part of what the matrix of logits would."""
    code = (
        "import resource, torch\n"
        "from speeder_kernels import item_cross_entropy\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "def run(rows, items):\n"
        "    hidden = torch.randn(rows, 32).requires_grad_()\n"
        "    table = torch.randn(items, 32).requires_grad_()\n"
        "    targets = torch.randint(0, items, (rows,))\n"
        "    item_cross_entropy(hidden, table, targets, scale=0.1, backend='cpu').sum().backward()\n"
        "run(8, 100)\n"
        "before = peak()\n"
        "run(2048, 50_000)\n"
        "print((peak() - before) / (2048 * 50_000 * 4))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 0.1


@pytest.mark.exact
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("wanted", [0, 1])
def test_only_wanted_gradients(backend, wanted):
    h, table, targets, _ = make(70, 300, 40)
    run = lambda a, b: item_cross_entropy(a, b, targets, scale=1.0, backend=backend)  # noqa: E731
    both = leaves(h, table)
    expected = naive.gradients(run(*both), both)[wanted]
    one = [h, table]
    one[wanted] = one[wanted].clone().requires_grad_()
    (grad,) = naive.gradients(run(*one), [one[wanted]])
    assert torch.equal(grad, expected)


@pytest.mark.exact
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_are_bit_identical(backend):
    torch.use_deterministic_algorithms(False)  # it must hold without torch's help
    h, table, targets, _ = make(300, 900, 64)
    inputs = leaves(h, table)
    first, *others = [
        naive.gradients(item_cross_entropy(*inputs, targets, scale=1.0, backend=backend), inputs)
        for _ in range(4)
    ]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other, first, strict=True))


@pytest.mark.parametrize("corrected", [True, False])
def test_opcheck_compile_and_autocast(corrected):
    h, table, targets, log_q = make()
    log_q = log_q if corrected else None
    inputs = leaves(h, table)
    op = torch.ops.speeder.item_cross_entropy.default
    for backend in ("reference", "cpu"):
        torch.library.opcheck(op, (*inputs, targets, 0.5, log_q, backend))
    eager = item_cross_entropy(*inputs, targets, scale=0.5, log_q=log_q)
    compiled = torch.compile(item_cross_entropy, backend="aot_eager", fullgraph=True)
    out = compiled(*inputs, targets, scale=0.5, log_q=log_q)
    assert torch.equal(out, eager)
    pairs = zip(naive.gradients(out, inputs), naive.gradients(eager, inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(item_cross_entropy(*inputs, targets, scale=0.5, log_q=log_q), eager)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"hidden": torch.zeros(4, 0)},
            ValueError,
            r"hidden: expected at least one element .* got shape \(4, 0\)",
        ),
        ({"hidden": torch.zeros(6)}, ValueError, r"hidden: expected shape \(N, H\), got \(6,\)"),
        (
            {"item_table": torch.zeros(11, 5)},
            ValueError,
            r"item_table: expected shape \(I, 6\), got \(11, 5\)",
        ),
        (
            {"item_table": torch.zeros(11, 6).double()},
            TypeError,
            r"item_table: expected dtype float32, got float64",
        ),
        ({"item_table": torch.zeros(0, 6)}, ValueError, r"item_table: expected at least one element"),
        ({"targets": torch.zeros(4)}, TypeError, r"targets: expected dtype int32 or int64, got float32"),
        (
            {"targets": torch.tensor([0, 11, 0, 0])},
            IndexError,
            r"targets: expected 0\.\.10, got 11 at position 1",
        ),
        (
            {"targets": torch.tensor([0, 1, -100, 0])},
            IndexError,
            r"targets: expected 0\.\.10, got -100 at position 2",
        ),
        ({"scale": 0.0}, ValueError, r"scale: expected a number above 0"),
        ({"scale": float("nan")}, ValueError, r"scale: expected a finite float32, got nan"),
        ({"log_q": torch.zeros(4)}, ValueError, r"log_q: expected shape \(11,\), got \(4,\)"),
        ({"log_q": torch.zeros(11, requires_grad=True)}, ValueError, r"log_q: expected a constant, got"),
        ({"backend": "cuda"}, ValueError, r"'cuda' cannot run item_cross_entropy here"),
    ],
)
def test_bad_arguments(changes, error, message):
    hidden, table, targets, _ = make()
    args = {"hidden": hidden, "item_table": table, "targets": targets, "scale": 1.0, **changes}
    with pytest.raises(error, match=message):
        item_cross_entropy(**args)


def test_gradients_are_never_denormal():
    """Items that are all but impossible get nothing: on denormals Intel's processors take twenty times as long."""
    table = torch.linspace(-130.0, 0.0, 131)[:, None].requires_grad_()
    losses = item_cross_entropy(torch.ones(1, 1), table, torch.tensor([130]), scale=1.0, backend="cpu")
    (grad,) = torch.autograd.grad(losses.sum(), table)
    assert (grad[44:130] >= torch.finfo(torch.float32).tiny).all()  # e^-86 and more
    assert not grad[:42].any()  # below 2^-126


@pytest.mark.parametrize(("backend", "device"), places("item_cross_entropy"))
@pytest.mark.parametrize("items", [256, 1100, 5000])
def test_items_that_score_nearly_the_same(backend, device, items):
    """As in an untrained model: one long chain of sums would round every term in the same direction."""
    table = torch.full((items, 1), -1e-5)
    table[0] = 0
    hidden, targets = torch.ones(1, 1), torch.zeros(1, dtype=torch.long)
    loss = at(item_cross_entropy, backend, device)(hidden, table, targets, scale=1.0)
    exact = full_logits(hidden.double(), table.double(), targets, 1.0, None)
    assert (loss.cpu() - exact).abs() < 1.5e-6
