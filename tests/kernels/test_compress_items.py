"""compress_items against a loop over items and modalities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder_kernels import compress_items
from tests.kernels import naive
from tests.kernels.places import at, places

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(items=5, modalities=3, hidden=6, dtype=torch.float32, gate_dtype=None, seed=0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    present = torch.rand(items, modalities, generator=draw) < 0.6
    present[torch.arange(items), torch.randint(0, modalities, (items,), generator=draw)] = True
    return [
        torch.randn(items, modalities, hidden, generator=draw).to(dtype),
        (3 * torch.randn(items, modalities, generator=draw)).to(torch.bfloat16).to(gate_dtype or dtype),
        present,
        torch.randn(hidden, generator=draw).to(torch.bfloat16).to(gate_dtype or dtype),
    ]


def leaves(args, dtype=None):
    args = [x if x.dtype == torch.bool else x.to(dtype or x.dtype).clone().requires_grad_() for x in args]
    return args, [x for x in args if x.requires_grad]


def torch_compress(experts, logits, present, weight):
    """What one would write with PyTorch's own layers, in the dtype of the inputs."""
    gates = torch.softmax(logits.masked_fill(~present, float("-inf")), dim=-1)
    mixed = (gates.to(experts.dtype)[..., None] * experts).sum(dim=1)
    tokens = torch.nn.functional.rms_norm(mixed, weight.shape, weight.to(experts.dtype), 1e-6)
    return tokens, gates.float()


BACKENDS = ("reference", "cpu")


@pytest.mark.parametrize(("backend", "device"), places("compress_items"))
@settings(max_examples=40, deadline=None)
@given(
    items=st.integers(1, 7),
    modalities=st.integers(1, 20),
    hidden=st.sampled_from([1, 2, 16, 33, 100]),
    dtype=st.sampled_from(DTYPES),
    float32_gates=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_matches_the_loop(backend, device, items, modalities, hidden, dtype, float32_gates, seed):
    args = make(items, modalities, hidden, dtype, torch.float32 if float32_gates else None, seed)
    check_against_the_loop(at(compress_items, backend, device), args)


@pytest.mark.parametrize("hidden", [64, 576, 577])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_larger_than_a_cache(dtype, hidden):
    """Tokens and gradients are written past the caches where rows allow it, beside the zeros of absent modalities."""
    args = make(16_384 if hidden == 64 else 2048, 3, hidden, dtype)
    (ours, inputs), (expected, expected_inputs) = leaves(args), leaves(args)
    out, reference = compress_items(*ours, backend="cpu"), compress_items(*expected, backend="reference")
    assert out[0].nbytes > 1 << 20 and inputs[0].nbytes > 1 << 20
    close = dict.fromkeys(("rtol", "atol"), 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(out[0], reference[0], **close)
    grads, expected_grads = naive.gradients(out, inputs), naive.gradients(reference, expected_inputs)
    torch.testing.assert_close(grads[0], expected_grads[0], **close)
    assert grads[0][~args[2]].eq(0).all()


def check_against_the_loop(run, args):
    """`run` is compress_items, by whatever means; its results and gradients are held to the rule for errors."""
    dtype = args[0].dtype
    (ours, inputs), (exact, exact_inputs), (same, same_inputs) = (
        leaves(args),
        leaves(args, torch.float64),
        leaves(args),
    )
    out, out_exact = run(*ours), naive.compress_items(*exact)
    out_torch = torch_compress(*same)
    assert out[0].dtype == dtype and out[1].dtype == torch.float32
    naive.assert_accurate("tokens", out[0], out_exact[0], out_torch[0])
    naive.assert_accurate("gates", out[1], out_exact[1], out_torch[1])
    results = [
        naive.gradients(o, x) for o, x in ((out, inputs), (out_exact, exact_inputs), (out_torch, same_inputs))
    ]
    sizes = sizes_of_gradients(exact, out_exact[1].detach())
    for name, size, a, b, c in zip(("experts", "logits", "weight"), sizes, *results, strict=True):
        naive.assert_accurate(name, a, b, c, size)


def sizes_of_gradients(args, gates):
    """The largest sum of absolute terms that an element of each gradient is, `gradients` drawing at most 4.

    RMSNorm divides by the size of the mixture: where its terms cancel, it magnifies what float32 rounds off.
    """
    experts, _, present, weight = (x.detach() for x in args[:4])
    parts = torch.where(present[..., None], gates[..., None] * experts, 0.0)
    inverse_rms = (parts.sum(dim=1).square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
    normed = parts.abs().sum(dim=1) * inverse_rms  # without cancellation
    grad = 4 * weight.abs().expand_as(normed)
    grad_mixed = inverse_rms * (grad + normed * (grad * normed).mean(dim=-1, keepdim=True))
    grad_experts = gates[..., None] * grad_mixed[:, None]
    grad_gates = 4 + torch.where(present[..., None], experts.abs() * grad_mixed[:, None], 0.0).sum(dim=-1)
    grad_logits = gates * (grad_gates + (gates * grad_gates).sum(dim=-1, keepdim=True))
    magnified = normed.max().clamp(min=1.0)
    return [(magnified * x).max().item() for x in (grad_experts, grad_logits, 4 * normed.sum(dim=0))]


def test_gates_sum_to_one_over_what_is_present():
    args = make(items=50)
    present = args[2]
    _, gates = compress_items(*args)
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(50))
    assert gates[~present].eq(0).all()


@pytest.mark.exact
@pytest.mark.parametrize(("backend", "device"), places("compress_items"))
def test_absent_modalities_are_never_read(backend, device):
    """NaN in an absent row changes neither results nor gradients, and gets zero gradient itself."""

    def run(args, inputs):
        out = at(compress_items, backend, device)(*args)
        return [*out, *naive.gradients(out, inputs)]

    clean = run(*leaves(make(items=20)))
    dirty, inputs = leaves(make(items=20))
    with torch.no_grad():
        dirty[0][~dirty[2]] = float("nan")
        dirty[1][~dirty[2]] = float("nan")
    results = run(dirty, inputs)
    assert all(torch.equal(a, b) for a, b in zip(results, clean, strict=True))
    assert results[2][~dirty[2]].eq(0).all() and results[3][~dirty[2]].eq(0).all()


def test_gradcheck():
    args, inputs = leaves(make(dtype=torch.float64))
    present = args[2]
    assert torch.autograd.gradcheck(lambda e, g, w: compress_items(e, g, present, w), inputs)


@pytest.mark.exact
@pytest.mark.parametrize(("backend", "device"), places("compress_items"))
def test_gradients_are_bit_identical(backend, device):
    torch.use_deterministic_algorithms(False)  # it must hold without torch's help
    args, inputs = leaves(make(items=2000, hidden=64, dtype=torch.bfloat16))
    run = at(compress_items, backend, device)
    first, *others = [naive.gradients(run(*args), inputs) for _ in range(4)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other, first, strict=True))


@pytest.mark.exact
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    experts, logits, present, weight = make(items=9, hidden=40)
    wide = torch.full((9, 3, 80), float("nan"))
    wide[..., ::2] = experts
    args = (wide[..., ::2], logits.T.contiguous().T, present.T.contiguous().T, weight.repeat(2)[::2])
    expected = compress_items(experts, logits, present, args[3].contiguous(), backend=backend)
    for a, b in zip(compress_items(*args, backend=backend), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.exact
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), ()])
def test_only_wanted_gradients(wanted):
    """A gradient nobody needs comes back empty, and the others do not change."""
    args = make(items=50, hidden=40)
    grads = torch.randn(50, 40), torch.randn(50, 3)
    backward = torch.ops.speeder.compress_items_backward
    for backend in BACKENDS:
        everything = backward(*grads, *args, 1e-6, [True] * 3, backend)
        some = backward(*grads, *args, 1e-6, [n in wanted for n in range(3)], backend)
        for n, (whole, part) in enumerate(zip(everything, some, strict=True)):
            assert torch.equal(part, whole) if n in wanted else part.shape == (0, *whole.shape[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    args, _ = leaves(make())
    torch.library.opcheck(torch.ops.speeder.compress_items.default, (*args, 1e-6, backend))


def test_compile_and_autocast():
    args, inputs = leaves(make())
    eager = compress_items(*args)
    out = torch.compile(compress_items, backend="aot_eager", fullgraph=True)(*args)
    assert all(torch.equal(a, b) for a, b in zip(out, eager, strict=True))
    pairs = zip(naive.gradients(out, inputs), naive.gradients(eager, inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compress_items(*args)[0], eager[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {0: torch.zeros(5, 0, 6)},
            ValueError,
            r"expert_outputs: expected at least one .* got shape \(5, 0, 6\)",
        ),
        ({0: torch.zeros(5, 6)}, ValueError, r"expert_outputs: expected shape \(U, M, H\), got \(5, 6\)"),
        ({0: "x"}, TypeError, r"expert_outputs: expected a tensor, got str"),
        ({1: torch.zeros(5, 2)}, ValueError, r"gate_logits: expected shape \(5, 3\), got \(5, 2\)"),
        ({1: torch.zeros(5, 3).double()}, TypeError, r"gate_logits: expected dtype float32, .*, got float64"),
        ({2: torch.ones(5, 3)}, TypeError, r"present: expected dtype bool, got float32"),
        (
            {2: torch.ones(5, 3, dtype=torch.bool, device="meta")},
            ValueError,
            r"present: expected device cpu, got meta",
        ),
        ({3: torch.ones(5)}, ValueError, r"norm_weight: expected shape \(6,\), got \(5,\)"),
        ({"eps": 0.0}, ValueError, r"eps: expected a number above 0"),
        ({"backend": "cuda"}, ValueError, r"'cuda' cannot run compress_items here"),
    ],
)
def test_bad_arguments(changes, error, message):
    args = [changes.get(n, x) for n, x in enumerate(make())]
    with pytest.raises(error, match=message):
        compress_items(*args, **{name: x for name, x in changes.items() if isinstance(name, str)})


def test_an_item_with_no_modality():
    args = make()
    args[2][3] = False
    with pytest.raises(
        ValueError, match="present: expected at least one modality an item, got none for item 3"
    ):
        compress_items(*args)
