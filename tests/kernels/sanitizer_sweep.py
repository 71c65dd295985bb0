"""Every compiled CPU kernel, forward and backward, over shapes that end where tiles, vectors and blocks do not.

Run by `test_sanitizers.py` in a process of its own, with kernels that AddressSanitizer and UBSan watch. Each tensor is
an allocation of its own, so that a read or write past an end is caught.
"""

from __future__ import annotations

import itertools
import sys

import torch

import speeder_kernels
from speeder_kernels import _host
from tests.kernels import naive
from tests.kernels.test_compress_items import make as make_compress
from tests.kernels.test_item_cross_entropy import make as make_cross_entropy
from tests.kernels.test_pack_tokens import leaves as pack_leaves
from tests.kernels.test_pack_tokens import make as make_pack
from tests.kernels.test_spae_attention import leaves as attention_leaves
from tests.kernels.test_spae_attention import make as make_attention
from tests.kernels.test_spae_attention_cpu import KINDS, set_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (
    ([1], [1]),
    ([0, 3, 1], [5, 0, 17]),
    ([67, 5], [67, 70]),
    ([1, 2], [300, 64]),
    ([1, 2], [900, 1500]),  # keys of one sequence shared among tasks
    ([270], [270]),
)


def spae_attention() -> int:
    cases = itertools.product(LENGTHS, (1, 33, 64, 100), DTYPES)
    for n, ((lengths_q, lengths_k), size, dtype) in enumerate(cases):
        heads = ((9, 3), (1, 1), (7, 1))[n % 3]
        tables = ((6, 50), (1, 1), (None, 3), (4, None))[n % 4]
        args = set_ranks(
            make_attention(lengths_q, lengths_k, *heads, size, tables, dtype, n), KINDS[n % 6], n
        )
        copy, inputs = attention_leaves(args)
        out = speeder_kernels.spae_attention(**copy, causal=n % 5 != 0, backend="cpu")
        naive.gradients(out, inputs)
    return n + 1


def pack_tokens() -> int:
    for n, (hidden, dtype) in enumerate(itertools.product((1, 7, 16, 63, 65, 200), DTYPES)):
        args, inputs = pack_leaves(make_pack(tokens=37, hidden=hidden, dtype=dtype, seed=n))
        naive.gradients(speeder_kernels.pack_tokens(**args, backend="cpu"), inputs)
    large = 9_000  # tokens: an output that is written past the caches
    for dtype in DTYPES:
        speeder_kernels.pack_tokens(**make_pack(tokens=large, hidden=1024, dtype=dtype), backend="cpu")
    return n + 1 + len(DTYPES)


def compress_items() -> int:
    shapes = itertools.product((1, 9), (1, 3, 17), (1, 16, 33, 100), DTYPES)
    for n, (items, modalities, hidden, dtype) in enumerate(shapes):
        args = make_compress(items, modalities, hidden, dtype, seed=n)
        inputs = [x.requires_grad_() for x in args if x.dtype != torch.bool]
        naive.gradients(speeder_kernels.compress_items(*args, backend="cpu"), inputs)
    return n + 1


def item_cross_entropy() -> int:
    shapes = itertools.product((1, 65, 257), (1, 7, 193, 2100), (1, 33, 64, 130), DTYPES)
    for n, (rows, items, hidden, dtype) in enumerate(shapes):
        h, table, targets, log_q = make_cross_entropy(rows, items, hidden, dtype, n)
        inputs = [h.requires_grad_(), table.requires_grad_()]
        loss = speeder_kernels.item_cross_entropy(
            *inputs, targets, scale=0.3, log_q=log_q if n % 2 else None, backend="cpu"
        )
        naive.gradients(loss, inputs)
    return n + 1


def topk_items() -> int:
    shapes = itertools.product((1, 6, 65, 257), (1, 7, 1100), (1, 33, 64), DTYPES)
    for n, (rows, items, hidden, dtype) in enumerate(shapes):
        h, table, *_ = make_cross_entropy(rows, items, hidden, dtype, n)
        indptr = (
            torch.arange(rows + 1).clamp(max=2) if items > 1 else torch.zeros(rows + 1, dtype=torch.int64)
        )
        excluded = torch.zeros(int(indptr[-1]), dtype=torch.int64)
        k = max(1, min(items - 1, 20))
        speeder_kernels.topk_items(h, table, k, exclude_indptr=indptr, exclude_items=excluded, backend="cpu")
    return n + 1


SWEEPS = {
    sweep.__name__: sweep
    for sweep in (spae_attention, pack_tokens, compress_items, item_cross_entropy, topk_items)
}


def main() -> None:
    wanted = sys.argv[1:] or speeder_kernels.backends()["cpu"].ops
    torch.set_num_threads(2)
    for op in wanted:
        print(_host.instruction_set(), op, SWEEPS[op](), "cases", flush=True)


if __name__ == "__main__":
    main()
