"""What spae_attention's CUDA kernels are launched with, by dry runs of their launch functions on the host.

`launches()` gives a row a kernel: kernel (with its template arguments), threads and shared (bytes) of a block.
float16 is launched like bfloat16, and left out. pack_tokens and compress_items take next to no shared memory.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.kernels.host_device import HostDevice, Launch, compile_program
from tests.kernels.test_spae_attention import make
from tests.kernels.test_spae_attention_cuda_on_host import common, view

# Head sizes are padded to these.
TYPES = {torch.bfloat16: ("BFloat16", (32, 64, 96, 128, 256)), torch.float32: ("float", (64, 128, 256))}
TABLES = (512, 512)  # entries a head: what bias and gradients take of shared memory depends on them


def launches() -> list[dict]:
    """Forward, decoding and backward with all gradients, for each element type and padded head size."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        found = pool.map(lambda dtype: _launches(Path(folder), dtype), TYPES)
        distinct = dict.fromkeys(launch for rows in found for launch in rows)
    return [{"kernel": x.kernel, "threads": x.threads, "shared": x.shared} for x in distinct]


def _launches(folder: Path, dtype: torch.dtype) -> list[Launch]:
    name, sizes = TYPES[dtype]
    folder = folder / name
    folder.mkdir()
    # Nothing is run: neither sanitizers nor speed matter.
    flags = ("-O0", "-g0", "-fno-sanitize=all", f"-DSPEEDER_TYPE={name}")
    flags += (f"-DSPEEDER_SIZES={','.join(map(str, sizes))}",)
    out = []
    with HostDevice(compile_program("spae_attention", folder, extra=flags)) as device:
        for size in sizes:
            for queries in (300, 1):
                args = make([queries], [300], 2, 1, size, TABLES, dtype)
                grads = [
                    torch.empty_like(args[name]) for name in ("q", "k", "v", "relative_bias", "absolute_bias")
                ]
                result, lse = torch.empty_like(args["q"]), torch.empty(args["q"].shape[:2])
                call = common(args, True)
                out += device.call("forward", *call, result, lse, dry=True)
                out += device.call("backward", *call, *view(result), result, lse, *grads, dry=True)
    return [Launch(x.kernel, (0, 0, 0), x.threads, x.shared) for x in out]
