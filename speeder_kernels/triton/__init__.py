"""The ops in Triton, each imported when it first runs on this backend.

`attention/` is spae_attention; `items/` are the four ops on items, a file each. They share the table of tiles and the
launch (`tiles.py`) and the sum of parts (`sum_parts.py`).

Inside these files `import triton` is the real Triton: this package is only ever `speeder_kernels.triton`.
"""

# Where the functions of an op are: the module, below this package, that launches its kernels.
MODULES = {
    "spae_attention": "attention.ops",
    "pack_tokens": "items.pack_tokens",
    "compress_items": "items.compress_items",
    "item_cross_entropy": "items.item_cross_entropy",
    "topk_items": "items.topk_items",
}
