"""The CUDA kernels run on the host, block by block and thread by thread (see host_device.py), against plain loops.

They run through their own launch functions, so that grids, shared memory and the choice of accesses are tested too.
"""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder_kernels import dispatch, reference
from tests.kernels import naive
from tests.kernels import test_compress_items as compress_tests
from tests.kernels import test_pack_tokens as pack_tests
from tests.kernels.host_device import HostDevice, HostDeviceError, compile_program, plant

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = st.integers(0, 10_000)


@pytest.fixture(scope="module")
def pack_device(tmp_path_factory):
    with HostDevice(compile_program("pack_tokens", tmp_path_factory.mktemp("pack"))) as device:
        yield device


@pytest.fixture(scope="module")
def compress_device(tmp_path_factory):
    with HostDevice(compile_program("compress_items", tmp_path_factory.mktemp("compress"))) as device:
        yield device


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


class PackTokens(torch.autograd.Function):
    """As `speeder_kernels.ops` calls the kernels."""

    @staticmethod
    def forward(ctx, device, seed, ids, text, items, rows, ranks, prompts):
        out = empty(len(ids), text.shape[1], dtype=text.dtype)
        sizes = [len(table) for table in (text, items, prompts)]
        tensors = (ids, text, items, rows, ranks, prompts, out)
        device.call("pack_tokens", text.dtype, *tensors, *out.shape, *sizes, seed=seed)
        ctx.save_for_backward(ids, rows, ranks)
        ctx.constants = device, seed, sizes
        return out

    @staticmethod
    def backward(ctx, grad):
        device, seed, sizes = ctx.constants

        def sum_rows(grad, index, size):
            rows, order = index.sort(stable=True)
            starts = torch.searchsorted(rows, torch.arange(size + 1))
            out = empty(size, grad.shape[1], dtype=grad.dtype)
            device.call("sum_rows", grad.dtype, grad.contiguous(), order, starts, out, *out.shape, seed=seed)
            return out

        grads = reference.pack_tokens_backward(grad, *ctx.saved_tensors, sizes, [True] * 3, sum_rows)
        return None, None, None, grads[0], grads[1], None, None, grads[2]


class CompressItems(torch.autograd.Function):
    """As `speeder_kernels.ops` calls the kernels."""

    @staticmethod
    def forward(ctx, device, seed, experts, logits, present, weight):
        items, modalities, hidden = experts.shape
        args = (experts, logits.float(), present, weight.float(), items, modalities, hidden, 1e-6)
        tokens, gates = empty(items, hidden, dtype=experts.dtype), empty(items, modalities)
        device.call("compress_items", experts.dtype, *args, tokens, gates, seed=seed)
        ctx.save_for_backward(experts, logits, present, weight)
        ctx.constants = device, seed, args
        return tokens, gates

    @staticmethod
    def backward(ctx, grad_tokens, grad_gates):
        experts, logits, _, weight = ctx.saved_tensors
        device, seed, args = ctx.constants
        grads = empty(*experts.shape, dtype=experts.dtype), empty(*logits.shape), empty(*weight.shape)
        upstream = grad_tokens.contiguous(), grad_gates.contiguous()
        device.call("compress_items_backward", experts.dtype, *args, *upstream, *grads, seed=seed)
        return None, None, grads[0], grads[1].to(logits.dtype), None, grads[2].to(weight.dtype)


def pack_on(device: HostDevice, seed: int = 0):
    return lambda **args: PackTokens.apply(device, seed, *args.values())


def compress_on(device: HostDevice, seed: int = 0):
    return lambda *args: CompressItems.apply(device, seed, *args)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    sizes=st.tuples(st.integers(1, 9), st.integers(0, 6), st.integers(0, 5)),
    hidden=st.sampled_from([1, 3, 8, 63, 64, 65, 200, 1032]),
    dtype=st.sampled_from(DTYPES),
    seed=SEEDS,
)
def test_pack_tokens(pack_device, tokens, sizes, hidden, dtype, seed):
    args = pack_tests.make(tokens, *sizes, hidden, dtype, seed)
    pack_tests.check_against_the_loop(pack_on(pack_device, seed), args)


@pytest.mark.parametrize("hidden", [64, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_many_tokens(pack_device, dtype, hidden):
    """All warps of a block sum those, and the order of threads changes no bit."""
    args = pack_tests.make(500, vocabulary=3, items=9, prompts=1, hidden=hidden, dtype=dtype)
    pack_tests.check_against_the_loop(pack_on(pack_device), args)
    args, inputs = pack_tests.leaves(args)
    first, *others = (naive.gradients(pack_on(pack_device, seed)(**args), inputs) for seed in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("hidden", [64, 65])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "value"),
    [("item_rows", 4), ("ranks", 5), ("ranks", 2**62), ("input_ids", -1), ("input_ids", 7)],
)
def test_a_token_with_an_index_outside_of_its_table_gets_nan(pack_device, name, value, dtype, hidden):
    """Nothing is read there, and the other tokens are as they were."""
    args = pack_tests.make(vocabulary=7, items=4, prompts=5, hidden=hidden, dtype=dtype)
    sound = pack_on(pack_device)(**args)
    is_item = args["item_rows"] >= 0
    token = int((is_item != (name == "input_ids")).nonzero()[0])
    args[name][token] = value
    out = pack_on(pack_device)(**args)
    assert out[token].isnan().all()
    sound[token] = out[token] = 0
    assert torch.equal(out, sound)


@settings(max_examples=100, deadline=None)
@given(
    items=st.integers(1, 7),
    modalities=st.sampled_from([1, 2, 3, 4, 20, 40]),
    hidden=st.sampled_from([1, 2, 16, 33, 100, 264, 2056]),
    dtype=st.sampled_from(DTYPES),
    float32_gates=st.booleans(),
    seed=SEEDS,
)
def test_compress_items(compress_device, items, modalities, hidden, dtype, float32_gates, seed):
    gate_dtype = torch.float32 if float32_gates else None
    args = compress_tests.make(items, modalities, hidden, dtype, gate_dtype, seed)
    compress_tests.check_against_the_loop(compress_on(compress_device, seed), args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_do_not_start_at_16_bytes(pack_device, compress_device, dtype):
    """Views into larger tensors: the kernels go element by element there, and only there."""

    def shifted(x):
        if not x.is_floating_point():
            return x
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    pack = {name: shifted(x) for name, x in pack_tests.make(hidden=64, dtype=dtype).items()}
    pack_tests.check_against_the_loop(pack_on(pack_device), pack)
    compress = [shifted(x) for x in compress_tests.make(hidden=64, dtype=dtype)]
    compress_tests.check_against_the_loop(compress_on(compress_device), compress)
    text = pack["text_embedding"]
    for table, width in ((text, 1), (text.clone(), 16 // dtype.itemsize)):
        tensors = (None, table, None, None, None, None, None)
        (launch,) = pack_device.call("pack_tokens", dtype, *tensors, 12, 64, 7, 4, 5, dry=True)
        assert launch.kernel.startswith("speeder::cuda::PackTokens<") and launch.kernel.endswith(
            f", {width}>"
        )


def compress_gradients(
    device: HostDevice, seed: int, items: int = 40, nan: bool = False
) -> list[torch.Tensor]:
    args, inputs = compress_tests.leaves(compress_tests.make(items, hidden=80))
    with torch.no_grad():
        for x in args[:2]:
            x[~args[2]] = float("nan") if nan else x[~args[2]]
    out = compress_on(device, seed)(*args)
    return [*out, *naive.gradients(out, inputs)]


def test_absent_modalities_are_never_read(compress_device):
    clean, dirty = (compress_gradients(compress_device, 0, nan=nan) for nan in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_the_same_bits_in_every_run(compress_device):
    """Whatever order threads and blocks run in; also with more items than blocks that sum the weight's gradient."""
    for items in (40, 700):
        first, *others = (compress_gradients(compress_device, seed, items) for seed in range(4))
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,), (0, 2)])
def test_only_wanted_gradients(compress_device, wanted):
    experts, logits, present, weight = compress_tests.make(items=9, hidden=40)
    args = experts, logits, present, weight, 9, 3, 40, 1e-6, torch.randn(9, 40), torch.randn(9, 3)
    some, everything = (
        [empty(*x.shape) if n in needed else None for n, x in enumerate((experts, logits, weight))]
        for needed in (wanted, range(3))
    )
    for grads in (some, everything):
        compress_device.call("compress_items_backward", torch.float32, *args, *grads)
    assert all(b is None or torch.equal(a, b) for a, b in zip(everything, some, strict=True))


# --- planted faults: each is made in a copy of the sources, and caught --------------------------------------


def faulty(program: str, folder, *edits: tuple[str, str, str], watch: bool = False) -> HostDevice:
    return HostDevice(compile_program(program, folder, plant(folder, *edits), watch=watch))


def test_a_missing_barrier_is_caught(tmp_path):
    """Between what each warp puts into the sums over an item, and what all read."""
    edit = (
        "cuda/compress_items/forward.cuh",
        "    put_warp_sum(shared.sums, 0, squares);\n    sync_block();\n",
        "    put_warp_sum(shared.sums, 0, squares);\n",
    )
    with faulty("compress_items", tmp_path, edit) as device:
        args = compress_tests.make(hidden=300)
        with pytest.raises(HostDeviceError, match=r"thread .*(race: |read of never-written shared memory)"):
            compress_on(device)(*args)


def test_an_off_by_one_bound_is_caught(tmp_path):
    edit = (
        "cuda/pack_tokens/kernels.cuh",
        "if (column < vectors) write_global(out + column, values[i]);",
        "if (column <= vectors) write_global(out + column, values[i]);",
    )
    with faulty("pack_tokens", tmp_path, edit) as device:
        for hidden in (64, 65):
            with pytest.raises(HostDeviceError, match="AddressSanitizer: heap-buffer-overflow"):
                pack_on(device)(**pack_tests.make(hidden=hidden))


def test_an_atomic_in_place_of_the_fixed_order_is_caught(tmp_path):
    """The gradient is as accurate as before, and other bits come with another order of the threads."""
    edit = (
        "cuda/common/sum_parts.cuh",
        "    sums.set(thread_index(), total);\n",
        "    if (warp() == 0 && n < size) out[n] = 0.0f;\n"
        "    sync_block();\n"
        "    if (n < size) atomic_add(out + n, total);\n"
        "    if (n >= 0) return;\n",
    )
    with faulty("compress_items", tmp_path, edit) as device:
        runs = [compress_gradients(device, seed)[-1] for seed in range(4)]
    torch.testing.assert_close(runs[0], runs[1])
    assert not all(torch.equal(runs[0], other) for other in runs[1:])


def test_no_race_in_global_memory(tmp_path):
    """Every access is watched; tables of partial sums with rows of each block's own among them."""
    with HostDevice(compile_program("pack_tokens", tmp_path, watch=True)) as device:
        args, inputs = pack_tests.leaves(pack_tests.make(200, vocabulary=2, items=9, prompts=1, hidden=64))
        naive.gradients(pack_on(device)(**args), inputs)
    with HostDevice(compile_program("compress_items", tmp_path, watch=True)) as device:
        compress_gradients(device, 0, items=9)


def test_blocks_that_share_their_partial_sums_are_caught(tmp_path):
    """In one run: the numbers might be right."""
    edit = (
        "cuda/compress_items/backward.cuh",
        "store_floats<N>(weight_parts + int64_t{block_index_x()} * size + d,",
        "store_floats<N>(weight_parts + d,",
    )
    race = "race in global memory: write to what another block writes"
    with (
        faulty("compress_items", tmp_path, edit, watch=True) as device,
        pytest.raises(HostDeviceError, match=race),
    ):
        compress_gradients(device, 0, items=9)


def test_the_cuda_library_loads_with_any_torch():
    """Where it was built: no symbol is missing, even with a torch that has no CUDA."""
    path = dispatch.library_path("_ops_cuda.so")
    if not path.exists():
        pytest.skip("_ops_cuda.so was not built: no nvcc at build time, or SPEEDER_CUDA=0")
    ctypes.CDLL(str(path), mode=os.RTLD_NOW)
