"""The shapes that `benchmarks.gpu` measures and `benchmarks.gpu_roofline` computes bounds for.

B sequences, S tokens of each, Hq and Hkv heads, D head size, N positions, I items, H hidden size.
"""

from __future__ import annotations

ATTENTION = ((4, 1024, 9, 3, 64), (4, 4096, 32, 8, 128))  # B, S, Hq, Hkv, D
DECODING = ((64, 512, 9, 3, 64), (64, 4096, 32, 8, 128))  # one query for each of B caches of S keys
CROSS_ENTROPY = ((1024, 100_000, 576), (8192, 100_000, 2048))  # N, I, H
# Those of the CPU's benchmarks, which say themselves what they are.
PACK_TOKENS = ((4096, 576), (16384, 576))  # tokens, H
COMPRESS_ITEMS = ((4096, 3, 576),)  # items, modalities, H
TOPK_ITEMS = ((256, 1_000_000, 64, 100), (1, 12_101, 576, 10))  # N, I, H, k
