"""SPAE, Sequential Position Awareness Enhancement: attention with the items' positions in a long history.

The paper names relative and absolute position and a proxy task; their form here is this project's own reading.
*Absolute*: a learned prompt per rank, added to the item's token, and a key-side bias per head and rank.
*Relative*: a bias per layer, head and log-spaced bucket of the distance in items between query and key.
*Position proxy task*: an auxiliary loss; the final states predict an item's rank bucket, and which of two items came
first. Everything starts at zero, so a new model reads text exactly as its backbone does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

from speeder.model.config import ATTENTION_NAME, SpeederConfig
from speeder.model.packing import SequenceLayout, packed_rows
from speeder_kernels import spae_attention


def log_buckets(values: torch.Tensor, num_buckets: int, max_value: int) -> torch.Tensor:
    """Log-spaced buckets: one each for the first half of the buckets, then growing geometrically to `max_value`.

    The spacing is that of T5's relative position buckets (arXiv 1910.10683), one-sided.

    Args:
        values: any shape, integers >= 0.

    Returns:
        int64 of the same shape, in `0 .. num_buckets - 1`.
    """
    exact = min(num_buckets // 2, max_value)
    span = max(math.log(max(max_value, exact + 1) / exact), 1e-9)
    far = torch.log(values.clamp(min=1).double() / exact) / span * (num_buckets - exact)
    far = (exact + far.floor().long()).clamp(max=num_buckets - 1)
    return torch.where(values < exact, values.long(), far)


@dataclass
class SpaeContext:
    """What one forward pass gives to every attention layer, through the backbone's keyword arguments."""

    layout: SequenceLayout
    relative_bias: torch.Tensor | None  # (L, Hq, R) float32, one entry per rank distance
    absolute_bias: torch.Tensor | None  # (L, Hq, A) float32, one entry per key rank


class SPAE(nn.Module):
    """The learned tables of SPAE, all zero at the start, and the heads of its position proxy task."""

    def __init__(self, config: SpeederConfig):
        super().__init__()
        text = config.text_config
        layers, heads = text.num_hidden_layers, text.num_attention_heads
        self.num_buckets, self.max_rank = config.num_distance_buckets, config.max_rank
        self.position_prompts = self._table(config.position_prompts, config.max_rank, config.hidden_size)
        self.absolute_bias = self._table(config.absolute_bias, layers, heads, config.max_rank)
        self.relative_bias = self._table(config.relative_bias, layers, heads, config.num_distance_buckets)
        self.max_distance = config.max_distance
        if config.position_proxy_weight > 0:
            self.rank_head = nn.Linear(config.hidden_size, config.num_distance_buckets)
            self.order_head = nn.Linear(config.hidden_size, 1, bias=False)

    @staticmethod
    def _table(wanted: bool, *shape: int) -> nn.Parameter | None:
        return nn.Parameter(torch.zeros(*shape)) if wanted else None

    def context(self, layout: SequenceLayout) -> SpaeContext:
        """Expand the bucketed relative bias to one entry per distance, outside the kernel."""
        relative, absolute = self.relative_bias, self.absolute_bias
        if relative is not None:
            distances = torch.arange(self.max_distance, device=relative.device)
            relative = relative.float()[..., log_buckets(distances, self.num_buckets, self.max_distance)]
        return SpaeContext(layout, relative, None if absolute is None else absolute.float())

    def proxy_heads(self) -> list[nn.Linear]:
        """The heads of the position proxy task; empty if it is off."""
        return [self.rank_head, self.order_head] if hasattr(self, "rank_head") else []

    def proxy_loss(self, hidden: torch.Tensor, ranks: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
        """The position proxy task: rank bucket of each item, and which of two items of a history came first.

        Args:
            hidden: `(N, H)` final states at item positions.
            ranks: `(N,)` their ranks.
            sequence: `(N,)` the number of each one's sequence; equal numbers are adjacent.

        Returns:
            scalar float32: the mean of the two cross-entropies (only the first if there is no pair).
        """
        target = log_buckets(ranks, self.num_buckets, self.max_rank)
        rank_loss = F.cross_entropy(self.rank_head(hidden).float(), target)
        # a random partner in the same sequence for each item
        first, size = torch.unique_consecutive(sequence, return_inverse=True, return_counts=True)[1:]
        start = (size.cumsum(0) - size)[first]
        draw = torch.rand(len(ranks), device=ranks.device)
        partner = start + (draw * size[first]).long().clamp(max=size[first] - 1)
        differ = ranks != ranks[partner]
        if not differ.any():
            return rank_loss
        when = self.order_head(hidden).squeeze(-1).float()  # a learned "time" of each state
        later = (ranks > ranks[partner]).float()
        order_loss = F.binary_cross_entropy_with_logits((when - when[partner])[differ], later[differ])
        return 0.5 * (rank_loss + order_loss)


def spae_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    spae: SpaeContext | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """SPAE's attention for transformers' attention interface, called instead of `sdpa`.

    Args:
        query: `(B, Hq, Sq, D)`; key, value: `(B, Hkv, Sk, D)`, the cache's part first.
        attention_mask: None; masking follows from `spae.layout`.
        spae: the pass's context, which the backbone passes on.

    Returns:
        `(B, Sq, Hq, D)` (zeros at padding), and None for the attention weights, which are never formed.

    Raises:
        ValueError: there is no context, or the layer needs something that SPAE does not compute.
    """
    if spae is None:
        raise ValueError("spae: expected a SpaeContext from SpeederForCausalLM, got None")
    if attention_mask is not None:
        raise ValueError(
            "attention_mask: expected a 2-D mask (compiled static caches are not supported), got a 4-D mask"
        )
    layout = spae.layout
    if sliding_window is not None and layout.max_seqlen_k > sliding_window:
        raise ValueError(
            f"sliding_window: expected at least the longest sequence, {layout.max_seqlen_k}, got {sliding_window}"
        )
    if softcap is not None or dropout > 0:
        raise ValueError(f"softcap, dropout: expected neither in SPAE's attention, got {softcap}, {dropout}")
    if layout.key_width is not None and key.shape[2] != layout.key_width:
        if key.shape[2] < layout.key_width:  # a sliding-window cache has dropped keys
            raise ValueError(
                f"key: expected all {layout.key_width} positions in the cache, got {key.shape[2]}"
            )
        key, value = (
            key[:, :, : layout.key_width],
            value[:, :, : layout.key_width],
        )  # a static cache's free room
    batch, heads, new, width = query.shape
    layer = module.layer_idx
    out = spae_attention(
        # under autocast the rotary embedding leaves q and k in float32 beside a bfloat16 v
        packed_rows(query.to(value.dtype), layout.query_index),
        packed_rows(key.to(value.dtype), layout.key_index),
        packed_rows(value, layout.key_index),
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        layout.rank_q,
        layout.rank_k,
        None if spae.relative_bias is None else spae.relative_bias[layer],
        None if spae.absolute_bias is None else spae.absolute_bias[layer],
        softmax_scale=scaling,
        causal=True,
    )
    if layout.query_index is not None and len(out) != batch * new:
        out = out.new_zeros(batch * new, heads, width).index_copy(0, layout.query_index, out)
    return out.view(batch, new, heads, width), None


AttentionInterface.register(ATTENTION_NAME, spae_attention_forward)
