"""The host layer under the CUDA kernels' tests: what it computes is right, and each fault it is there for is caught."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.host_device import SHARED_LEAST, HostDevice, HostDeviceError, compile_program

DTYPES = (torch.bfloat16, torch.float16)
# What a missing barrier is seen as depends on who comes first.
UNORDERED = (
    "(race: (read of|write to) what another thread|never-written shared memory|copy was not waited for)"
)
# As cuda_host/layer.cpp numbers them.
FAULTS = (
    "none",
    "missing barrier",
    "missing warp barrier",
    "early exit",
    "two barriers",
    "divergent shuffle",
    "out of bounds",
    "larger than launched",
    "misaligned",
    "never written",
    "two writers",
    "missing wait",
    "wait for too few",
    "overwritten copy",
    "global out of bounds",
    "unfinished copy",
    "unordered writes",
    "unordered read",
)


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    with HostDevice(compile_program("layer", tmp_path_factory.mktemp("layer"))) as device:
        yield device


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """With every access to global memory watched."""
    with HostDevice(compile_program("layer", tmp_path_factory.mktemp("watched"), watch=True)) as device:
        yield device


@pytest.mark.parametrize("way", range(8))
@pytest.mark.parametrize("dtype", DTYPES)
def test_tile_product(device, dtype, way):
    """Every way to load a tile: transposed or not (bit 0), in pairs or not (1), and from sums (2)."""
    draw = torch.Generator().manual_seed(way)
    a, b = (torch.randn(16, 16, generator=draw).to(dtype) for _ in range(2))
    c = torch.full((16, 16), float("nan"))
    device.call("product", dtype, a, b, c, way)
    expected = a.double() @ b.double()
    if way & 4:
        expected = expected.float().to(dtype).double() @ b.double()
    torch.testing.assert_close(c.double(), expected, rtol=1e-6, atol=1e-4 if way & 4 else 1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_barriers_and_shared_memory(device, seed):
    given, out = torch.randn(64), torch.full((64,), float("nan"))
    device.call("reverse", given, out, 0, seed=seed)
    assert torch.equal(out, given.flip(0))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing barrier", rf"block \(0, 0, 0\), thread \d+: .*{UNORDERED}"),
        ("missing warp barrier", UNORDERED),
        (
            "early exit",
            r"not every thread reaches a barrier: 63 \(thread 0, ...\) wait in sync_block at layer.cpp:\d+, "
            r"1 \(thread 5, ...\) have ended",
        ),
        (
            "two barriers",
            r"barrier in divergent code: others wait in sync_block at layer.cpp:\d+, this thread in sync_block "
            r"at layer.cpp:\d+",
        ),
        ("divergent shuffle", r"wait in shuffle at layer.cpp:\d+"),
        (
            "out of bounds",
            r"thread 63: shared memory access out of bounds: bytes 256 .. 259 of the 256 from 0",
        ),
        ("larger than launched", "shared memory view larger than what was asked for at launch"),
        ("misaligned", "misaligned shared memory access"),
        ("never written", r"read of never-written shared memory: bytes 28 .. 31 "),
        ("two writers", "race: write to what another thread writes"),
        ("global out of bounds", "ERROR: AddressSanitizer: heap-buffer-overflow"),
    ],
)
def test_a_fault_is_caught(device, fault, message, seed):
    given, out = torch.randn(64), torch.zeros(64)
    with pytest.raises(HostDeviceError, match=message):
        device.call("reverse", given, out, FAULTS.index(fault), seed=seed)
    test_barriers_and_shared_memory(device, seed)  # the next kernel is none the worse


@pytest.mark.parametrize("valid", [0, 3, 5])
def test_asynchronous_copies(device, valid):
    given, out = torch.randn(5, 128), torch.full((5, 128), float("nan"))
    device.call("stream", given, out, 5, valid, 0)
    expected = given.flip(1)
    expected[valid:] = 0
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing wait", "read of shared memory whose asynchronous copy was not waited for"),
        ("wait for too few", "read of shared memory whose asynchronous copy was not waited for"),
        ("overwritten copy", "write to shared memory that is still being copied to"),
        ("missing barrier", UNORDERED),
        ("unfinished copy", "ended before its asynchronous copies were waited for"),
    ],
)
def test_a_fault_of_copies_is_caught(device, fault, message):
    given, out = torch.randn(5, 128), torch.zeros(5, 128)
    with pytest.raises(HostDeviceError, match=message):
        device.call("stream", given, out, 5, 5, FAULTS.index(fault))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unordered writes", "race in global memory: write to what another thread writes"),
        ("unordered read", "race in global memory: (read of|write to) what another thread (writes|reads)"),
    ],
)
def test_a_race_in_global_memory_is_caught(watched, fault, message, seed):
    given, out = torch.randn(64), torch.zeros(64)
    with pytest.raises(HostDeviceError, match=message):
        watched.call("reverse", given, out, FAULTS.index(fault), seed=seed)
    test_barriers_and_shared_memory(watched, seed)


def test_an_atomic_is_a_race(watched):
    with pytest.raises(
        HostDeviceError, match=r"race in global memory: .* what another (block|thread) writes"
    ):
        watched.call("sum", torch.randn(3, 4, 32), torch.zeros(3, 4, 32), torch.zeros(1), 3)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2**31, 1, 1, 0), "a grid of 2147483648 x 1 x 1 blocks, and a GPU takes 2147483647 x 65535 x 65535"),
        ((1, 65536, 1, 0), "a grid of 1 x 65536 x 1 blocks"),
        ((1, 1, 65536, 0), "a grid of 1 x 1 x 65536 blocks"),
        (
            (1, 1, 1, SHARED_LEAST + 1),
            "101377 bytes of shared memory for a block, and this GPU gives it 101376",
        ),
    ],
)
def test_launches_that_no_gpu_takes(device, sizes, message):
    with pytest.raises(HostDeviceError, match=message):
        device.call("nothing", *sizes, dry=True, shared_most=SHARED_LEAST)
    most = (2**31 - 1, 65535, 65535, SHARED_LEAST)
    (launch,) = device.call("nothing", *most, dry=True, shared_most=SHARED_LEAST)
    assert (*launch.grid, launch.shared) == most


def test_sums_over_a_warp_and_with_atomics(device):
    """All lanes get the same bits, whatever the seed; atomics give others with another seed."""
    given, lanes = torch.randn(3, 4, 32), torch.full((3, 4, 32), float("nan"))
    seen = set()
    for seed in range(8):
        atomic = torch.zeros(1)
        device.call("sum", given, lanes, atomic, 3, seed=seed)
        torch.testing.assert_close(lanes[..., 0], given.sum(-1))
        assert torch.equal(lanes, lanes[..., :1].expand_as(lanes))
        torch.testing.assert_close(atomic[0], given.sum(), rtol=1e-4, atol=1e-4)
        seen.add(atomic.item())
    assert len(seen) > 1
