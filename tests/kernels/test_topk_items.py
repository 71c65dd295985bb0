"""topk_items against sorting every row, with ties, exclusions and chunks smaller than the catalogue."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder_kernels import reference, topk_items
from tests.kernels import naive


def csr(excluded: list[list[int]]) -> dict:
    indptr = torch.tensor([0, *(len(row) for row in excluded)]).cumsum(0)
    flat = [item for row in excluded for item in row]
    return {"exclude_indptr": indptr, "exclude_items": torch.tensor(flat, dtype=torch.int64)}


@st.composite
def cases(draw):
    """Small whole numbers, so that scores are exact in every dtype and ties are common."""
    rows, items, hidden = draw(st.integers(1, 5)), draw(st.integers(1, 20)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    h = torch.randint(-3, 4, (rows, hidden), generator=generator).to(dtype)
    table = torch.randint(-3, 4, (items, hidden), generator=generator).to(dtype)
    excluded = [draw(st.lists(st.integers(0, items - 1), max_size=items)) for _ in range(rows)]
    allowed = min(items - len(set(row)) for row in excluded)
    return h, table, excluded, draw(st.integers(1, max(1, allowed))) if allowed else 0


@pytest.mark.parametrize("items_per_chunk", [1, 4, 8192])
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_matches_sorting(items_per_chunk, case):
    h, table, excluded, k = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "ITEMS_PER_CHUNK", items_per_chunk)
        if k == 0:
            with pytest.raises(ValueError, match="k: expected at most 0, the items that row"):
                topk_items(h, table, 1, **csr(excluded))
            return
        scores, items = topk_items(h, table, k, **csr(excluded))
    exact = h.double() @ table.double().T
    assert items.tolist() == naive.topk_items(exact, k, [set(row) for row in excluded])
    assert scores.dtype == torch.float32 and items.dtype == torch.int64
    assert torch.equal(scores.double(), exact.gather(1, items))


def test_order_of_every_float():
    """Negative, zero of both signs, subnormal and infinite scores come in the right order."""
    values = [0.0, -0.0, 1e-40, -1e-40, float("inf"), float("-inf"), 3.0, -3.0]
    table = torch.tensor(values)[:, None]
    scores, items = topk_items(torch.ones(1, 1), table, 8)
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
    torch.library.opcheck(
        torch.ops.speeder.topk_items.default, (h.detach(), table, 2, *excluded, "reference")
    )


def test_exclusions_accept_int32():
    excluded = {name: x.int() for name, x in csr([[4], [0, 1]]).items()}
    _, items = topk_items(torch.eye(2, 5), torch.eye(5), 3, **excluded)
    assert items.tolist() == [[0, 1, 2], [2, 3, 4]]


BAD = [
    (
        {"hidden": torch.zeros(0, 4)},
        ValueError,
        r"hidden: expected at least one element .* got shape \(0, 4\)",
    ),
    ({"hidden": torch.zeros(2, 4).double()}, TypeError, r"hidden: expected dtype float32, .* got float64"),
    (
        {"hidden": torch.full((2, 4), torch.nan)},
        ValueError,
        r"hidden: .* got NaN in row 0 of hidden @ item_table.T",
    ),
    ({"item_table": torch.zeros(6, 3)}, ValueError, r"item_table: expected shape \(I, 4\), got \(6, 3\)"),
    ({"k": 7}, ValueError, r"k: expected at most 6, the items in item_table, got 7"),
    ({"k": 0}, ValueError, r"k: expected a number above 0, got 0"),
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
