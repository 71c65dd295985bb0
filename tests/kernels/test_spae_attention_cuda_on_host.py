"""spae_attention's CUDA kernels, run on the host block by block, against float64 and PyTorch in the same dtype."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import naive
from tests.kernels.host_device import (
    SHARED_H100,
    SHARED_LEAST,
    HostDevice,
    HostDeviceError,
    Launch,
    compile_program,
    plant,
)
from tests.kernels.test_spae_attention import NAMES, leaves, make, run_naive
from tests.kernels.test_spae_attention_cpu import GRADS, KINDS, set_ranks

pytestmark = pytest.mark.slow

# Which head sizes are compiled for which element type: every size of bfloat16, and one of float16.
BUILDS = {torch.bfloat16: ("BFloat16", (32, 64, 96, 128, 256)), torch.float16: ("Half", (64,))}
ALL = (True,) * 5


def build(folder: Path, dtype: torch.dtype, sizes: tuple[int, ...], **options) -> HostDevice:
    folder.mkdir(parents=True)
    flags = (f"-DSPEEDER_TYPE={BUILDS[dtype][0]}", f"-DSPEEDER_SIZES={','.join(map(str, sizes))}")
    extra = (*flags, *options.pop("extra", ()))
    return HostDevice(compile_program("spae_attention", folder, **options, extra=extra))


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spae")
    with ThreadPoolExecutor() as pool:
        built = pool.map(lambda dtype: build(folder / str(dtype), dtype, BUILDS[dtype][1]), BUILDS)
        running = dict(zip(BUILDS, built, strict=True))
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


def forward(device: HostDevice, args: dict, causal: bool, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """`options`: of HostDevice.call."""
    out = torch.full(args["q"].shape, float("nan"), dtype=args["q"].dtype)
    lse = torch.full(out.shape[:2], float("nan"))
    device.call("forward", *common(args, causal), out, lse, **options)
    return out, lse


def backward(
    device: HostDevice, args: dict, causal: bool, needs=ALL, grad=None, **options
) -> tuple[list[torch.Tensor | None], list[Launch]]:
    """The gradients that are needed, and what was launched for them; `grad` is the output's."""
    out, lse = forward(device, args, causal, **options)
    grads = [
        torch.full(args[name].shape, float("nan"), dtype=args[name].dtype)
        if need and args[name] is not None
        else None
        for name, need in zip(GRADS, needs, strict=True)
    ]
    grad = view(upstream(args) if grad is None else grad)
    return grads, device.call("backward", *common(args, causal), *grad, out, lse, *grads, **options)


def upstream(args: dict) -> torch.Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(args["q"].shape, generator=draw).to(torch.bfloat16).to(args["q"].dtype)


def check(device: HostDevice, args: dict, causal: bool = True, needs=ALL, **options) -> None:
    """Output and every gradient that is needed: our error is at most twice PyTorch's."""
    grad = upstream(args)
    out, _ = forward(device, args, causal, **options)
    grads, _ = backward(device, args, causal, needs, **options)
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
    ours = {name: g for name, g in zip(GRADS, grads, strict=True) if args[name] is not None}
    for (name, a), b, c in zip(ours.items(), grads_exact, grads_torch, strict=True):
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
cases = [
    (dtype, size) for dtype in BUILDS for size in (32, 40, 64, 96, 128, 256) if size <= BUILDS[dtype][1][-1]
]


@settings(max_examples=60, deadline=None)
@given(
    lengths=lengths,
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3), (5, 1)]),
    case=st.sampled_from(cases),
    buckets=st.tuples(st.sampled_from([None, 1, 5, 200]), st.sampled_from([None, 1, 4, 60])),
    kind=st.sampled_from(KINDS),
    causal=st.booleans(),
    layout=st.sampled_from([None, 0, 1]),
    shared_most=st.sampled_from([SHARED_LEAST, SHARED_H100]),
    seed=st.integers(0, 10_000),
)
def test_matches_float64(devices, lengths, heads, case, buckets, kind, causal, layout, shared_most, seed):
    dtype, size = case
    lengths_q, lengths_k = zip(*lengths, strict=True)
    args = set_ranks(make(lengths_q, lengths_k, *heads, size, buckets, dtype, seed), kind, seed)
    args = args if layout is None else strided(args, layout)
    check(devices[dtype], args, causal, seed=seed, shared_most=shared_most)


@pytest.mark.parametrize("dtype", BUILDS, ids=str)
@pytest.mark.parametrize("kind", ["late", "history", "mixed"])
def test_sequences_of_several_tiles(devices, dtype, kind):
    """Tiles that are Toeplitz from end to end, with both tables ending within, and tiles without a mask."""
    args = set_ranks(make([150, 66], [190, 66], 2, 1, 64, (70, 90), dtype), kind)
    check(devices[dtype], args)


@pytest.mark.parametrize("dtype", BUILDS, ids=str)
def test_tiles_within_an_outer_bucket(devices, dtype):
    """From end to end, beyond the table's first entry and its last."""
    args = set_ranks(make([200], [200], 1, 1, 64, (20, 30), dtype), "late")
    check(devices[dtype], args, causal=False)


@pytest.mark.parametrize("size", [128, 256])
def test_several_tiles_where_blocks_have_less_shared_memory(devices, size):
    """Forward, decoding and backward by the smaller shapes: the larger would be refused there."""
    device = devices[torch.bfloat16]
    for lengths in ([70, 130], [110, 130]), ([1, 2], [300, 40]):
        args = set_ranks(make(*lengths, 2, 1, size, (70, 90), torch.bfloat16), "late")
        check(device, args, shared_most=SHARED_LEAST)
        _, launches = backward(device, args, True, shared_most=163 * 1024)
        assert not any("SpaeSmall" in launch.kernel for launch in launches)


@pytest.mark.parametrize("size", [32, 128, 250])
def test_one_query_against_a_long_cache(devices, size):
    """The keys are shared among blocks and warps, some of which get none."""
    args = set_ranks(
        make([1, 2, 0, 1, 1], [700, 257, 5, 0, 1], 4, 2, size, (300, 200), torch.bfloat16), "history"
    )
    check(devices[torch.bfloat16], args)
    launches = devices[torch.bfloat16].call(
        "forward", *common(args, True), torch.empty_like(args["q"]), torch.empty(5, 4), dry=True
    )
    assert [launch.kernel.split("<")[0].split("::")[-1] for launch in launches] == [
        "SpaeDecode",
        "SpaeCombine",
    ]
    assert launches[0].grid == (5 * 2 * 3, 1, 1)


def test_no_sequence(devices):
    """Then there is nothing to share, and every token lies behind the last sequence."""
    args = make([1], [1], 2, 1, 32, (5, 5), torch.bfloat16)
    args |= {name: torch.zeros(1, dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    result, lse = torch.empty_like(args["q"]), torch.empty(1, 2)
    launches = devices[torch.bfloat16].call("forward", *common(args, True), result, lse, dry=True)
    assert [launch.grid[0] for launch in launches] == [0, 1]
    for longest in (1, 20):  # decoded, and not
        told = {**args, "max_seqlen_q": longest, "max_seqlen_k": longest - 1}
        result, lse = forward(devices[torch.bfloat16], told, True)
        assert result.eq(0).all() and lse.eq(math.inf).all()
        grads, _ = backward(devices[torch.bfloat16], told, True)
        assert all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 32), (torch.bfloat16, 256), (torch.float16, 64)], ids=str
)
@pytest.mark.parametrize(("queries", "tail_q", "tail_k"), [(20, 20, 0), (20, 3, 3), (20, 0, 20), (2, 20, 70)])
def test_tokens_behind_the_last_sequence(devices, dtype, size, queries, tail_q, tail_k):
    """A batch padded to a fixed size: sequences as they are without, and zeros behind them, whatever stands there."""
    args = set_ranks(make([queries, 1], [21, 4], 2, 1, size, (9, 5), dtype), "history")
    padded = dict(args)
    for names, tail in ((("q", "rank_q"), tail_q), (("k", "v", "rank_k"), tail_k)):
        for name in names:
            fill = 3 if name.startswith("rank") else math.nan
            rows = args[name].new_full((tail, *args[name].shape[1:]), fill)
            padded[name] = torch.cat((args[name], rows))
    grad = upstream(args)
    results = []
    for case in (args, padded):
        behind = grad.new_full((len(case["q"]) - len(grad), *grad.shape[1:]), math.nan)
        out, lse = forward(devices[dtype], case, True)
        grads, _ = backward(devices[dtype], case, True, grad=torch.cat((grad, behind)))
        results.append([lse, out, *grads])
    for name, a, b in zip(("lse", "out", *GRADS), *results, strict=True):
        assert torch.equal(b[: len(a)], a), name
        assert b[len(a) :].eq(math.inf if name == "lse" else 0).all(), name


@pytest.mark.parametrize("longest", [0, 1, 17])
def test_longer_sequences_than_were_told(devices, longest):
    """On a GPU nobody reads the lengths: then results are wrong, but nothing is written where it may not be."""
    args = make([5, 40], [300, 300], 3, 1, 32, (20, 30), torch.bfloat16)
    told = {**args, "max_seqlen_q": longest, "max_seqlen_k": longest}
    backward(devices[torch.bfloat16], told, True)
    out, _ = forward(devices[torch.bfloat16], told, True)
    exact = torch_exact(args, True)
    for first in (0, 5):
        torch.testing.assert_close(
            out[first : first + longest].double()[:5],
            exact[first : first + longest].double()[:5],
            atol=0.05,
            rtol=0.05,
        )


def test_several_tiles_share_a_table_where_all_would_be_too_large(devices):
    args = set_ranks(make([1] * 250, [2] * 250, 1, 1, 32, (70_000, None), torch.bfloat16), "far")
    device = devices[torch.bfloat16]
    grads, launches = backward(device, args, True)
    assert [launch.grid[0] for launch in launches if "SpaeGradQ" in launch.kernel] == [239]
    small = {**args, "relative_bias": args["relative_bias"][:, [0, -1]].contiguous()}
    few, launches = backward(device, small, True)
    assert [launch.grid[0] for launch in launches if "SpaeGradQ" in launch.kernel] == [250]
    assert set(grads[3].nonzero()[:, 1].tolist()) <= {0, 69_999}
    torch.testing.assert_close(grads[3][:, [0, -1]], few[3])


@pytest.mark.parametrize("wanted", [(), ("q",), ("k",), ("v",), ("relative_bias",), ("v", "absolute_bias")])
@pytest.mark.parametrize("size", [64, 256])
def test_only_what_is_asked_for(devices, wanted, size):
    """Gradients that nobody needs change nothing in the others, and no kernel runs for them. But delta is found by
    SpaeGradQ where a table takes a gradient, and taken from the rounded output where none does."""
    args, tables = (
        make([30, 5], [30, 9], 2, 1, size, dtype=torch.bfloat16),
        {"relative_bias", "absolute_bias"},
    )
    any_table = bool(tables & set(wanted))
    everything, _ = backward(devices[torch.bfloat16], args, True, [*ALL[:3], any_table, any_table])
    some, launches = backward(devices[torch.bfloat16], args, True, [name in wanted for name in GRADS])
    for name, whole, part in zip(GRADS, everything, some, strict=True):
        assert torch.equal(part, whole) if name in wanted else part is None
    kernels = " ".join(launch.kernel for launch in launches)
    assert ("SpaeGradQ" in kernels) == bool({"q", *tables} & set(wanted))
    assert ("SpaeGradKV" in kernels) == bool({"k", "v", "absolute_bias"} & set(wanted))
    assert ("SumParts" in kernels) == any_table


# Tiles that see no key, several of them a block, since the tables of all would be too large together.
BLIND = ([70, *[1] * 129], [3] * 130, 1, 1, 32, (70_000, None), torch.bfloat16)
ONLY_RELATIVE = [name == "relative_bias" for name in GRADS]


def test_tiles_that_see_no_key_and_ask_for_the_relative_table_alone(devices):
    args = set_ranks(make(*BLIND), "late")
    grads, launches = backward(devices[torch.bfloat16], args, True, ONLY_RELATIVE)
    assert [launch.grid[0] for launch in launches if "SpaeGradQ" in launch.kernel] == [239]
    whole, _ = backward(devices[torch.bfloat16], args, True)
    assert torch.equal(grads[3], whole[3]) and grads[3].any()


def test_frozen_tables(devices):
    """Then delta is taken from the rounded output, which is accurate enough for the other gradients."""
    args = set_ranks(make([40, 17], [65, 17], 4, 2, 64, (20, 30), torch.bfloat16), "mixed")
    check(devices[torch.bfloat16], args, needs=(True, True, True, False, False))


def runs(device: HostDevice, args: dict) -> list[list[torch.Tensor]]:
    """Output and gradients with threads and blocks in four orders."""
    return [
        [*forward(device, args, True, seed=seed), *backward(device, args, True, seed=seed)[0]]
        for seed in range(4)
    ]


def same_bits(results: list[list[torch.Tensor]]) -> bool:
    return all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("kind", ["late", "mixed", "random"])
@pytest.mark.parametrize("lengths", [([40, 9], [70, 9]), ([2, 1], [300, 9])])
def test_the_order_of_threads_changes_no_bit(devices, lengths, kind):
    args = set_ranks(make(*lengths, 4, 2, 32, (20, 30), torch.bfloat16), kind)
    assert same_bits(runs(devices[torch.bfloat16], args))


# (file, sound text, faulty text), and what the host says of it: None where only the numbers tell.
FAULTS = {
    "missing_barrier": (
        (
            "forward.cuh",
            "wait_copies<0>();\n      sync_block();\n      bias",
            "wait_copies<0>();\n      bias",
        ),
        "race|not waited for|still being copied|never-written",
    ),
    "missing_barrier_before_the_diagonals": (
        ("relative_sums.cuh", "sync_block();\n      add_diagonals", "add_diagonals"),
        "race|never-written",
    ),
    "missing_sync_of_a_warp": (
        (
            "decode.cuh",
            "      sync_warp();  // the warp's next tile is there, and this one is done with\n",
            "",
        ),
        "race|not waited for|still being copied",
    ),
    "one_row_too_many": (
        ("tile.cuh", "first + r < count && column < size", "first + r <= count && column < size"),
        "heap-buffer-overflow",
    ),
    "one_key_too_few": (("forward.cuh", "i + 1 + keys - queries", "i + keys - queries"), None),
    "bucket_past_the_end": (
        (
            "bias.cuh",
            "clamp(distance, 0, args_.buckets - 1)",
            "clamp(distance, 0, args_.buckets)",
        ),
        "heap-buffer-overflow",
    ),
    "bucket_clamped_at_one": (
        ("bias.cuh", "clamp(distance, 0, args_.buckets - 1)", "clamp(distance, 1, args_.buckets - 1)"),
        None,
    ),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Programs with a fault each, compiled side by side."""
    folder = tmp_path_factory.mktemp("faults")
    atomic = (
        "relative_sums.cuh",
        "const float below = warp_sum(below_), above = warp_sum(above_);",
        "sync_block();\natomic_add(table_, below_);\natomic_add(table_ + last_, above_);\n"
        "const float below = 0.0f, above = 0.0f;",
    )
    wait = "    wait_copies<0>();  // where no key is seen, queries and gradients are still on their way\n"
    leave = "    if (call.grad_q == nullptr) return;\n"
    unfinished = ("grad_q.cuh", wait + leave, leave + wait)
    edits = {name: edit for name, (edit, _) in FAULTS.items()} | {"atomic": atomic, "unfinished": unfinished}

    def compile_fault(name):
        file, sound, wrong = edits[name]
        csrc = plant(folder / name, (f"cuda/attention/{file}", sound, wrong))
        program = folder / name / "program"
        # Without optimization: these run little, and compile twice as fast.
        return name, build(program, torch.bfloat16, (32,), csrc=csrc, extra=("-O0",))

    with ThreadPoolExecutor() as pool:
        running = dict(pool.map(compile_fault, edits))
    yield running
    for device in running.values():
        device.__exit__()


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(devices, faulty, fault):
    """The sound kernels pass the very same checks."""
    args = set_ranks(make([70, 17], [70, 40], 2, 1, 32, (20, 30), torch.bfloat16), "late")
    few = make([2], [300], 2, 1, 32, (20, 30), torch.bfloat16)
    message = FAULTS[fault][1]
    for x in (args, few):
        check(devices[torch.bfloat16], x)
    with pytest.raises(HostDeviceError if message else AssertionError, match=message or "error .* allowed"):
        for x in (args, few):
            check(faulty[fault], x)


@pytest.mark.parametrize("lengths", [(BLIND[0], BLIND[1]), ([70], [3])], ids=["several", "one"])
def test_copies_on_their_way_are_caught(faulty, lengths):
    """Where the next tile of the block begins, or the block ends, before they have come."""
    args = set_ranks(make(*lengths, *BLIND[2:]), "late")
    with pytest.raises(HostDeviceError, match=r"still being copied to|ended before its asynchronous copies"):
        backward(faulty["unfinished"], args, True, ONLY_RELATIVE)


@pytest.mark.parametrize("shared", [False, True], ids=["sound", "shared"])
def test_blocks_that_share_a_table_are_caught(tmp_path, shared):
    """In one run with every access to global memory watched, in which the kernels as they are show no race."""
    edit = ("cuda/attention/grad_q.cuh", "tables + (int64_t{share} * heads + head)", "tables + int64_t{head}")
    csrc = plant(tmp_path, *[edit][:shared])
    with build(tmp_path / "program", torch.bfloat16, (32,), csrc=csrc, extra=("-O0",), watch=True) as device:
        for lengths in ([70, 17], [70, 40]), ([2, 1], [300, 9]):
            args = set_ranks(make(*lengths, 2, 1, 32, (20, 30), torch.bfloat16), "mixed")
            if not shared:
                backward(device, args, True)
                continue
            with pytest.raises(HostDeviceError, match=r"race in global memory: .* what another block writes"):
                backward(device, args, True)


def test_an_atomic_sum_is_caught(devices, faulty):
    """It is right, but not the same with every order of the threads."""
    args = set_ranks(make([70, 17], [70, 40], 2, 1, 32, (5, 30), torch.bfloat16), "late")
    check(faulty["atomic"], args)
    assert same_bits(runs(devices[torch.bfloat16], args))
    assert not same_bits(runs(faulty["atomic"], args))
