"""The CUDA kernels' device code, compiled for the host and run thread by thread, against the reference."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch

from speeder_kernels import dispatch, reference
from tests.kernels.test_pack_tokens import make

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def device_code(tmp_path_factory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("cuda") / "cuda_on_host.so"
    source = Path(__file__).with_name("cuda_on_host.cpp")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fsanitize=undefined", "-fno-sanitize-recover"]
    command = [os.environ.get("CXX", "g++"), *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def call(function, *arguments) -> None:
    """Tensors go as pointers, numbers as int64."""
    converted = [
        ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else ctypes.c_int64(x) for x in arguments
    ]
    function(*converted)


@pytest.mark.parametrize("threads", [1, 7, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "hidden"), [("wide", 24), ("narrow", 24), ("narrow", 5)])
def test_pack_and_sum(device_code, threads, dtype, width, hidden):
    """A grid of any size gives the reference's output to the last bit, and its sums."""
    args = make(tokens=50, vocabulary=9, items=6, prompts=4, hidden=hidden, dtype=dtype)
    name = f"{str(dtype).removeprefix('torch.')}_{width}"
    out = torch.full((50, hidden), float("nan"), dtype=dtype)
    tables = [args[n] for n in ("text_embedding", "item_tokens", "position_prompts")]
    indices = [args[n] for n in ("input_ids", "item_rows", "ranks")]
    call(getattr(device_code, f"pack_{name}"), *tables, *indices, out, 50, hidden, threads)
    assert torch.equal(out, reference.pack_tokens(**args))

    index = torch.where(args["item_rows"] >= 0, args["item_rows"], 6)
    rows, order = index.sort(stable=True)
    starts = torch.searchsorted(rows, torch.arange(7))
    total = torch.full((6, hidden), float("nan"), dtype=dtype)
    call(getattr(device_code, f"sum_{name}"), out, order, starts, total, 6, hidden, threads)
    torch.testing.assert_close(total, reference.sum_rows(out, index, 6))


def test_the_cuda_library_loads_with_any_torch():
    """Where it was built: no symbol is missing, even with a torch that has no CUDA."""
    path = dispatch.library_path("_ops_cuda.so")
    if not path.exists():
        pytest.skip("_ops_cuda.so was not built: no nvcc at build time, or SPEEDER_CUDA=0")
    ctypes.CDLL(str(path), mode=os.RTLD_NOW)
