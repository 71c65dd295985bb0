"""What the CUDA kernels are launched with, by dry runs of their launch functions on the host.

`launches()` gives a row a kernel: kernel (with its template arguments), threads and shared (bytes) of a block. Those of
spae_attention are for each padded head size, also as they are launched where blocks have less shared memory, in
bfloat16 (float16 is launched like it); those of pack_tokens and compress_items for each element type and width of their
accesses.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from speeder_kernels.validate import FLOATS
from tests.kernels.host_device import SHARED_H100, SHARED_LEAST, HostDevice, Launch, compile_program
from tests.kernels.test_spae_attention import make
from tests.kernels.test_spae_attention_cuda_on_host import common, view

# Head sizes are padded to these.
SIZES = (32, 64, 96, 128, 256)
TABLES = (512, 512)  # entries a head: what bias and gradients take of shared memory depends on them
HIDDEN = (576, 577)  # of pack_tokens and compress_items: rows that go in 16 bytes an access, and in elements
MODALITIES = 4
SHARED_A100 = 163 * 1024  # bytes that a block may have
FLAGS = ("-O0", "-g0", "-fno-sanitize=all")  # nothing is run: neither sanitizers nor speed matter


def launches() -> list[dict]:
    """Forward, decoding and backward with all gradients."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor() as pool:
        folder = Path(name)
        found = [pool.submit(op, folder) for op in (_attention, _pack_tokens, _compress_items)]
        distinct = dict.fromkeys((x.kernel, x.threads, x.shared) for rows in found for x in rows.result())
    return [dict(zip(("kernel", "threads", "shared"), x, strict=True)) for x in distinct]


def problems(found: list[dict]) -> list[str]:
    """Launches that ask for more shared memory than an A100 has."""
    return [f"too much shared memory: {launch}" for launch in found if launch["shared"] > SHARED_A100]


def _attention(folder: Path) -> list[Launch]:
    flags = (*FLAGS, "-DSPEEDER_TYPE=BFloat16", f"-DSPEEDER_SIZES={','.join(map(str, SIZES))}")
    out = []
    with HostDevice(compile_program("spae_attention", folder, extra=flags)) as device:
        for size in SIZES:
            for queries, shared_most in (
                (300, SHARED_H100),
                (1, SHARED_H100),
                (300, SHARED_LEAST),
                (1, SHARED_LEAST),
            ):
                args = make([queries], [300], 2, 1, size, TABLES, torch.bfloat16)
                names = ("q", "k", "v", "relative_bias", "absolute_bias")
                grads = [torch.empty_like(args[name]) for name in names]
                result, lse = torch.empty_like(args["q"]), torch.empty(args["q"].shape[:2])
                call, how = common(args, True), {"dry": True, "shared_most": shared_most}
                out += device.call("forward", *call, result, lse, **how)
                out += device.call("backward", *call, *view(result), result, lse, *grads, **how)
    return out


def _pack_tokens(folder: Path) -> list[Launch]:
    out = []
    with HostDevice(compile_program("pack_tokens", folder, extra=FLAGS)) as device:
        for dtype in FLOATS:
            for hidden in HIDDEN:
                out += device.call("pack_tokens", dtype, *[None] * 7, 16, hidden, 1, 1, 1, dry=True)
                out += device.call("sum_rows", dtype, *[None] * 4, 16, hidden, dry=True)
    return out


def _compress_items(folder: Path) -> list[Launch]:
    out, grads = [], [torch.empty(4)] * 3
    with HostDevice(compile_program("compress_items", folder, extra=FLAGS)) as device:
        for dtype in FLOATS:
            for hidden in HIDDEN:
                args = (dtype, *[None] * 4, 16, MODALITIES, hidden, 1e-6)
                out += device.call("compress_items", *args, None, None, dry=True)
                out += device.call("compress_items_backward", *args, None, None, *grads, dry=True)
    return out
