"""From final states to logits and losses: items by a dot product with their tokens, text by the backbone's head."""

from __future__ import annotations

import torch
from scipy.sparse import csr_array
from torch.nn import functional as F

from speeder.model.item_store import ItemRows, ItemStore, scoring_vectors
from speeder.model.mrc import PIECE
from speeder.model.negatives import Candidates, candidate_cross_entropy
from speeder.model.packing import SequenceLayout, last_positions
from speeder.model.queries import Queries, add_sparse
from speeder.model.sequences import IGNORED
from speeder_kernels import item_cross_entropy


def next_labels(labels: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """`(B, S)` labels, moved from their own token to the token before it, which predicts them; -100 at the end of each
    row or packed sequence."""
    moved = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return moved if cu_seqlens is None else moved.index_fill(1, last_positions(cu_seqlens), IGNORED)


class ScoringMixin:
    """Logits and losses of [`SpeederForCausalLM`]."""

    def item_queries(self, hidden: torch.Tensor) -> torch.Tensor:
        """Queries of states, `(N, H)` float32: their dot products with `item_vectors` are the item logits.

        Args:
            hidden: `(N, H)` final states; with the history look-up `(N, 2 H)`, see `_decode`.
        """
        width = self.config.hidden_size
        queries = self.item_head(self.dropout(hidden[..., :width]))
        scale = self.logit_scale.exp() / width
        if self.config.history_lookup:
            # text tokens of a long prompt share the weights: the mean may be small, and is no less certain
            queries = queries + F.rms_norm(hidden[..., width:].float(), (width,), eps=1e-12)
        return F.rms_norm(queries.float(), (width,), eps=1e-6) * scale

    def item_vectors(self, item_table: torch.Tensor) -> torch.Tensor:
        """`(I, K, H)` item tokens to `(I, H)` scoring vectors, in their dtype: the token itself, or the RMS-normalised
        mean of several."""
        return scoring_vectors(item_table)

    def item_logits(
        self, queries: Queries | torch.Tensor, item_table: torch.Tensor | ItemStore
    ) -> torch.Tensor:
        """Queries, or `(N, H)` dense ones, to `(N, I)` float32 logits of all items, computed for a part of the items at
        a time."""
        queries, added = (queries.dense, queries.added) if isinstance(queries, Queries) else (queries, None)
        if isinstance(item_table, torch.Tensor):
            if len(item_table) != self.config.num_items:
                raise ValueError(
                    f"item_table: expected {self.config.num_items} items, as the catalogue has, got {len(item_table)}"
                )
            parts = self.item_vectors(item_table).split(PIECE)
        else:
            parts = (vectors.to(queries.device) for _, vectors in item_table.vectors())
        logits = queries.new_empty(*queries.shape[:-1], self.config.num_items, dtype=torch.float32)
        start = 0
        for vectors in parts:
            logits[..., start : start + len(vectors)] = queries @ vectors.float().T
            start += len(vectors)
        return add_sparse(logits, added)

    def _text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.backbone.get_output_embeddings()(hidden[..., : self.config.hidden_size]).float()
        softcap = getattr(self.config.text_config, "final_logit_softcapping", None)
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    def _logits(
        self,
        hidden: torch.Tensor,
        item_table: torch.Tensor | ItemStore | None,
        vocabulary: str,
        added: csr_array | None = None,
    ) -> torch.Tensor:
        """`(B, S, H)` states, `(B, S, 2 H)` with the history look-up, to `(B, S, V + I)` float32; `added`
        `(B * S, I)` is what the item pairs add."""
        shape = hidden.shape[:-1]
        if vocabulary == "items":
            text = hidden.new_full((*shape, self.config.text_vocab_size), -torch.inf, dtype=torch.float32)
        else:
            text = self._text_logits(hidden)
        if self.config.num_items == 0:
            return text
        if vocabulary == "text":
            items = text.new_full((*shape, self.config.num_items), -torch.inf)
        else:
            queries = Queries(self.item_queries(hidden.flatten(0, 1)), added)
            items = self.item_logits(queries, item_table).unflatten(0, shape)
        return torch.cat([text, items], dim=-1)

    def _loss(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        layout: SequenceLayout,
        item_table: torch.Tensor | ItemRows | ItemStore | None,
        num_items_in_batch: torch.Tensor | int | None,
        candidates: Candidates | None = None,
        added: csr_array | None = None,
    ) -> torch.Tensor:
        """Cross-entropy of items among items and of text among text, plus SPAE's position proxy task.

        Args:
            hidden: `(B, S, H)` states, `(B, S, 2 H)` with the history look-up.
            targets: `(B, S)` the target of each state, see `next_labels`.
            item_table: item tokens; with `candidates`, only those of the items that are needed.
            candidates: if given, item targets are compared with these instead of the whole catalogue.
            added: `(B * S, I)`, what the item pairs add to the logits; in training None.
        """
        states, targets = hidden.flatten(0, 1), targets.flatten()
        text = self.config.text_vocab_size
        asked = targets >= 0
        is_item, is_text = asked & (targets >= text), asked & (targets < text)
        here = asked.sum()
        count = (
            here if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=hidden.device)
        )
        count = count.clamp(min=1)
        total = states[:0].float().sum()  # 0 with gradients, also without any target
        if is_item.any():
            total = (
                total
                + self._item_losses(
                    states[is_item],
                    targets[is_item] - text,
                    item_table,
                    candidates,
                    None if added is None else added[is_item.nonzero().flatten().cpu().numpy()],
                ).sum()
            )
        if is_text.any():
            total = total + F.cross_entropy(
                self._text_logits(states[is_text]), targets[is_text], reduction="sum"
            )
        loss = total / count
        if self.training and self.config.position_proxy_weight > 0:
            share = here / count  # 1 but for accumulated gradients
            loss = loss + share * self.config.position_proxy_weight * self._proxy_loss(hidden, layout)
        return loss

    def _item_losses(
        self,
        states: torch.Tensor,
        targets: torch.Tensor,
        item_table: torch.Tensor | ItemRows | ItemStore,
        candidates: Candidates | None,
        added: csr_array | None = None,
    ) -> torch.Tensor:
        """`(N, H)` states and their `(N,)` target items to `(N,)` losses."""
        queries = self.item_queries(states)
        if candidates is None and not isinstance(item_table, torch.Tensor):
            raise ValueError("labels: expected none while items are read from a store, see use_item_store")
        if added is not None:
            return F.cross_entropy(
                self.item_logits(Queries(queries, added), item_table), targets, reduction="none"
            )
        device, dtype = queries.device.type, torch.float32
        if torch.is_autocast_enabled(device):  # as the backbone's own head would be computed
            dtype = torch.get_autocast_dtype(device)
        queries = queries.to(dtype)
        if candidates is None:
            return item_cross_entropy(queries, self.item_vectors(item_table).to(dtype), targets, scale=1.0)
        vectors = self.item_vectors(item_table.tokens).to(dtype)
        places = item_table.places(candidates.items)
        return candidate_cross_entropy(queries, vectors, item_table.places(targets), places, candidates.log_q)

    def _proxy_loss(self, hidden: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        flat = hidden[..., : self.config.hidden_size].flatten(0, 1)
        if layout.query_index is not None and len(flat) != len(layout.rank_q):
            flat = flat[layout.query_index]
        lengths = layout.cu_seqlens_q.diff().long()
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=flat.device), lengths)
        at_item = layout.rank_q >= 0
        if not at_item.any():
            return flat.new_zeros((), dtype=torch.float32)
        return self.spae.proxy_loss(flat[at_item], layout.rank_q[at_item], sequence[at_item])
