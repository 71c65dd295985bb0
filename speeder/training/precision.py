"""The precision for `precision: auto`: the faster one on this machine.

bfloat16 halves the time of matrix products on GPUs, and on processors with AMX or full-rate AVX-512-BF16 (Zen 4 and
later). On others it costs time: on a fifth-generation Intel Xeon with hidden AMX, float32 was twice as fast (120
GFLOP/s per core against 56). So it is measured, in some tens of milliseconds.
"""

from __future__ import annotations

import torch

from speeder.io.machine import shortest
from speeder.recipes.schema import AUTO

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_GAIN = 1.25  # what bfloat16 must gain: its casts and coarser sums are not free
_SIZE = 512


def resolve_precision(precision: str, device: str | None = None) -> str:
    """`precision` itself, or for `"auto"` the faster of `"bf16"` and `"fp32"` on this machine.

    Args:
        device: `"cuda"` or `"cpu"`; None: a GPU if there is one, as in training. A GPU without bfloat16 products
            (before compute capability 8.0) gets float32.
    """
    if precision != AUTO:
        return precision
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if product_seconds(torch.bfloat16) * _GAIN < product_seconds(torch.float32) else "fp32"


@torch.no_grad()
def product_seconds(dtype: torch.dtype) -> float:
    """The shortest time of a matrix product on the CPU, in seconds."""
    left, right = torch.randn(_SIZE, _SIZE).to(dtype), torch.randn(_SIZE, _SIZE).to(dtype)
    return shortest(lambda: left @ right)
