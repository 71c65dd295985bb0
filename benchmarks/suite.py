"""All benchmarks, in the tables' order."""

from __future__ import annotations

from benchmarks import compress_items, item_cross_entropy, pack_tokens, spae_attention, topk_items
from benchmarks.case import Benchmark

OPS = (spae_attention, pack_tokens, compress_items, item_cross_entropy, topk_items)
BENCHMARKS: dict[str, Benchmark] = {case.name: case for op in OPS for case in op.benchmarks()}
