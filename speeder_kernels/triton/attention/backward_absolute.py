"""The gradient of the absolute table: sums over a key's queries come from `keys_kernel`; here they are summed by rank.

Shape letters: K keys of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from speeder_kernels.triton.attention.partial_tables import clear_row


@triton.jit(do_not_specialize=["tokens", "heads", "positions", "slots"])
def absolute_kernel(partials, column_sums, rank_k, tokens, heads, positions, slots, BLOCK_K: tl.constexpr):
    """partials (slots, Hq, A): column_sums (Hq, Tk) summed by the keys' ranks, each slot over every slots-th block."""
    head = tl.program_id(0) % heads
    slot = tl.program_id(0) // heads
    row = partials + tl.program_id(0).to(tl.int64) * positions
    clear_row(row, positions)
    place_K = tl.arange(0, BLOCK_K)
    for block in range(slot, tl.cdiv(tokens, BLOCK_K), slots):
        key_K = block * BLOCK_K + place_K
        rank_K = tl.load(rank_k + key_K, mask=key_K < tokens, other=-1)
        sums_K = tl.load(column_sums + head.to(tl.int64) * tokens + key_K, mask=key_K < tokens, other=0.0)
        position_K = tl.minimum(rank_K, positions - 1)
        # Keys of one position add up in the first of them, which alone writes.
        same_KK = position_K[:, None] == position_K[None, :]
        total_K = tl.sum(tl.where(same_KK, sums_K[None, :], 0.0), axis=1)
        is_first_K = tl.sum((same_KK & (place_K[None, :] < place_K[:, None])).to(tl.int32), axis=1) == 0
        mask_K = is_first_K & (rank_K >= 0)
        tl.store(row + position_K, tl.load(row + position_K, mask=mask_K, other=0.0) + total_K, mask=mask_K)
        tl.debug_barrier()
