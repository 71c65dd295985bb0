"""spae_attention in Triton: a sweep with tiles so small that tiny shapes fill and overflow them, against float64 and
PyTorch; programs in any order; planted faults. In the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from triton.runtime.errors import InterpreterError

from speeder_kernels import spae_attention
from speeder_kernels.triton import tiles
from speeder_kernels.triton.attention import arguments
from speeder_kernels.triton.attention import ops as launcher
from tests.kernels import naive
from tests.kernels.places import at
from tests.kernels.test_spae_attention import NAMES, leaves, make
from tests.kernels.test_spae_attention_cpu import GRADS, KINDS, set_ranks
from tests.kernels.triton_tools import (
    DEVICE,
    DTYPES,
    exact_bfloat16,
    interpreted_only,
    missing_barriers_fail,
    planted,
    programs_in_any_order,
)

# The modules of speeder_kernels.triton in the order in which they import each other.
MODULES = [
    f"attention.{name}"
    for name in (
        "tuples", "sequences", "ranks", "bias", "forward", "decode", "backward_rows", "backward_queries",
        "backward_keys", "partial_tables", "backward_relative", "backward_absolute", "arguments", "ops",
    )
]  # fmt: skip
attend = at(spae_attention, "triton", DEVICE)


@pytest.fixture(autouse=True, scope="module")
def _exact_bfloat16() -> Iterator[None]:
    with exact_bfloat16():
        yield


@contextlib.contextmanager
def small_attention_tiles(processors: int = 2, separate: int = 0) -> Iterator[None]:
    """Blocks of 16 or 32 queries and keys; few `processors` share the tiles, and split the keys of one."""
    rows = {}
    for key in tiles.TILES:
        if key[0] == "spae_attention":
            most = 32 if key[1] == "queries" else 16  # tiles of "relative" divide those of "queries"
            row = {name: min(value, most) for name, value in tiles.TILES[key][80].items()}
            rows[key] = {80: {**row, "separate": separate} if key[1] == "keys" else row}
    with (
        mock.patch.dict(tiles.TILES, rows),
        mock.patch.multiple(
            sys.modules[launcher.__name__],
            processors=lambda device: processors,
            KEYS_OF_SPLIT=16,
            KEYS_OF_BLOCK=16,
            PARTS_AT_ONCE=2,
            MOST_ROWS=6,  # so that short sequences are not all decoded
        ),
    ):
        yield


def outputs(
    args: dict, causal: bool, how: str, ours: Callable = attend
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and gradients by `ours`, by the reference in float64, or by PyTorch's own attention."""
    copy, inputs = leaves(args, torch.float64 if how == "exact" else None)
    if how == "torch":
        out = naive.torch_attention(*(copy[name] for name in NAMES), causal)
    else:
        run = ours if how == "ours" else at(spae_attention, "reference", "cpu")
        out = run(**copy, causal=causal)
    return out, naive.gradients(out, inputs)


def check(args: dict, causal: bool, ours: Callable = attend) -> None:
    """The rule for errors, for the output and every gradient."""
    (out, grads), (exact, grads_exact), (torchs, grads_torch) = (
        outputs(args, causal, how, ours) for how in ("ours", "exact", "torch")
    )
    naive.assert_accurate("out", out, exact, torchs, args["v"].abs().max().item())
    # As in test_spae_attention: the dot products whose difference is a score's gradient.
    products = 8 * args["v"].float().norm(dim=-1).max().item() * args["q"].shape[2] ** 0.5
    largest = products * max(1.0, *(args[name].abs().max().item() for name in "qk"))
    names = [name for name in GRADS if args[name] is not None]
    for name, a, b, c in zip(names, grads, grads_exact, grads_torch, strict=True):
        naive.assert_accurate(name, a, b, c, largest)


def answered(args: dict) -> dict:
    """As prompts are: text, items, text, and a last token that carries the next rank."""
    args = set_ranks(args, "history")
    for side in "qk":
        ends = args[f"cu_seqlens_{side}"][1:].long()
        for end in ends[ends > 3].tolist():
            rank = args[f"rank_{side}"]
            rank[end - 3 : end - 1], rank[end - 1] = -1, int(rank[end - 4]) + 1
    return args


def draw(kind: str, *shape, **options) -> dict:
    args = make(*shape, **options)
    return answered(args) if kind == "answered" else set_ranks(args, kind, options.get("seed", 0))


@pytest.mark.slow
# Shrinking a failure would take the interpreter minutes: the example as it was found has to do.
@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    lengths=st.lists(st.tuples(st.integers(0, 36), st.integers(0, 36)), min_size=1, max_size=2).filter(
        lambda pairs: sum(a for a, _ in pairs) and sum(b for _, b in pairs)
    ),
    heads=st.sampled_from([(1, 1), (2, 2), (2, 1), (3, 1)]),
    size=st.sampled_from([7, 16, 24, 64]),
    buckets=st.tuples(st.sampled_from([None, 1, 2, 6, 40]), st.sampled_from([None, 1, 20])),
    kind=st.sampled_from((*KINDS, "answered")),
    causal=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    processors=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 10_000),
)
def test_matches_float64(lengths, heads, size, buckets, kind, causal, dtype, processors, seed):
    lengths_q, lengths_k = zip(*lengths, strict=True)
    args = draw(kind, lengths_q, lengths_k, *heads, size, buckets, dtype=dtype, seed=seed)
    with small_attention_tiles(processors, separate=seed % 2):
        check(args, causal)


@pytest.mark.parametrize("kind", [*KINDS, "answered"])
def test_more_keys_than_queries_of_every_kind(kind):
    """Several tiles in both directions, far apart and near, for every kind of ranks."""
    with small_attention_tiles():
        check(draw(kind, [50], [66], 1, 1, 8, (20, 30), dtype=torch.float32), True)


def test_tiles_of_the_relative_table_divide_those_of_the_queries():
    """The one kernel leaves out what the other one has summed."""
    for key, rows in tiles.TILES.items():
        if key[:2] == ("spae_attention", "relative"):
            for arch in tiles.ARCHITECTURES:
                small, large = (
                    options[max(row for row in options if row <= arch)]
                    for options in (rows, tiles.TILES[("spae_attention", "queries", *key[2:])])
                )
                assert small["block_q"] <= small["block_k"], key  # for `add_diagonals`
                for block in ("block_q", "block_k"):
                    assert large[block] % small[block] == 0, (key, arch, block)


@pytest.mark.parametrize(
    ("size", "arch"),
    [
        (80, 80),
        (128, 80),
        (256, 80),
        *((size, arch) for size in (16, 64, 128) for arch in tiles.ARCHITECTURES[1:]),
    ],
)
def test_the_tiles_of_a_gpu(size, arch, monkeypatch):
    """The rows that stand in the table of tiles, at head sizes that fill them and do not."""
    if DEVICE == "cpu":  # a GPU takes its own
        monkeypatch.setattr(tiles, "architecture", lambda device: arch)
    check(draw("answered", [75, 3], [140, 3], 1, 1, size, (20, 9), dtype=DTYPES[-1]), True)


@pytest.mark.parametrize("processors", [1, 40])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["answered", "far", "random"])
def test_few_queries_against_many_keys(kind, causal, processors):
    """The keys in one split or several, some of them without a key, a sequence that has none; a tile of all heads."""
    lengths_q, lengths_k = [1, 3, 2, 0], [90, 2, 0, 5]
    args = draw(kind, lengths_q, lengths_k, 6, 2, 24, (9, 5), dtype=DTYPES[-1])
    with small_attention_tiles(processors), torch.no_grad():
        check_forward(args, causal)


def check_forward(args: dict, causal: bool, ours: Callable = attend) -> None:
    exact = at(spae_attention, "reference", "cpu")(**leaves(args, torch.float64)[0], causal=causal)
    torchs = naive.torch_attention(*(args[name] for name in NAMES), causal)
    out = ours(**args, causal=causal)
    naive.assert_accurate("out", out, exact, torchs, args["v"].abs().max().item())


def raw(args: dict, causal: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    moved = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in args.values()]
    return torch.ops.speeder.spae_attention(*moved, 0.25, causal, "triton")


@pytest.mark.parametrize("queries", [1, 40])
def test_log_sum_exp(queries):
    """As the reference has it, +inf where a query sees no key; decoded in splits, and not."""
    args = draw("answered", [queries, 2], [70, 1], 2, 1, 8, (9, 5))
    expected = torch.ops.speeder.spae_attention(*args.values(), 0.25, True, "reference")[1]
    with small_attention_tiles(40):
        lse = raw(args)[1].cpu()
    assert torch.isinf(lse).any() and torch.equal(torch.isinf(lse), torch.isinf(expected))
    torch.testing.assert_close(lse, expected)


def test_a_head_that_is_too_large_is_refused():
    """By the launcher too, whoever calls it."""
    q = torch.zeros(1, 1, 320, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"q: expected a head dimension of at most 256 .* triton backend, got 320"
    ):
        arguments.tile_shape(q, "forward")


def test_rows_that_see_no_key_are_zero_and_take_no_gradient():
    args, _ = leaves(make([40, 2], [20, 0]))
    with small_attention_tiles():
        out = attend(**args)
        blind = [*range(20), 40, 41]
        assert out[blind].eq(0).all() and out[20:40].ne(0).all()
        grads = torch.autograd.grad(out.sum(), (args["q"], args["k"], args["v"]))
    assert grads[0][blind].eq(0).all() and all(torch.isfinite(grad).all() for grad in grads)


def test_a_sequence_does_not_see_its_neighbours():
    """NaN in the tokens of one leaves the others alone, forward and backward."""
    args = make([20, 9, 18], [20, 9, 18])
    for name in "qkv":
        args[name][20:29] = float("nan")
    copy, inputs = leaves(args)
    with small_attention_tiles():
        out = attend(**copy)
        grads = torch.autograd.grad(out[[*range(20), *range(29, 47)]].sum(), inputs[:3])
    assert torch.isfinite(out[:20]).all() and torch.isfinite(out[29:]).all() and out[20:29].isnan().all()
    for grad in grads:
        assert torch.isfinite(grad[:20]).all() and torch.isfinite(grad[29:]).all()


@pytest.mark.parametrize(
    ("queries", "processors", "tail_q", "tail_k"),
    [(20, 2, 20, 0), (20, 2, 3, 3), (20, 2, 0, 20), (2, 1, 20, 20), (2, 40, 20, 0)],
)
def test_tokens_behind_the_last_sequence(queries, processors, tail_q, tail_k, monkeypatch):
    """A batch padded to a fixed size: sequences as they are without, zeros behind them, whatever stands there. Less
    than a tile and several of them; decoded in splits or at once, and not."""
    # As on a GPU, where nobody reads where the sequences end.
    monkeypatch.setattr("speeder_kernels.validate.reads_values", lambda *_: False)
    args = draw("answered", [queries, 1], [21, 4], 1, 1, 8, (9, 5))
    padded = dict(args)
    for names, tail in ((("q", "rank_q"), tail_q), (("k", "v", "rank_k"), tail_k)):
        for name in names:
            fill = 7 if name.startswith("rank") else float("nan")
            padded[name] = torch.cat((args[name], args[name].new_full((tail, *args[name].shape[1:]), fill)))
    upstream = torch.randn(queries + 1, 1, 8)
    padded_upstream = torch.cat((upstream, torch.full((tail_q, 1, 8), float("nan"))))
    results = []
    for case, up in ((args, upstream), (padded, padded_upstream)):
        copy, inputs = leaves(case)
        with small_attention_tiles(processors):
            out = attend(**copy)
            results.append([out, *torch.autograd.grad(out, inputs, up)])
    for name, a, b in zip(("out", *GRADS), *results, strict=True):
        torch.testing.assert_close(b[: len(a)], a, msg=lambda text, name=name: f"{name}: {text}")
        assert b[len(a) :].eq(0).all(), name


@pytest.mark.parametrize(("told", "processors"), [(0, 1), (1, 1), (1, 40), (2, 1), (2, 40)])
def test_longer_sequences_than_were_told(told, processors, monkeypatch):
    """Where nobody reads the lengths: a row is right, or NaN. In splits, and at once."""
    monkeypatch.setattr("speeder_kernels.validate.reads_values", lambda *_: False)
    args = draw("answered", [40, 2, 1], [60, 4, 1], 2, 1, 8, (9, 5))
    exact = attend(**args)
    with small_attention_tiles(processors):
        out = attend(**{**args, "max_seqlen_q": told, "max_seqlen_k": told})
    torch.testing.assert_close(out[40 : 40 + told], exact[40 : 40 + told])
    torch.testing.assert_close(out[42], exact[42])
    is_nan = out.isnan().flatten(1)
    assert torch.equal(is_nan.all(1), is_nan.any(1)) and is_nan[39].all()
    torch.testing.assert_close(out[~is_nan.any(1)], exact[~is_nan.any(1)])


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("queries", [1, 20])
def test_strided_inputs(step, queries):
    """Slices of a fused projection, heads before tokens, and a step in the last dimension, also of the gradient."""
    fused = torch.randn(3, 2, 20, 8 * step)[..., ::step].transpose(1, 2)
    args = {**make([queries], [20], 2, 2, 8), "q": fused[0, :queries], "k": fused[1], "v": fused[2]}
    dense = {**args, **{name: args[name].contiguous() for name in "qkv"}}
    up = torch.randn(2, queries, 8 * step)[..., ::step].transpose(0, 1)
    results = []
    with small_attention_tiles():
        for case, upstream in ((args, up), (dense, up.contiguous())):
            out, lse = raw(case)
            rest = [case[name].to(DEVICE) for name in (*NAMES[3:7], *GRADS[3:])]
            tensors = [x.to(DEVICE) for x in (upstream, case["q"], case["k"], case["v"])]
            results.append((out, *backward(tensors, out, lse, rest, [True] * 5)))
    assert not args["k"].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@interpreted_only
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("blocks", [small_attention_tiles, contextlib.nullcontext])
def test_offsets_that_overflow_32_bits(queries, blocks, tmp_path):
    """Of tiles, and within one. Tokens 2^27 elements apart, in a file with holes: only pages that hold a token take
    memory."""
    args = make([queries], [20], 2, 1, 16, dtype=torch.float16)
    apart = (1 << 27) + 128
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=20 * apart, dtype=torch.float16)
    up, far = torch.randn(queries, 2, 16).half(), {}
    for n, (name, x) in enumerate({**{name: args[name] for name in "qkv"}, "up": up}.items()):
        far[name] = memory.as_strided(x.shape, (apart, 16, 1), 32 * n)
        far[name].copy_(x)
    rest, results = [args[name] for name in (*NAMES[3:7], *GRADS[3:])], []
    with blocks():
        for case, upstream in (({**args, **{name: far[name] for name in "qkv"}}, far["up"]), (args, up)):
            out, lse = raw(case)
            tensors = [upstream, *(case[name] for name in "qkv")]
            results.append((out, *backward(tensors, out, lse, rest, [True] * 5)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def backward(tensors, out, lse, rest, needs) -> tuple[torch.Tensor, ...]:
    longest = [int(cu.diff().max()) for cu in rest[:2]]
    options = (0.25, True, needs, "triton")
    return torch.ops.speeder.spae_attention_backward(*tensors, out, lse, *rest, *longest, *options)


@pytest.mark.parametrize("wanted", [(), ("q",), ("k",), ("v",), ("relative_bias",), ("v", "absolute_bias")])
@pytest.mark.parametrize("separate", [0, 1])
def test_only_what_is_asked_for(wanted, separate):
    """A gradient nobody needs comes back empty, the others do not change, and no kernel runs that nobody needs."""
    args = make([30, 5], [30, 9], 2, 1, 16)
    grad, launched = torch.randn(35, 2, 16).to(DEVICE), []
    out, lse = raw(args)
    rest = [args[name].to(DEVICE) for name in (*NAMES[3:7], *GRADS[3:])]
    tensors = [grad, *(args[name].to(DEVICE) for name in "qkv")]
    launch = launcher.launch
    with small_attention_tiles(separate=separate):
        everything = backward(tensors, out, lse, rest, [True] * 5)

        def note(kernel, *arguments, **options):
            launched.append(kernel.fn.__name__)
            launch(kernel, *arguments, **options)

        with mock.patch.object(launcher, "launch", note):
            some = backward(tensors, out, lse, rest, [name in wanted for name in GRADS])
    for name, whole, part in zip(GRADS, everything, some, strict=True):
        assert torch.equal(part, whole) if name in wanted else part.shape == (0, *whole.shape[1:])
    assert ("keys_kernel" in launched) == bool({"k", "v", "absolute_bias"} & {*wanted})
    assert ("queries_kernel" in launched) == bool({"q", "relative_bias"} & {*wanted})
    assert ("relative_kernel" in launched) == ("relative_bias" in wanted)
    assert ("absolute_kernel" in launched) == ("absolute_bias" in wanted)


@pytest.mark.parametrize("wanted", [("q",), ("absolute_bias",), ("relative_bias",)])
def test_tables_of_half_precision_take_a_pass_over_the_queries(wanted):
    """For delta, whatever else is wanted; and where no table takes a gradient, the pass is not longer for it."""
    args = make([20], [20], 1, 1, 8, dtype=torch.float16)
    corrected = []
    launch = launcher.launch

    def note(kernel, *arguments, **options):
        corrected.append(options.get("CORRECT"))
        launch(kernel, *arguments, **options)

    out, lse = raw(args)
    rest = [args[name].to(DEVICE) for name in (*NAMES[3:7], *GRADS[3:])]
    with small_attention_tiles(), mock.patch.object(launcher, "launch", note):
        backward(
            [out, *(args[name].to(DEVICE) for name in "qkv")],
            out,
            lse,
            rest,
            [name in wanted for name in GRADS],
        )
    assert (True in corrected) == (wanted != ("q",))


@pytest.mark.parametrize("buckets", [(5, 3), (None, None), (4, None)])
def test_opcheck(buckets):
    args, _ = leaves(make([3, 2], [3, 4], buckets=buckets))
    moved = [
        x.detach().to(DEVICE).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for x in args.values()
    ]
    with small_attention_tiles():
        torch.library.opcheck(torch.ops.speeder.spae_attention.default, (*moved, 0.5, True, "triton"))


def test_compile():
    args, inputs = leaves(make([3, 20], [3, 24]))
    with small_attention_tiles():
        out, eager = torch.compile(attend, backend="aot_eager")(**args), attend(**args)
        assert torch.equal(out, eager)
        for a, b in zip(naive.gradients(out, inputs), naive.gradients(eager, inputs), strict=True):
            assert torch.equal(a, b)


# --- the order of programs, and planted faults --------------------------------------------------------------


def runs_in_any_order(orders: int) -> Iterator[list[torch.Tensor]]:
    """The same batch, its programs in some orders (where there is a GPU: as it likes): output and gradients."""
    args = draw("answered", [40, 20], [40, 20], 1, 1, 8, (20, 7))
    for order in range(orders):
        with small_attention_tiles(), contextlib.ExitStack() as stack:
            if DEVICE == "cpu":
                stack.enter_context(programs_in_any_order(order))
            out, grads = outputs(args, True, "ours")
        yield [out, *grads]


def test_gradients_are_bit_identical_in_any_order():
    torch.use_deterministic_algorithms(False)  # it must hold without torch's help
    first, *others = runs_in_any_order(3)
    for run in others:
        assert all(torch.equal(a, b) for a, b in zip(run, first, strict=True))


def check_kind(kind: str, length: int, buckets: tuple[int, int], causal: bool = True) -> None:
    with small_attention_tiles():
        check(draw(kind, [length], [length], 1, 1, 8, buckets), causal)


def check_decode() -> None:
    with small_attention_tiles(processors=40):
        check_forward(draw("answered", [2], [45], 2, 1, 8, (6, 7)), True)


def check_tables(kind: str, length: int, buckets: tuple[int, int], dtype: torch.dtype) -> None:
    """Gradients of the tables, which are float32, far closer than half precision comes: neither the rounding of the
    output nor that of products is theirs."""
    args = draw(kind, [length], [length], 1, 1, 8, buckets, dtype=dtype)
    with small_attention_tiles():
        grads, exact = (outputs(args, True, how)[1][3:] for how in ("ours", "exact"))
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=3e-5)


CHECKS = {
    "float16": lambda: check_tables("history", 70, (2, 1), torch.float16),
    "bfloat16": lambda: check_tables("random", 40, (6, 7), torch.bfloat16),
    "answered": lambda: check_kind("answered", 36, (6, 7)),
    "mixed": lambda: check_kind("mixed", 36, (6, 7)),
    "all seen": lambda: check_kind("history", 40, (19, 7), causal=False),
    "far": lambda: check_kind("far", 20, (6, 7)),
    "history": lambda: check_kind("history", 100, (19, 7)),
    "decode": check_decode,
}


@interpreted_only  # on a GPU a fault may bring down the process, or stay without effect
@pytest.mark.parametrize("case", CHECKS)
def test_without_a_fault_the_checks_pass(case, tmp_path):
    """Also from copies of the sources, so that it is the fault that fails below."""
    with planted(tmp_path, MODULES):
        CHECKS[case]()


# Part, case that notices it, what it is, the sound text, and the faulty one.
WRONG = [
    (
        "bias",
        "history",
        "the last bucket's clamp",
        "0), tables.buckets - 1)\n    return tl.load(tables.relative",
        "0), tables.buckets - 2)\n    return tl.load(tables.relative",
    ),
    (
        "bias",
        "answered",
        "the first bucket's clamp",
        "tl.maximum(first + tl.arange(0, WINDOW), 0)",
        "tl.maximum(first + tl.arange(0, WINDOW), 1)",
    ),
    (
        "bias",
        "mixed",
        "text has a bias",
        "tl.where(rank_q >= 0, rank_q - q.low, -4 * WINDOW)",
        "rank_q - q.low",
    ),
    (
        "bias",
        "answered",
        "the position's clamp",
        "tl.minimum(rank, positions - 1)",
        "tl.minimum(rank, positions - 2)",
    ),
    (
        "bias",
        "history",
        "far one step too early",
        "(BLOCK_K - 1) >= buckets - 1)",
        "(BLOCK_K - 1) >= buckets - 3)",
    ),
    (
        "forward",
        "answered",
        "a query does not see itself",
        "(first_k + row_K)[None, :] <= (queries.first",
        "(first_k + row_K)[None, :] < (queries.first",
    ),
    (
        "forward",
        "all seen",
        "a key after the last",
        "visible = (first_k + row_K < keys.length)",
        "visible = (first_k + row_K <= keys.length)",
    ),
    (
        "sequences",
        "answered",
        "a block that only some see taken for whole",
        "return seen_by_all // TILE.K * TILE.K, end",
        "return tl.cdiv(seen_by_all, TILE.K) * TILE.K, end",
    ),
    (
        "forward",
        "far",
        "wide tiles left out",
        "            if any_wide:\n",
        "            if any_wide & False:\n",
    ),
    (
        "decode",
        "decode",
        "a split that ends early",
        "tl.minimum(split * part + part, length_k)",
        "tl.minimum(split * part + part - 16, length_k)",
    ),
    (
        "decode",
        "decode",
        "splits weighed alike",
        "tl.sum(parts_SD * weights_S[:, None], axis=0)",
        "tl.sum(parts_SD, axis=0)",
    ),
    (
        "backward_keys",
        "answered",
        "a key not seen by its own query",
        "(keys.first - shift + row_K)[None, :] <= (first_q",
        "(keys.first - shift + row_K)[None, :] < (first_q",
    ),
    (
        "backward_keys",
        "answered",
        "masked queries taken for whole",
        "whole = tl.cdiv(tl.maximum(first_k + TILE.K - 1 - shift, 0), TILE.Q) * TILE.Q",
        "whole = tl.maximum(first_k + TILE.K - 1 - shift, 0) // TILE.Q * TILE.Q",
    ),
    (
        "backward_queries",
        "bfloat16",
        "the rounding of the output stays in delta",
        "tl.store(terms.delta + at, delta_Q + sum_Q, mask=inside)",
        "tl.store(terms.delta + at, delta_Q, mask=inside)",
    ),
    (
        "backward_queries",
        "float16",
        "the rounding of the output stays in the far sums",
        "far_Q -= sum_Q * far_weight_Q",
        "far_Q -= 0.0",
    ),
    (
        "partial_tables",
        "bfloat16",
        "bfloat16 for all of a factor",
        "low = (x - high.to(tl.float32)).to(tl.bfloat16)",
        "low = (0.0 * x).to(tl.bfloat16)",
    ),
    (
        "partial_tables",
        "history",
        "a diagonal on the wrong side",
        "tl.where(key_QK < TILE.K, turned_QK, 0.0)",
        "tl.where(key_QK <= TILE.K, turned_QK, 0.0)",
    ),
    (
        "backward_relative",
        "history",
        "the far sums forgotten",
        "far_Q += tl.load(far.sums + at, mask=inside, other=0.0)",
        "far_Q += 0.0",
    ),
    (
        "backward_absolute",
        "answered",
        "keys of one position not added up",
        "tl.where(same_KK, sums_K[None, :], 0.0)",
        "tl.where(place_K[:, None] == place_K[None, :], sums_K[None, :], 0.0)",
    ),
    (
        "partial_tables",
        "all seen",
        "the padding forgotten",
        "total += tl.where(bucket == 0, tl.sum(before, axis=0), 0.0)",
        "total += 0.0",
    ),
]


@interpreted_only
@pytest.mark.parametrize(
    ("part", "case", "fault", "old", "new"), WRONG, ids=[fault for _, _, fault, *_ in WRONG]
)
def test_a_wrong_kernel_is_noticed(part, case, fault, old, new, tmp_path):
    with planted(tmp_path, MODULES, (f"attention.{part}", old, new)), pytest.raises(AssertionError):
        CHECKS[case]()


# Module, case, sound text, and the same without its barrier: what is stored before is read by other threads behind it.
TABLES, ABSOLUTE, RELATIVE = (
    "attention.partial_tables",
    "attention.backward_absolute",
    "attention.backward_relative",
)
BARRIERS = {
    "cleared row": (
        TABLES,
        "answered",
        "mask=column < width)\n    tl.debug_barrier()\n",
        "mask=column < width)\n",
    ),
    "bucket": (TABLES, "far", "    tl.debug_barrier()  # the next to read it may be another thread\n", ""),
    "diagonals": (TABLES, "answered", "far_K)\n    tl.debug_barrier()\n", "far_K)\n"),
    "positions": (ABSOLUTE, "answered", "mask=mask_K)\n        tl.debug_barrier()\n", "mask=mask_K)\n"),
}


@interpreted_only
@pytest.mark.parametrize("case", ["answered", "far"])
def test_no_barrier_is_missing(case, tmp_path):
    with missing_barriers_fail(), planted(tmp_path, MODULES):
        CHECKS[case]()


@interpreted_only
@pytest.mark.parametrize("place", BARRIERS)
def test_a_missing_barrier_is_noticed(place, tmp_path):
    module, case, old, new = BARRIERS[place]
    with (
        missing_barriers_fail(),
        planted(tmp_path, MODULES, (module, old, new)),
        # So that a program has several blocks of keys.
        mock.patch.object(sys.modules[launcher.__name__], "PROGRAMS_PER_PROCESSOR", 1),
        pytest.raises(InterpreterError, match="a barrier is missing"),
    ):
        CHECKS[case]()


ATOMICS = {
    "relative": (
        (
            RELATIVE,
            "    row = partials + tl.program_id(0).to(tl.int64) * width\n    clear_row(row, width)\n",
            "    row = partials + head.to(tl.int64) * width\n",
        ),
        (TABLES, "    tl.store(near, tl.load(near) + near_K)\n", "    tl.atomic_add(near, near_K)\n"),
        (
            TABLES,
            "    tl.store(near + TILE.K, tl.load(near + TILE.K) + far_K)\n",
            "    tl.atomic_add(near + TILE.K, far_K)\n",
        ),
        (
            TABLES,
            "    tl.store(row + bucket, tl.load(row + bucket) + value)\n",
            "    tl.atomic_add(row + bucket, value)\n",
        ),
    ),
    "absolute": (
        (
            ABSOLUTE,
            "    row = partials + tl.program_id(0).to(tl.int64) * positions\n    clear_row(row, positions)\n",
            "    row = partials + head.to(tl.int64) * positions\n",
        ),
        (
            ABSOLUTE,
            "tl.store(row + position_K, tl.load(row + position_K, mask=mask_K, other=0.0) + total_K, mask",
            "tl.atomic_add(row + position_K, total_K, mask",
        ),
    ),
}


@interpreted_only
@pytest.mark.slow
@pytest.mark.parametrize("table", ATOMICS)
def test_an_atomic_sum_is_noticed(table, tmp_path):
    """Its result is right, within rounding, and differs with the order in which programs run.

    Two orders may round alike by chance, which depends on the processor: so more are tried until one differs.
    """
    right = next(runs_in_any_order(1))
    zeros = mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    with planted(tmp_path, MODULES, *ATOMICS[table]), zeros:
        runs = runs_in_any_order(16)
        first = next(runs)
        for run in runs:
            for a, b in zip(run, right, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            if not all(torch.equal(a, b) for a, b in zip(run, first, strict=True)):
                return
    pytest.fail("16 orders of programs gave the same sums")
