"""Planted faults in the Triton kernels: each is the kind of mistake that is easily made, and the tests notice it."""

from __future__ import annotations

import sys

import pytest
import torch

import speeder_kernels as sk
from tests.kernels import test_compress_items as compress
from tests.kernels import test_item_cross_entropy as cross_entropy
from tests.kernels import test_pack_tokens as pack
from tests.kernels import test_topk_items as topk
from tests.kernels.test_triton_items import gradients_of, triton
from tests.kernels.triton_tools import interpreted_only, planted, programs_in_any_order, small_tiles

pytestmark = interpreted_only  # on a GPU a fault may bring down the process, or stay without effect


def check_pack():
    args = pack.make(30, hidden=20)
    pack.check_against_the_loop(triton(sk.pack_tokens), args)


def check_compress():
    args = compress.make(30, 3, 20)
    compress.check_against_the_loop(triton(sk.compress_items), args)


def check_cross_entropy():
    run, exactly = triton(sk.item_cross_entropy), cross_entropy.full_logits
    cross_entropy.check(exactly, run, 20, 70, 20, 0.2, False, torch.float32, 0)


def check_topk():
    draw = torch.Generator().manual_seed(0)
    h = torch.randint(-3, 4, (9, 4), generator=draw).float()
    table = torch.randint(-3, 4, (500, 4), generator=draw).float()
    excluded = (h @ table.T).topk(20).indices.tolist()  # the best, so that each one missed shows
    with pytest.MonkeyPatch.context() as patch:
        # one chunk with more groups than k
        patch.setattr(sys.modules["speeder_kernels.triton.items.topk_items"], "CHUNK_ITEMS", 512)
        for k in (1, 2, 5):
            topk.check_against_sorting(triton(sk.topk_items), h, table, excluded, k)


CHECKS = {
    "pack_tokens": check_pack,
    "compress_items": check_compress,
    "item_cross_entropy": check_cross_entropy,
    "topk_items": check_topk,
}
WRONG = [
    ("pack_tokens", "an off-by-one bound", "in_row = column[None, :] < H\n", "in_row = column[None, :] < H - 1\n"),
    ("pack_tokens", "the last token of a row left out", "ahead < count\n", "ahead < count - 1\n"),
    ("compress_items", "an item too few", "in_batch = item < stop\n", "in_batch = item < stop - 1\n"),
    ("compress_items", "absent modalities weighed", "tl.where(here, tl.exp(", "tl.where(here | True, tl.exp(0 * "),
    ("item_cross_entropy", "an item too many", "tl.where((item < ITEMS)", "tl.where((item <= ITEMS)"),
    ("item_cross_entropy", "a split left out", "range(S):\n        place", "range(S - 1):\n        place"),
    ("item_cross_entropy", "earlier chunks forgotten", "ADD=start > 0", "ADD=False"),
    ("topk_items", "a group too few", "count = min(k,", "count = min(max(1, k - 1),"),
    ("topk_items", "ties to the higher group", "(group.to(tl.int64) ^ LOW32)", "(group.to(tl.int64))"),
    ("topk_items", "an excluded item skipped", "middle + 1, low)", "middle + 2, low)"),
]  # fmt: skip


@pytest.mark.parametrize("op", CHECKS)
def test_without_a_fault_the_checks_pass(op, tmp_path):
    """Also from a copy of the source, so that it is the fault that fails below."""
    with small_tiles(processors=5), planted(tmp_path, [f"items.{op}"]):
        CHECKS[op]()


@pytest.mark.parametrize(
    ("op", "fault", "old", "new"), WRONG, ids=[f"{op}: {fault}" for op, fault, *_ in WRONG]
)
def test_a_wrong_kernel_is_noticed(op, fault, old, new, tmp_path):
    with (
        small_tiles(processors=5),
        planted(tmp_path, [f"items.{op}"], (f"items.{op}", old, new)),
        pytest.raises(AssertionError),
    ):
        CHECKS[op]()


ATOMICS = {
    "compress_items": [
        ("part = grads.weight_parts + tl.program_id(0).to(tl.int64) * x.H\n", "part = grads.weight_parts\n"),
        ("tl.store(part + column, grad_weight,", "tl.atomic_add(part + column, grad_weight,"),
        ("norm_weight.new_empty(programs if weight", "norm_weight.new_zeros(programs if weight"),
    ],
    "item_cross_entropy": [
        ("parts + (tl.cast(split, tl.int64) * N + first_row) * H", "parts + tl.cast(first_row, tl.int64) * H"),
        ("        total += tl.load(place, mask=inside, other=0.0)\n", "        total += 0.0\n"),
        ("tl.store(place, total, mask=inside)\n\n", "tl.atomic_add(place, total, mask=inside)\n\n"),
        ("hidden.new_empty(splits if needs & 1 else 0", "hidden.new_zeros(splits if needs & 1 else 0"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("op", ATOMICS)
def test_an_atomic_sum_is_noticed(op, tmp_path):
    """Its result is right, within rounding, and differs with the order in which programs run."""
    right = gradients_of(op, seed=0)
    changes = [(f"items.{op}", old, new) for old, new in ATOMICS[op]]
    results = []
    with planted(tmp_path, [f"items.{op}"], *changes):
        for order in range(3):
            with programs_in_any_order(order):
                results.append(gradients_of(op, seed=0))
    for result in results:
        for a, b in zip(result, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not all(
        torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True)
    )
