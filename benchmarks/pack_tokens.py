"""pack_tokens: the language model's input, half of it items. T tokens, V vocabulary, H hidden size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import FORWARD, REFERENCE, Benchmark, Inputs, Results, Side, size_of
from speeder_kernels import pack_tokens

VOCABULARY, HIDDEN, PROMPTS = 49152, 576, 256  # SmolLM2-135M
BATCHES = 4  # in turn, so that a batch's rows are not in the cache from the call before

EAGER = "gather + where + add"


def _eager(
    ids: Tensor, text_VH: Tensor, items_UH: Tensor, rows: Tensor, ranks: Tensor, prompts_PH: Tensor
) -> Tensor:
    items = F.embedding(rows.clamp(min=0), items_UH) + F.embedding(ranks.clamp(min=0), prompts_PH)
    return torch.where((rows >= 0)[:, None], items, F.embedding(ids, text_VH))


def _build(tokens: int, dtype: torch.dtype, quick: bool, backend: str | None = None) -> Inputs:
    vocabulary, hidden = (512, 64) if quick else (VOCABULARY, HIDDEN)
    tokens = tokens // 32 if quick else tokens
    items = tokens // 2
    text, item_tokens, prompts = (
        torch.randn(rows, hidden).to(dtype) for rows in (vocabulary, items, PROMPTS)
    )
    batches = []
    for _ in range(BATCHES):
        rows = torch.full((tokens,), -1)
        rows[torch.randperm(tokens)[:items]] = torch.randperm(items)
        ranks = torch.where(rows >= 0, torch.arange(tokens) % 50, -1)
        batches.append((torch.randint(vocabulary, (tokens,)), text, item_tokens, rows, ranks, prompts))

    def side(function: Callable[..., Tensor]) -> Side:
        turn = cycle(batches)

        def run() -> Results:
            return (function(*next(turn)),)

        return Side(run)

    ids, _, _, rows, ranks, _ = batches[0]
    distinct = len(ids[rows < 0].unique()) + items + len(ranks.unique())
    row = size_of(text[0])
    sides = {
        "ours": side(partial(pack_tokens, backend=backend)),
        EAGER: side(_eager),
        REFERENCE: side(partial(pack_tokens, backend="reference")),
    }
    return Inputs(sides, items * hidden, (distinct + tokens) * row + size_of(ids, rows, ranks))


def benchmarks() -> list[Benchmark]:
    """All of this op."""
    return [
        Benchmark(
            "pack_tokens",
            f"{tokens} tokens, {FORWARD}",
            f"pack {tokens} fwd",
            dtype,
            {EAGER: 0.35, REFERENCE: None},
            partial(_build, tokens, dtype),
            bandwidth_share=0.75,
        )
        for dtype in (torch.float32, torch.bfloat16)
        for tokens in (4096, 16384)
    ]
