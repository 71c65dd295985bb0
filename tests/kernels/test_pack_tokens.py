"""pack_tokens on the reference and the compiled CPU backend, against a loop over tokens."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder_kernels import _host, pack_tokens
from tests.kernels import naive
from tests.kernels.places import at, places

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "cpu")
TABLES = ("text_embedding", "item_tokens", "position_prompts")


def make(tokens=12, vocabulary=7, items=4, prompts=5, hidden=6, dtype=torch.float32, seed=0) -> dict:
    draw = torch.Generator().manual_seed(seed)

    def randint(low, high):
        return torch.randint(low, high, (tokens,), generator=draw)

    item_rows = randint(-1, items)
    input_ids = torch.where(item_rows >= 0, vocabulary + item_rows, randint(0, vocabulary))
    return {
        "input_ids": input_ids,
        "text_embedding": torch.randn(vocabulary, hidden, generator=draw).to(dtype),
        "item_tokens": torch.randn(items, hidden, generator=draw).to(dtype),
        "item_rows": item_rows,
        "ranks": torch.where(item_rows >= 0, randint(-1, prompts), 10**6),  # a text token's rank is not read
        "position_prompts": torch.randn(prompts, hidden, generator=draw).to(dtype),
    }


def leaves(args: dict, dtype=None) -> tuple[dict, list[torch.Tensor]]:
    made = {name: args[name].detach().to(dtype or args[name].dtype).requires_grad_() for name in TABLES}
    made = {name: x.clone().detach().requires_grad_() for name, x in made.items()}
    return {**args, **made}, list(made.values())


@pytest.mark.parametrize(("backend", "device"), places("pack_tokens"))
@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 40),
    sizes=st.tuples(st.integers(1, 9), st.integers(0, 6), st.integers(0, 5)),
    hidden=st.sampled_from([1, 3, 8, 63, 64, 65, 130]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10_000),
)
def test_matches_the_loop(backend, device, tokens, sizes, hidden, dtype, seed):
    args = make(tokens, *sizes, hidden, dtype, seed)
    check_against_the_loop(at(pack_tokens, backend, device), args)


def check_against_the_loop(run, args):
    """`run` is pack_tokens, by whatever means: its output holds to the last bit (it is one addition), its gradients
    by the rule for errors."""
    tokens, dtype = len(args["input_ids"]), args["text_embedding"].dtype
    (ours, inputs), (exact, exact_inputs), (same, same_inputs) = (
        leaves(args),
        leaves(args, torch.float64),
        leaves(args),
    )
    out, out_torch = run(**ours), naive.pack_tokens(**same)
    assert out.dtype == dtype and torch.equal(out, out_torch)
    grads, exact_grads, torch_grads = (
        naive.gradients(o, x)
        for o, x in ((out, inputs), (naive.pack_tokens(**exact), exact_inputs), (out_torch, same_inputs))
    )
    for name, a, b, c in zip(TABLES, grads, exact_grads, torch_grads, strict=True):
        if b.numel():
            naive.assert_accurate(name, a, b, c, float(tokens))


@pytest.mark.exact
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_equals_reference(dtype):
    """A batch of the size that several threads share, forward and backward."""
    args = make(tokens=3000, vocabulary=50, items=200, prompts=50, hidden=192, dtype=dtype)
    results = {}
    for backend in BACKENDS:
        ours, inputs = leaves(args)
        out = pack_tokens(**ours, backend=backend)
        results[backend] = [out, *naive.gradients(out, inputs)]
    for a, b in zip(results["cpu"], results["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps, atol=1e-4)
    assert torch.equal(results["cpu"][0], results["reference"][0])


@pytest.mark.parametrize("hidden", [576, 577, 592])  # rows of whole cache lines or not
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_larger_than_a_cache(dtype, hidden):
    """They are written past the caches where their rows allow it; a NaN keeps its bits."""
    args = make(tokens=15_000, vocabulary=50, items=200, prompts=50, hidden=hidden, dtype=dtype)
    args["text_embedding"][7] = torch.tensor([-1]).view(torch.uint8)[: dtype.itemsize].view(dtype)
    ours, expected = (pack_tokens(**args, backend=backend) for backend in ("cpu", "reference"))
    assert ours.nbytes > 1 << 24
    assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))


def test_picks_the_compiled_kernel_except_for_float64(monkeypatch):
    from speeder_kernels import reference

    def refuse(*_):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "pack_tokens", refuse)
    pack_tokens(**make())
    with pytest.raises(AssertionError, match="the reference ran"):
        pack_tokens(**make(dtype=torch.float64))


def test_gradcheck():
    args, inputs = leaves(make(dtype=torch.float64))
    run = lambda *tables: pack_tokens(**{**args, **dict(zip(TABLES, tables, strict=True))})  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.exact
@pytest.mark.parametrize(("backend", "device"), places("pack_tokens"))
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_gradients_are_bit_identical(backend, device, threads):
    """From run to run, and for the compiled kernel whatever the number of threads."""
    torch.use_deterministic_algorithms(False)  # it must hold without torch's help
    args, inputs = leaves(make(tokens=4000, hidden=128))
    run = at(pack_tokens, backend, device)
    first = naive.gradients(run(**args), inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads if backend == "cpu" else before)
    try:
        for _ in range(3):
            again = naive.gradients(run(**args), inputs)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.exact
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", TABLES)
def test_only_wanted_gradients(backend, wanted):
    """A frozen table's gradient comes out of the backward op empty: nothing was summed for it."""
    args = make()
    args[wanted].requires_grad_()
    (grad,) = torch.autograd.grad(pack_tokens(**args, backend=backend).sum(), args[wanted])
    counts = {"text_embedding": "input_ids", "item_tokens": "item_rows", "position_prompts": "ranks"}
    index, is_item = args[counts[wanted]], args["item_rows"] >= 0
    used = ~is_item if wanted == "text_embedding" else is_item & (index >= 0)
    expected = torch.bincount(index[used], minlength=len(grad)).float()[:, None].expand_as(grad)
    assert torch.equal(grad, expected)
    needs = [name == wanted for name in TABLES]
    sizes = [len(args[name]) for name in TABLES]
    indices = [args[name] for name in ("input_ids", "item_rows", "ranks")]
    grads = torch.ops.speeder.pack_tokens_backward(torch.ones(12, 6), *indices, sizes, needs, backend)
    assert [len(g) for g in grads] == [size if need else 0 for size, need in zip(sizes, needs, strict=True)]


@pytest.mark.exact
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_tables_and_int32_indices(backend):
    args = make()
    strided = {name: args[name].repeat_interleave(2, dim=1)[:, ::2] for name in TABLES}
    narrow = {name: args[name].int() for name in ("input_ids", "item_rows", "ranks")}
    assert torch.equal(pack_tokens(**strided, **narrow, backend=backend), pack_tokens(**args))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    args, inputs = leaves(make())
    torch.library.opcheck(torch.ops.speeder.pack_tokens.default, (*args.values(), backend))
    compiled = torch.compile(pack_tokens, backend="aot_eager", fullgraph=True)
    out = compiled(**args, backend=backend)
    assert torch.equal(out, pack_tokens(**args))
    eager = naive.gradients(pack_tokens(**args, backend=backend), inputs)
    assert all(torch.equal(a, b) for a, b in zip(naive.gradients(out, inputs), eager, strict=True))


SCRIPT = """
import hashlib, torch
from speeder_kernels import _host, pack_tokens
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    torch.manual_seed(0)
    tables = [torch.randn(n, 67).to(dtype).requires_grad_() for n in (9, 7, 5)]
    ids, rows, ranks = (torch.randint(low, high, (200,)) for low, high in ((0, 9), (-1, 7), (-1, 5)))
    out = pack_tokens(ids, tables[0], tables[1], rows, ranks, tables[2], backend="cpu")
    for x in (out, *torch.autograd.grad(out.square().sum(), tables)):
        digest.update(x.detach().float().numpy().tobytes())
print(_host.instruction_set(), digest.hexdigest())
"""


def start_with_isa(isa: str) -> subprocess.Popen:
    environ = {**os.environ, "SPEEDER_CPU_ISA": isa}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", SCRIPT], env=environ, stdout=pipe, stderr=pipe, text=True)


def test_every_instruction_set_gives_the_same_bits():
    names = ["portable", "avx2", "avx512"]
    best = _host.instruction_set().removesuffix("_bf16").removesuffix("_amx")
    here = names[: names.index(best) + 1]
    processes = [start_with_isa(isa) for isa in here]
    results = [process.communicate() for process in processes]
    assert [out.split()[:1] for out, _ in results] == [[isa] for isa in here], results
    assert len({out.split()[1] for out, _ in results}) == 1


def test_unknown_instruction_set_is_an_error():
    process = start_with_isa("sse9")
    _, stderr = process.communicate()
    assert process.returncode != 0
    assert "SPEEDER_CPU_ISA: expected portable, avx2, avx512, avx512_bf16 or avx512_amx, got sse9" in stderr


def changed(name: str, position: int, value: int) -> dict:
    args = make()
    args["item_rows"][:4] = torch.tensor([-1, 0, 1, -1])
    args["input_ids"][[0, 3]] = 0
    args["ranks"][1:3] = 0
    args[name][position] = value
    return args


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("input_ids", 3, 7, r"input_ids: expected 0\.\.6, got 7 at position 3"),
        ("input_ids", 0, -1, r"input_ids: expected 0\.\.6, got -1 at position 0"),
        ("item_rows", 2, 4, r"item_rows: expected -1\.\.3 .*, got 4 at position 2"),
        ("item_rows", 2, -2, r"item_rows: expected -1\.\.3 .*, got -2 at position 2"),
        ("ranks", 1, 5, r"ranks: expected -1\.\.4 .*, got 5 at position 1"),
        ("ranks", 1, -2, r"ranks: expected -1\.\.4 .*, got -2 at position 1"),
    ],
)
def test_out_of_range(backend, name, position, value, message):
    with pytest.raises(IndexError, match=message):
        pack_tokens(**changed(name, position, value), backend=backend)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"input_ids": torch.zeros(0).long()},
            ValueError,
            r"item_rows: expected shape \(0,\), got \(12,\)",
        ),
        ({"input_ids": torch.zeros(12)}, TypeError, r"input_ids: expected dtype int32 or int64, got float32"),
        (
            {"input_ids": torch.zeros(3, 4).long()},
            ValueError,
            r"input_ids: expected shape \(T,\), got \(3, 4\)",
        ),
        ({"item_rows": torch.zeros(3).long()}, ValueError, r"item_rows: expected shape \(12,\), got \(3,\)"),
        ({"ranks": torch.zeros(3).long()}, ValueError, r"ranks: expected shape \(12,\), got \(3,\)"),
        ({"text_embedding": None}, TypeError, r"text_embedding: expected a tensor, got NoneType"),
        ({"text_embedding": torch.zeros(7, 0)}, ValueError, r"text_embedding: expected at least one"),
        (
            {"item_tokens": torch.zeros(4, 6).double()},
            TypeError,
            r"item_tokens: expected dtype float32, bfloat16 or float16, got float64",
        ),
        (
            {"item_tokens": torch.zeros(4, 5)},
            ValueError,
            r"item_tokens: expected shape \(U, 6\), got \(4, 5\)",
        ),
        (
            {"position_prompts": torch.zeros(5, 6, device="meta")},
            ValueError,
            r"position_prompts: .* cpu, got meta",
        ),
        (
            {"backend": "cuda"},
            ValueError,
            r"backend: 'cuda' cannot run pack_tokens here: .*; available: .*cpu, ref",
        ),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        pack_tokens(**{**make(), **changes})


@pytest.mark.exact
def test_no_items_at_all():
    """Empty tables are fine where nothing points into them."""
    args = make(items=0, prompts=0)
    assert torch.equal(pack_tokens(**args), args["text_embedding"][args["input_ids"]])
