"""The history look-up: what the history's items themselves say of the next one, beside what the backbone makes of them.

    look-up(query) = sum over the history's items j of w(rank distance to j) * token_j

An item is then scored by its likeness to the items read, the newest counting most, as item neighbours are. It is one
more layer of attention, with SPAE's distance weights in place of queries and keys: so it works over packed, padded and
cached sequences, and its values are kept in the same caches, one layer after the backbone's last.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from speeder.model.config import SpeederConfig
from speeder.model.packing import SequenceLayout, packed_rows
from speeder.model.spae import log_buckets
from speeder_kernels import spae_attention

START_DECAY = 0.75  # of an item's weight for each later item, before training
_FARTHEST = -8.0  # least logarithm of a weight at the start: a weight that is 0 could not be learned


class HistoryLookup(nn.Module):
    """`log_weights (num_distance_buckets,)`: the logarithms of weights by bucket of rank distance, as SPAE's tables."""

    def __init__(self, config: SpeederConfig):
        super().__init__()
        self.num_buckets, self.max_distance = config.num_distance_buckets, config.max_distance
        self.layer = config.text_config.num_hidden_layers  # in caches
        self.log_weights = nn.Parameter(self.start())

    def start(self) -> torch.Tensor:
        """Weights that fall by `START_DECAY` with each item."""
        buckets = self._buckets("cpu")
        nearest = torch.searchsorted(buckets, torch.arange(self.num_buckets)).clamp(max=self.max_distance - 1)
        return (nearest * math.log(START_DECAY)).clamp(min=_FARTHEST)

    def _buckets(self, device: torch.device | str) -> torch.Tensor:
        distances = torch.arange(self.max_distance, device=device)
        return log_buckets(distances, self.num_buckets, self.max_distance)

    def forward(
        self,
        vectors: torch.Tensor,
        layout: SequenceLayout,
        cache: Cache | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Look up what each new token's history says.

        Args:
            vectors: `(B, S, H)` scoring vectors of the new tokens' items, zeros at text and padding; or `(1, T, H)`.
            layout: of the pass, as the backbone's layers get it.
            cache: holds the vectors of earlier tokens.
            rows: `(n,)` packed places of the tokens that are asked for; None: all.

        Returns:
            `(Tq, H)`, or `(n, H)`: means of vectors, by weights that add up to 1 over the tokens up to this one.
        """
        values = vectors[:, None]
        if cache is not None:
            make_room(cache, self.layer)
            values = cache.update(values[..., :1], values, self.layer)[1]
            if layout.key_width is not None:
                values = values[:, :, : layout.key_width]  # a static cache's free room
        values = packed_rows(values, layout.key_index).to(vectors.dtype)[:, 0]
        width = math.gcd(vectors.shape[-1], 64)
        values = values.unflatten(-1, (-1, width))  # as so many heads with the same weights
        if rows is not None:
            starts = torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device)
            layout = replace(layout, cu_seqlens_q=starts, max_seqlen_q=1, rank_q=layout.rank_q[rows])
        heads = values.shape[1]
        table = self.log_weights.float()[self._buckets(self.log_weights.device)]
        found = spae_attention(
            values.new_zeros(len(layout.rank_q), heads, width),
            torch.zeros_like(values),
            values,
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
            layout.rank_q,
            layout.rank_k,
            table.expand(heads, -1).contiguous(),
            None,
            causal=True,
        )
        return found.flatten(1)


def make_room(cache: Cache, layer: int) -> None:
    """Add a layer for the vectors to a cache that has only the backbone's.

    Raises:
        ValueError: a cache of another kind than transformers' dynamic and static ones.
    """
    if len(cache.layers) != layer or cache.layer_class_to_replicate is not None:
        return
    if isinstance(cache, DynamicCache):
        cache.layers.append(DynamicLayer())
    elif isinstance(cache, StaticCache):
        room = max(layer.max_cache_len for layer in cache.layers)  # layers with a sliding window have less
        cache.layers.append(StaticLayer(max_cache_len=room))
    else:
        raise ValueError(f"cache: expected a DynamicCache or a StaticCache, got {type(cache).__name__}")
