"""pack_tokens, compress_items, item_cross_entropy and topk_items in Triton: the CPU backends' sweeps, with tiles so
small that tiny shapes fill and overflow them; in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import speeder_kernels as sk
from speeder_kernels.triton import tiles
from speeder_kernels.triton.items.score_tile import pad_columns
from tests.kernels import naive
from tests.kernels import test_compress_items as compress
from tests.kernels import test_item_cross_entropy as cross_entropy
from tests.kernels import test_pack_tokens as pack
from tests.kernels import test_topk_items as topk
from tests.kernels.places import at
from tests.kernels.triton_tools import (
    DEVICE,
    DTYPES,
    exact_bfloat16,
    interpreted_only,
    programs_in_any_order,
    small_tiles,
)

dtypes, seeds = st.sampled_from(DTYPES), st.integers(0, 10_000)
processors = st.sampled_from([1, 2, 5])


@pytest.fixture(autouse=True, scope="module")
def _exact_bfloat16() -> Iterator[None]:
    with exact_bfloat16():
        yield


def triton(op):
    return at(op, "triton", DEVICE)


def test_warps_and_stages_are_never_left_to_a_default():
    """Triton's own is three stages, which take shared memory."""
    options = {}
    kernel = {(1,): lambda *arguments, **given: options.update(given)}
    tiles.launch(kernel, (1,), torch.zeros(1), fuse=True, num_warps=4)
    assert options == {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    tiles.launch(kernel, (1,), torch.zeros(1), fuse=True, num_warps=8, num_stages=3)
    assert (options["num_warps"], options["num_stages"]) == (8, 3)
    with pytest.raises(TypeError, match="num_warps"):
        tiles.launch(kernel, (1,), torch.zeros(1), fuse=True)


def test_a_catalogue_is_copied_only_where_its_width_asks_for_it():
    table = torch.randn(5, 32)
    assert pad_columns(table).data_ptr() == table.data_ptr()
    padded = pad_columns(table[:, :17])
    assert torch.equal(padded[:, :17], table[:, :17]) and padded.shape == (5, 32)
    assert padded[:, 17:].eq(0).all()


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), 80), ((8, 6), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 80)],
)
def test_a_gpu_takes_the_newest_row_that_fits(capability, arch, monkeypatch):
    """sm_120 is newer than sm_100 and has less shared memory than sm_80."""
    monkeypatch.setattr(tiles, "_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    device = torch.device("cuda", 0)
    assert tiles.architecture(device) == arch
    monkeypatch.setitem(tiles.TILES, ("test",), {80: {"block": 1}, 90: {"block": 2}})
    assert tiles.tile(device, "test") == {"block": 1 if arch == 80 else 2}


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 40),
    sizes=st.tuples(st.integers(1, 9), st.integers(0, 6), st.integers(0, 5)),
    hidden=st.sampled_from([1, 3, 16, 63, 64, 65, 130]),
    dtype=dtypes,
    seed=seeds,
)
def test_pack_tokens_matches_the_loop(tokens, sizes, hidden, dtype, seed):
    with small_tiles():
        args = pack.make(tokens, *sizes, hidden, dtype, seed)
        pack.check_against_the_loop(triton(sk.pack_tokens), args)


@settings(max_examples=15, deadline=None)
@given(
    items=st.integers(1, 12),
    modalities=st.sampled_from([1, 2, 3, 9]),
    hidden=st.sampled_from([1, 2, 16, 33, 100]),
    dtype=dtypes,
    float32_gates=st.booleans(),
    processors=processors,
    seed=seeds,
)
def test_compress_items_matches_the_loop(items, modalities, hidden, dtype, float32_gates, processors, seed):
    with small_tiles(processors):
        gate_dtype = torch.float32 if float32_gates else None
        args = compress.make(items, modalities, hidden, dtype, gate_dtype, seed)
        compress.check_against_the_loop(triton(sk.compress_items), args)


@interpreted_only
def test_a_text_table_of_more_than_two_to_the_31_elements(tmp_path):
    """A file with holes: only the rows that are written take memory."""
    rows, width = 70_000, 32_768
    text = torch.from_file(str(tmp_path / "text"), shared=True, size=rows * width).view(rows, width)
    text[-1] = torch.randn(width)
    ids, no_item = torch.tensor([rows - 1, 0, rows - 1]), torch.full((3,), -1)
    out = sk.pack_tokens(
        ids, text, torch.zeros(1, width), no_item, no_item, torch.zeros(1, width), backend="triton"
    )
    assert torch.equal(out, text[ids])


def test_absent_modalities_are_never_read():
    compress.test_absent_modalities_are_never_read("triton", DEVICE)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.sampled_from([1, 4, 16, 17, 40]),
    items=st.sampled_from([1, 5, 16, 33, 70, 100]),
    hidden=st.sampled_from([1, 5, 32, 40]),
    scale=st.sampled_from([0.2, 1.0, 20.0]),
    corrected=st.booleans(),
    dtype=dtypes,
    processors=processors,
    seed=seeds,
)
def test_item_cross_entropy_matches_full_logits(
    rows, items, hidden, scale, corrected, dtype, processors, seed
):
    with small_tiles(processors):
        run, scale = triton(sk.item_cross_entropy), scale / hidden**0.5
        exactly = cross_entropy.full_logits
        cross_entropy.check(exactly, run, rows, items, hidden, scale, corrected, dtype, seed)


def test_large_logits_stay_finite():
    h, table, targets, _ = cross_entropy.make()
    inputs = cross_entropy.leaves(h * 100, table * 100)
    loss = triton(sk.item_cross_entropy)(*inputs, targets, scale=50.0)
    assert all(torch.isfinite(x).all() for x in (loss, *torch.autograd.grad(loss.sum(), inputs)))


@settings(max_examples=20, deadline=None)
@given(case=topk.cases(DTYPES))
def test_topk_of_few_items(case):
    with small_tiles(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPEEDER_CHECK", "1")
        topk.check_against_sorting(triton(sk.topk_items), *case)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.sampled_from([1, 3, 16, 20]),
    items=st.sampled_from([31, 32, 33, 100, 250]),
    hidden=st.sampled_from([1, 5, 20]),
    k=st.sampled_from([1, 2, 10, 200]),
    ties=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
def test_topk_of_groups_and_chunks(rows, items, hidden, k, ties, dtype, seed):
    """Fewer groups than k and more, rising scores or many ties, exclusions with duplicates."""
    draw = torch.Generator().manual_seed(seed)
    h = torch.randint(-3, 4, (rows, hidden), generator=draw).to(dtype)
    table = torch.randint(-3, 4, (items, hidden), generator=draw).to(dtype)
    if not ties:
        h, table = h.abs() + 1, torch.arange(items).to(dtype)[:, None].expand(-1, hidden).contiguous()
    excluded = [torch.randint(0, items, (6,), generator=draw).tolist() if n % 2 else [] for n in range(rows)]
    k = max(1, min(k, items - 6))
    with small_tiles():
        topk.check_against_sorting(triton(sk.topk_items), h, table, excluded, k)


def test_topk_of_any_size():
    """More than a thousand, in tiles as they are."""
    draw = torch.Generator().manual_seed(0)
    h, table = torch.randn(3, 40, generator=draw), torch.randn(5000, 40, generator=draw)
    scores, items = triton(sk.topk_items)(h, table, 1500)
    exact = h.double() @ table.double().T
    assert torch.equal(items, exact.topk(1500).indices)
    torch.testing.assert_close(scores.double(), exact.gather(1, items), atol=2e-5, rtol=1e-6)


def test_topk_order_of_every_float():
    values = [0.0, -0.0, 1e-40, -1e-40, float("inf"), float("-inf"), 3.0, -3.0]
    table = torch.tensor(values)[:, None]
    scores, items = triton(sk.topk_items)(torch.ones(1, 1), table, 8)
    assert items.tolist() == [[4, 6, 2, 0, 1, 3, 7, 5]]
    assert torch.equal(scores[0], table[items[0], 0])


def test_topk_finds_a_nan(monkeypatch):
    """Whatever its sign: a processor's own NaN may be negative, and would sort below everything."""
    monkeypatch.setenv("SPEEDER_CHECK", "1")
    for sign in (1.0, -1.0):
        table = torch.randn(300, 8)
        table[217] = torch.copysign(torch.tensor(float("nan")), torch.tensor(sign))
        with pytest.raises(ValueError, match="got NaN in row 0"):
            triton(sk.topk_items)(torch.ones(1, 8), table, 3)


# --- numbers out of range: on a GPU nobody reads them, and nothing is read where they point -------------------------


@pytest.fixture
def unchecked(monkeypatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr("speeder_kernels.validate.reads_values", lambda *_: False)


FAR = 1 << 40  # so far behind any tensor that reading there fails


@pytest.mark.parametrize("corrected", [True, False])
def test_targets_that_are_no_item(corrected, unchecked):
    """Their loss is NaN. Where it is left out, the gradients are those of the other rows alone."""
    h, table, targets, log_q = cross_entropy.make(6, 40, 20)
    log_q = log_q if corrected else None
    wrong = targets.clone()
    wrong[[0, 2, 3, 5]] = torch.tensor([-100, 40, FAR, -FAR])
    results = []
    for rows, chosen in (([1, 4], targets[[1, 4]]), (slice(None), wrong)):
        inputs = cross_entropy.leaves(h, table)
        with small_tiles():
            loss = triton(sk.item_cross_entropy)(inputs[0][rows], inputs[1], chosen, scale=0.3, log_q=log_q)
            used = loss[~loss.isnan()]
            results.append((used, *torch.autograd.grad(used.sum(), inputs)))
    assert loss.isnan().tolist() == [True, False, True, True, False, True]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_indices_outside_the_tables(unchecked):
    """The token's row is NaN, the others are as without it; gradients go to no row."""
    args = pack.make(12, vocabulary=7, items=4, prompts=5, hidden=20)
    items = torch.arange(12) % 2 == 1
    args["item_rows"], args["input_ids"] = torch.where(items, 1, -1), torch.full((12,), 3)
    args["ranks"] = torch.where(items, 2, FAR)
    wrong = dict(args)
    for name, place, value in (
        ("input_ids", 0, 7), ("input_ids", 2, FAR), ("input_ids", 4, -1), ("item_rows", 1, 4), ("item_rows", 3, FAR),
        ("ranks", 5, 5), ("ranks", 7, FAR),
    ):  # fmt: skip
        wrong[name] = wrong[name].clone()
        wrong[name][place] = value
    bad = torch.arange(12) < 8
    bad[6] = False
    outs, grads = [], []
    for case in (args, wrong):
        copy, inputs = pack.leaves(case)
        with small_tiles():
            outs.append(triton(sk.pack_tokens)(**copy))
            grads.append(torch.autograd.grad(outs[-1][~bad].sum(), inputs))
    assert torch.equal(outs[1].isnan(), bad[:, None].expand(12, 20))
    assert torch.equal(outs[1][~bad], outs[0][~bad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_exclusions_that_are_no_item(unchecked):
    """They exclude nothing, in their row and in the others; nor do those behind the end of the lists."""
    h, table = torch.ones(3, 4), torch.arange(40.0)[:, None].expand(-1, 4).contiguous()
    lists = {
        "exclude_indptr": torch.tensor([0, 4, 5, FAR]),
        "exclude_items": torch.tensor([39, 40, FAR, -1, 38, 37]),
    }
    with small_tiles():
        _, best = triton(sk.topk_items)(h, table, 2, **lists)
    assert best.tolist() == [[38, 37], [39, 37], [39, 38]]


def gradients_of(op: str, seed: int) -> list[torch.Tensor]:
    """All gradients of a batch with several programs for every sum."""
    with small_tiles(processors=5):
        if op == "pack_tokens":
            args, inputs = pack.leaves(pack.make(60, seed=seed))
            return naive.gradients(triton(sk.pack_tokens)(**args), inputs)
        if op == "compress_items":
            args, inputs = compress.leaves(compress.make(40, 2, 20, seed=seed))
            return naive.gradients(triton(sk.compress_items)(*args), inputs)
        h, table, targets, _ = cross_entropy.make(30, 70, 20, seed=seed)
        inputs = cross_entropy.leaves(h, table)
        return naive.gradients(triton(sk.item_cross_entropy)(*inputs, targets, scale=0.3), inputs)


OPS_WITH_GRADIENTS = ("pack_tokens", "compress_items", "item_cross_entropy")


@interpreted_only
@pytest.mark.parametrize("op", OPS_WITH_GRADIENTS)
def test_gradients_are_bit_identical_whatever_the_order_of_programs(op):
    first = gradients_of(op, seed=0)
    for order in range(3):
        with programs_in_any_order(order):
            again = gradients_of(op, seed=0)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter always runs in one order")
@pytest.mark.parametrize("op", OPS_WITH_GRADIENTS)
def test_gradients_are_bit_identical_on_a_gpu(op):
    torch.use_deterministic_algorithms(False)  # it must hold without torch's help
    first, *others = [gradients_of(op, seed=0) for _ in range(20)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other, first, strict=True))


@pytest.mark.parametrize("op", OPS_WITH_GRADIENTS)
def test_only_wanted_gradients(op):
    """A gradient nobody needs comes back empty, and the others do not change."""
    if op == "pack_tokens":
        args = pack.make()
        indices = [args[name] for name in ("input_ids", "item_rows", "ranks")]
        arguments = [torch.randn(12, 6), *indices, [7, 4, 5]]
    elif op == "compress_items":
        arguments = [torch.randn(5, 6), torch.randn(5, 3), *compress.make(), 1e-6]
    else:
        h, table, targets, log_q = cross_entropy.make()
        arguments = [torch.randn(4), h, table, targets, torch.randn(4) + 5, 0.5, log_q]
    arguments = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]
    backward, count = getattr(torch.ops.speeder, f"{op}_backward"), 2 if op == "item_cross_entropy" else 3
    everything = backward(*arguments, [True] * count, "triton")
    for wanted in range(2**count):
        needs = [bool(wanted >> n & 1) for n in range(count)]
        for need, whole, part in zip(needs, everything, backward(*arguments, needs, "triton"), strict=True):
            assert torch.equal(part, whole) if need else part.shape == (0, *whole.shape[1:])


def test_opcheck():
    """Fake kernels and autograd of all four ops, on this backend."""

    def check(op, *args):
        args = [x.detach().to(DEVICE) if isinstance(x, torch.Tensor) else x for x in args]
        args = [
            x.requires_grad_(op != "topk_items")
            if isinstance(x, torch.Tensor) and x.is_floating_point()
            else x
            for x in args
        ]
        torch.library.opcheck(getattr(torch.ops.speeder, op).default, (*args, "triton"))

    check("pack_tokens", *pack.make().values())
    check("compress_items", *compress.make(), 1e-6)
    h, table, targets, _ = cross_entropy.make()
    check("item_cross_entropy", h, table, targets, 0.5, None)
    check("topk_items", h, table, 2, None, None)


@pytest.mark.parametrize("op", ["item_cross_entropy", "topk_items"])
def test_no_matrix_of_all_scores_is_held(op, monkeypatch):
    """Neither pass allocates as much as an (N, I) matrix, beyond a scratch memory of bounded size."""
    module = importlib.import_module(f"speeder_kernels.triton.items.{op}")
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    monkeypatch.setattr(module, "CHUNK_ITEMS", 128)
    rows, items = 100, 1200
    h, table, targets, _ = (x.to(DEVICE) for x in cross_entropy.make(rows, items, hidden=8))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                largest = max(largest, x.nbytes if isinstance(x, torch.Tensor) else 0)
            return out

    with Watch():
        if op == "topk_items":
            module.topk_items(h, table, 10, None, None)
        else:
            _, lse = module.item_cross_entropy(h, table, targets, 1.0, None)
            module.item_cross_entropy_backward(lse, h, table, targets, lse, 1.0, None, 3)
    assert rows * 128 * 4 <= largest < rows * items * 4 / 4
