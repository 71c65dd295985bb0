"""topk_items against sorting every row, with ties, exclusions and chunks smaller than the catalogue."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder_kernels import reference, topk_items
from tests.kernels import naive
from tests.kernels.places import at, places


def csr(excluded: list[list[int]]) -> dict:
    indptr = torch.tensor([0, *(len(row) for row in excluded)]).cumsum(0)
    flat = [item for row in excluded for item in row]
    return {"exclude_indptr": indptr, "exclude_items": torch.tensor(flat, dtype=torch.int64)}


@st.composite
def cases(draw, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    """Small whole numbers, so that scores are exact in every dtype and ties are common."""
    rows, items, hidden = draw(st.integers(1, 10)), draw(st.integers(1, 20)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    dtype = draw(st.sampled_from(dtypes))
    h = torch.randint(-3, 4, (rows, hidden), generator=generator).to(dtype)
    table = torch.randint(-3, 4, (items, hidden), generator=generator).to(dtype)
    excluded = [draw(st.lists(st.integers(0, items - 1), max_size=items)) for _ in range(rows)]
    allowed = min(items - len(set(row)) for row in excluded)
    return h, table, excluded, draw(st.integers(1, max(1, allowed))) if allowed else 0


@pytest.mark.parametrize(
    ("backend", "device", "items_per_chunk"),
    [("reference", "cpu", 1), ("reference", "cpu", 4), *((*p, 8192) for p in places("topk_items"))],
)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_matches_sorting(backend, device, items_per_chunk, case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "ITEMS_PER_CHUNK", items_per_chunk)
        if device == "cuda":
            patch.setenv("SPEEDER_CHECK", "1")
        check_against_sorting(at(topk_items, backend, device), *case)


def check_against_sorting(run, h, table, excluded, k):
    """`run` is topk_items, by whatever means; k is 0 where some row may be given nothing."""
    if k == 0:
        with pytest.raises(ValueError, match="k: expected at most 0, the items that row"):
            run(h, table, 1, **csr(excluded))
        return
    scores, items = run(h, table, k, **csr(excluded))
    exact = h.double() @ table.double().T
    assert items.tolist() == naive.topk_items(exact, k, [set(row) for row in excluded])
    assert scores.dtype == torch.float32 and items.dtype == torch.int64
    assert torch.equal(scores.double(), exact.gather(1, items))


@pytest.mark.exact
@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 5, 8, 9, 64, 65, 261, 300]),  # up to 8 rows go another way, in fours
    items=st.sampled_from([1, 7, 100, 2500, 5000]),
    hidden=st.sampled_from([1, 5, 64, 100]),
    k=st.sampled_from([1, 10, 300]),
    ties=st.booleans(),
    threads=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 10_000),
)
def test_many_rows_and_items(rows, items, hidden, k, ties, threads, seed):
    """Several groups of rows and chunks of items, lists that are cut back, rising scores, many ties."""
    draw = torch.Generator().manual_seed(seed)
    h = torch.randint(-3, 4, (rows, hidden), generator=draw).float()
    table = torch.randint(-3, 4, (items, hidden), generator=draw).float()
    if not ties:  # the worst order: each item better than the last
        h, table = h.abs() + 1, torch.arange(items)[:, None].expand(-1, hidden).float().contiguous()
    excluded = [torch.randint(0, items, (3,), generator=draw).tolist() if n % 2 else [] for n in range(rows)]
    k = max(1, min(k, items - 3))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        if items > 3:
            scores, best = topk_items(h, table, k, **csr(excluded), backend="cpu")
        else:
            excluded = [[] for _ in range(rows)]
            scores, best = topk_items(h, table, k, backend="cpu")
    finally:
        torch.set_num_threads(before)
    exact = h.double() @ table.double().T
    assert best.tolist() == naive.topk_items(exact, k, [set(row) for row in excluded])
    assert torch.equal(scores.double(), exact.gather(1, best))


@pytest.mark.exact
@pytest.mark.parametrize("rows", [1, 7, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_float32(dtype, rows):
    """As exact as float32 sums of the inputs as they are."""
    draw = torch.Generator().manual_seed(0)
    h, table = (torch.randn(n, 100, generator=draw).to(dtype) for n in (rows, 900))
    scores, best = topk_items(h, table, 20, backend="cpu")
    exact = h.double() @ table.double().T
    assert torch.equal(best, exact.topk(20).indices)
    torch.testing.assert_close(scores.double(), exact.gather(1, best), atol=2e-5, rtol=1e-6)


def test_a_nan_among_many_items_is_found():
    table = torch.randn(5000, 8)
    table[4321] = float("nan")
    with pytest.raises(ValueError, match="got NaN in row 0"):
        topk_items(torch.ones(1, 8), table, 3, backend="cpu")


@pytest.mark.exact
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_order_of_every_float(backend):
    """Negative, zero of both signs, subnormal and infinite scores come in the right order."""
    values = [0.0, -0.0, 1e-40, -1e-40, float("inf"), float("-inf"), 3.0, -3.0]
    table = torch.tensor(values)[:, None]
    scores, items = topk_items(torch.ones(1, 1), table, 8, backend=backend)
    assert items.tolist() == [[4, 6, 2, 0, 1, 3, 7, 5]]
    assert torch.equal(scores[0], table[items[0], 0])


def test_no_gradient_and_compile():
    h = torch.randn(3, 4, requires_grad=True)
    table = torch.randn(9, 4)
    scores, items = topk_items(h, table, 2, **csr([[1], [], [2, 3]]))
    assert not scores.requires_grad
    compiled = torch.compile(topk_items, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(h, table, 2, **csr([[1], [], [2, 3]])), (scores, items), strict=True):
        assert torch.equal(a, b)
    excluded = csr([[1], [], [2, 3]]).values()
    for backend in ("reference", "cpu"):
        torch.library.opcheck(
            torch.ops.speeder.topk_items.default, (h.detach(), table, 2, *excluded, backend)
        )


def test_exclusions_accept_int32():
    excluded = {name: x.int() for name, x in csr([[4], [0, 1]]).items()}
    _, items = topk_items(torch.eye(2, 5), torch.eye(5), 3, **excluded)
    assert items.tolist() == [[0, 1, 2], [2, 3, 4]]


BAD = [
    (
        {"hidden": torch.zeros(2, 0)},
        ValueError,
        r"hidden: expected at least one element .* got shape \(2, 0\)",
    ),
    ({"hidden": torch.zeros(2, 4).double()}, TypeError, r"hidden: expected dtype float32, .* got float64"),
    (
        {"hidden": torch.full((2, 4), torch.nan)},
        ValueError,
        r"hidden: .* got NaN in row 0 of hidden @ item_table.T",
    ),
    ({"item_table": torch.zeros(6, 3)}, ValueError, r"item_table: expected shape \(I, 4\), got \(6, 3\)"),
    ({"k": 7}, ValueError, r"k: expected at most 6, the items in item_table, got 7"),
    ({"k": 0}, ValueError, r"k: expected at least 1, got 0"),
    ({"k": 2.0}, TypeError, r"k: expected a whole number, got float"),
    (
        csr([[], [0, 1, 2, 3, 4, 5]]),
        ValueError,
        r"k: expected at most 0, the items that row 1 may be given, got 2",
    ),
    (
        csr([[0, 1, 2, 3, 4], []]),
        ValueError,
        r"k: expected at most 1, the items that row 0 may be given, got 2",
    ),
    (csr([[], [0, 6]]), IndexError, r"exclude_items: expected 0\.\.5, got 6 at position 1"),
    ({**csr([[], [0]]), "exclude_items": None}, TypeError, r"exclude_items: expected a tensor, .* got None"),
    (
        {**csr([[], [0]]), "exclude_indptr": None},
        TypeError,
        r"exclude_indptr: expected a tensor, .* got None",
    ),
    (csr([[0]]), ValueError, r"exclude_indptr: expected shape \(3,\), got \(2,\)"),
    (
        {**csr([[], [0]]), "exclude_items": torch.zeros(3).int()},
        ValueError,
        r"exclude_indptr: expected 0 first and 3",
    ),
    (
        {"exclude_indptr": torch.tensor([0, 2, 1]), "exclude_items": torch.tensor([0])},
        ValueError,
        r"exclude_indptr: expected values that never fall, got a fall after row 1",
    ),
    ({"backend": "gpu"}, ValueError, r"backend: expected None or one of"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_arguments(changes, error, message):
    args = {"hidden": torch.ones(2, 4), "item_table": torch.ones(6, 4), "k": 2, **changes}
    with pytest.raises(error, match=message):
        topk_items(**args)
