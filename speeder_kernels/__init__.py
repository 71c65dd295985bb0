"""Position-aware ops for recommenders whose items are tokens: on CPU and CUDA, with a plain PyTorch
reference.

`python -m speeder_kernels` says what was built and which backends are available.
"""

from speeder_kernels import ops as _ops  # noqa: F401  (registers the ops with torch)
from speeder_kernels.dispatch import backends
from speeder_kernels.functional import (
    compress_items,
    item_cross_entropy,
    pack_tokens,
    spae_attention,
    topk_items,
)
from speeder_kernels.packing import plan_packing

__all__ = [
    "backends",
    "compress_items",
    "item_cross_entropy",
    "pack_tokens",
    "plan_packing",
    "spae_attention",
    "topk_items",
]
