"""SpeederForCausalLM: a Hugging Face causal language model whose vocabulary includes a catalogue of items.

Ids `0 .. V-1` are the backbone's text; id `V + i` is item `i`. MRC embeds an item id, and a dot product with the same
item token scores it. So `input_ids`, `labels`, `generate` and beam search work as in any causal LM.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from threading import get_ident

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Cache, DynamicCache
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from speeder.model.config import ATTENTION_NAME, CACHE_NAME, SpeederConfig
from speeder.model.content import Kept
from speeder.model.embeddings import embedding_scale, read_directly
from speeder.model.experts import LinearExpert
from speeder.model.generation import ItemGenerationMixin
from speeder.model.heads import ScoringMixin, next_labels
from speeder.model.history import HistoryLookup
from speeder.model.item_store import ItemRows, ItemStore, scoring_vectors
from speeder.model.item_tokens import ItemTokensMixin
from speeder.model.kv_cache import SharedPrefix
from speeder.model.last_layer import last_layer_computes
from speeder.model.loading import (
    from_backbone,
)
from speeder.model.lora import add_lora, merge_lora
from speeder.model.mrc import MRC
from speeder.model.negatives import Candidates, NegativeSampler
from speeder.model.offload import check_own_parts
from speeder.model.packing import (
    SequenceLayout,
    check_cu_seqlens,
    check_integers,
    item_ranks,
    item_slots,
    last_positions,
    packed_layout,
    padded_layout,
)
from speeder.model.pair_scores import PairScoresMixin
from speeder.model.recommend import RecommenderMixin
from speeder.model.saving import SavingModel
from speeder.model.sequences import IGNORED
from speeder.model.spae import SPAE
from speeder_kernels import pack_tokens

VOCABULARIES = ("all", "items", "text")


class SpeederForCausalLM(
    ItemTokensMixin, PairScoresMixin, RecommenderMixin, ScoringMixin, SavingModel, ItemGenerationMixin
):
    """A decoder language model that reads and predicts catalogue items as single tokens.

    Make one from a pretrained backbone with [`from_backbone`]; load a saved one with `from_pretrained`.
    """

    config_class = SpeederConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False
    _keep_in_fp32_modules_strict = ("whitening",)
    _keys_to_ignore_on_load_missing = (
        r"mrc\.item_trained",
    )  # version 0.1.0 had none: all rows count as trained

    def __init__(self, config: SpeederConfig):
        super().__init__(config)
        self.backbone = AutoModelForCausalLM.from_config(
            config.text_config, attn_implementation=ATTENTION_NAME
        )
        if config.lora is not None:
            self.add_lora(config.lora)
        self.mrc = MRC(config)
        self.spae = SPAE(config)
        self.history = HistoryLookup(config) if config.history_lookup else None
        self.item_head = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.initial_logit_scale)))
        self.dropout = nn.Dropout(config.dropout)
        self.negatives = NegativeSampler(config)
        self.item_store: ItemStore | None = None
        self._checked_store: tuple[ItemStore, Kept[None]] | None = None
        self._kept_tokens: Kept[tuple[torch.Tensor, torch.Tensor, bytes | None]] = Kept()
        self._kept_prefix: Kept[SharedPrefix] = Kept()
        self.post_init()
        # tied weights are stored once; saying so keeps `Trainer` from warning of them as missing
        self._keys_to_ignore_on_save = sorted(self.all_tied_weights_keys) or None

    from_backbone = classmethod(from_backbone)
    add_lora = add_lora
    merge_lora = merge_lora

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise weights that a checkpoint lacks: SPAE's tables to zero, the item head to the identity, gates to
        equal."""
        if isinstance(module, SPAE):
            for table in (module.position_prompts, module.absolute_bias, module.relative_bias):
                if table is not None:
                    init.zeros_(table)
            for head in module.proxy_heads():
                init.normal_(head.weight, std=0.02)
                if head.bias is not None:
                    init.zeros_(head.bias)
        elif isinstance(module, MRC):
            init.ones_(module.norm_weight)
            init.zeros_(module.gate_offset)
            for gate in module.gates.values():
                init.zeros_(gate.weight)
                init.zeros_(gate.bias)
            for expert in module.experts.values():
                for linear in (expert.up, expert.down):
                    init.xavier_normal_(linear.weight)
                    init.zeros_(linear.bias)
                if isinstance(expert, LinearExpert):
                    init.orthogonal_(expert.direct.weight)
                    init.zeros_(expert.down.weight)
            if self.config.words:
                init.normal_(module.words.vectors.weight, std=module.words.vectors.embedding_dim**-0.5)
                init.orthogonal_(module.words.direct.weight)
                init.zeros_(module.word_gate)
            if hasattr(module, "item_embedding"):
                init.ones_(module.item_trained)
                init.normal_(module.item_embedding.weight, std=0.02)
                init.zeros_(module.item_gate)
        elif isinstance(module, HistoryLookup):
            init.copy_(module.log_weights, module.start())
        elif module is self:
            # with the look-up, a new model scores by likeness alone, and the backbone joins as it learns
            (init.zeros_ if self.config.history_lookup else init.eye_)(self.item_head.weight)
            init.constant_(self.logit_scale, math.log(self.config.initial_logit_scale))

    @property
    def device(self) -> torch.device:
        """The device that computes, also where weights of the backbone are offloaded."""
        return self.logit_scale.device

    def train(self, mode: bool = True) -> SpeederForCausalLM:
        """As in `nn.Module`; what was kept in the other mode is freed, and training uses no item store."""
        if mode != self.training:
            self.clear_cache()
        if mode:
            self.item_store = self._checked_store = None
        return super().train(mode)

    # ---- forward ------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        ranks: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        vocabulary: str = "all",
        num_items_in_batch: torch.Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: None = None,
        position_ids: None = None,
        cache: Cache | None = None,
        past_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Run the model.

        Args:
            input_ids: `(B, S)` ids of the extended vocabulary; `(1, T)` with `cu_seqlens`, for packed sequences.
            attention_mask: `(B, S)`, 0 at padding on either side; with a cache `(B, past + S)`.
            cache, past_key_values: the cache to continue: the first name since transformers 5.24, the second before.
                With a cache that is not empty, `ranks` are required.
            labels: `(B, S)`, shifted inside as in any causal LM, -100 at positions without a label. Item labels are
                scored against the items, text labels against the text. In training the loss is without the item pairs:
                what memorises the training items would starve what generalises. In evaluation it is the cross-entropy
                of the returned logits.
            ranks: `(B, past + S)` item ranks, -1 at text; by default items are counted from 0 in each row.
            cu_seqlens: `(N + 1,)` int32, starts of packed sequences and the end; not with a mask or a cache.
            use_cache: return the cache; by default in evaluation without labels.
            logits_to_keep: score only the last `logits_to_keep` positions (0: all).
            vocabulary: `"all"`, or only `"items"` or `"text"`; the other part is -inf and not computed.
            past_ids: `(B, past)` ids of the tokens in the cache. Required beside a cache that is not empty where
                `config.pair_weight` is not 0, as the item pairs of the whole history are looked up; else not read.
            num_items_in_batch: labels of the whole optimizer step, by which the loss is divided (`Trainer`).
            output_attentions: not supported: attention weights are never formed.
            inputs_embeds, position_ids: not supported: items are in the ids, and positions follow from the mask.

        Returns:
            `logits` `(B, S, V + I)` (None in training with labels, to save memory), `loss` float32, `cache`
            (`past_key_values` before transformers 5.24), and with `output_hidden_states` the final states as
            `hidden_states[-1]`.

        Raises:
            TypeError: ids, labels, ranks or cu_seqlens are not integers.
            ValueError: shapes do not fit, an id is out of range, or a combination is not supported.
        """
        if vocabulary not in VOCABULARIES:
            raise ValueError(f"vocabulary: expected one of {', '.join(VOCABULARIES)}, got {vocabulary!r}")
        for name, value in (("inputs_embeds", inputs_embeds), ("position_ids", position_ids)):
            if value is not None:
                raise ValueError(f"{name}: expected None (see forward's documentation), got a tensor")
        if output_attentions:
            raise ValueError("output_attentions: expected False (SPAE forms no attention weights), got True")
        if cache is not None and past_key_values is not None:
            raise ValueError("cache: expected one of cache and past_key_values, got both")
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None and cu_seqlens is None
        self._check_arguments(input_ids, cu_seqlens, attention_mask, cache)
        targets = None
        if labels is not None:
            check_integers("labels", labels)
            if labels.shape != input_ids.shape:
                raise ValueError(f"labels: expected {tuple(input_ids.shape)}, got {tuple(labels.shape)}")
            labels = labels.long()
            if labels.device.type == "cpu":
                wrong = ((labels < 0) & (labels != IGNORED)) | (labels >= self.config.vocab_size)
                if bool(wrong.any()):
                    raise ValueError(
                        f"labels: expected ids in 0..{self.config.vocab_size - 1}, or {IGNORED} where there is none, "
                        f"got {int(labels[wrong][0])}"
                    )
            if cu_seqlens is not None:
                check_cu_seqlens(cu_seqlens, input_ids.shape[-1])
            targets = next_labels(labels, cu_seqlens)
            if self.training and cu_seqlens is not None and not output_hidden_states:
                input_ids, targets, ranks, cu_seqlens = without_last(input_ids, targets, ranks, cu_seqlens)
        candidates = None
        if self.training and targets is not None and self.config.negatives != "full":
            item_table, candidates = self._read_rows(input_ids, targets)
        else:
            needed = self._needs_items(input_ids, targets, vocabulary)
            item_table = self.item_table() if needed else None
        with_logits = labels is None or not self.training
        asked = item_table is not None and (vocabulary != "text" or targets is not None)
        look_up = self.config.pair_weight != 0 and with_logits and asked
        if look_up:
            past_ids = self._checked_past_ids(past_ids, len(input_ids), cache)
        hidden, layout, cache = self._decode(
            input_ids, item_table, attention_mask, cache, ranks, cu_seqlens, use_cache, **kwargs
        )
        added = None
        if look_up:
            added = self.pair_scores_at(input_ids, attention_mask, cu_seqlens, past_ids)
        loss = None
        if targets is not None:
            loss = self._loss(hidden, targets, layout, item_table, num_items_in_batch, candidates, added)
        logits = None
        if with_logits:
            kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
            if added is not None and kept.shape[1] < hidden.shape[1]:
                places = torch.arange(hidden.shape[0] * hidden.shape[1]).view(hidden.shape[:2])
                added = added[places[:, -logits_to_keep:].flatten().numpy()]
            logits = self._logits(kept, item_table, vocabulary, added)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=(hidden[..., : self.config.hidden_size],) if output_hidden_states else None,
            **{CACHE_NAME: cache},
        )
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def last_states(
        self, input_ids: torch.Tensor, ranks: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        """The final states of packed sequences' last tokens, which predict the next item: `(B, H)`, with the history
        look-up `(B, 2 H)`."""
        self._check_arguments(input_ids, cu_seqlens, None, None)
        item_table = self.item_table() if self._needs_items(input_ids, None, "items") else None
        last = cu_seqlens[1:].long() - 1
        return self._decode(input_ids, item_table, ranks=ranks, cu_seqlens=cu_seqlens, rows=last)[0][0]

    def _decode(
        self,
        input_ids: torch.Tensor,
        item_table: torch.Tensor | ItemRows | ItemStore | None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        ranks: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        use_cache: bool = False,
        rows: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, SequenceLayout, Cache | None]:
        """Embed and run the backbone's decoder: `(B, S, H)` states (zeros at padding), the layout, the cache.

        With `config.history_lookup` each state is followed by what its history says, `(B, S, 2 H)`.

        Args:
            rows: `(n,)` places of a packed row, of which alone states are returned, `(1, n, H)`; without a cache.
        """
        past = cache.get_seq_length() if cache is not None else 0
        layout = self._layout(input_ids, attention_mask, ranks, cu_seqlens, past)
        batch, new = input_ids.shape
        ids = input_ids.flatten()
        if layout.query_index is not None:
            ids = ids[layout.query_index]
        item_table = self._read_items(ids, item_table)
        embeddings = self.dropout(self._embed(ids, layout, item_table, (batch, new)))
        use_cache = use_cache or cache is not None
        if use_cache:
            if cache is None:
                cache = DynamicCache(config=self.config.text_config)
            grid = self._unpack(embeddings, layout, batch, new)
            position_ids = self._unpack(layout.position_ids, layout, batch, new)
        else:  # no padding is ever computed: the batch runs as one packed row
            grid, position_ids = embeddings[None], layout.position_ids[None]
        decoder = self.backbone.get_decoder()
        with nullcontext() if rows is None else last_layer_computes(decoder, rows):
            decoded = decoder(
                inputs_embeds=grid,
                position_ids=position_ids,
                **{CACHE_NAME: cache},
                use_cache=use_cache,
                spae=self.spae.context(layout if use_cache else self._as_row(layout)),
                **kwargs,
            ).last_hidden_state
        if self.history is not None:
            vectors = self._history_vectors(ids, item_table)
            if use_cache:
                looked_up = self.history(self._unpack(vectors, layout, batch, new), layout, cache)
                looked_up = self._unpack(looked_up, layout, batch, new)
            else:
                looked_up = self.history(vectors[None], self._as_row(layout), rows=rows)[None]
            decoded = torch.cat([decoded, looked_up.to(decoded.dtype)], dim=-1)
        if not use_cache and rows is None:
            decoded = self._unpack(decoded[0], layout, batch, new)
        return decoded, layout, cache

    def _read_items(
        self, ids: torch.Tensor, item_table: torch.Tensor | ItemRows | ItemStore | None
    ) -> torch.Tensor | ItemRows | None:
        """Check a pass's `(T,)` ids, and read the tokens of their items from a store, for all that the pass does with
        them.

        Raises:
            ValueError: an id is out of range.
        """
        text = self.config.text_vocab_size
        if int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size:
            raise ValueError(
                f"input_ids: expected ids in 0..{self.config.vocab_size - 1} ({text} text, "
                f"{self.config.num_items} items), got {int(ids.min())}..{int(ids.max())}"
            )
        if item_table is None or isinstance(item_table, torch.Tensor | ItemRows):
            return item_table
        return item_table.rows((ids - text)[ids >= text])

    def _history_vectors(self, ids: torch.Tensor, item_table: torch.Tensor | ItemRows | None) -> torch.Tensor:
        """The scoring vectors of `(T,)` tokens' items, `(T, H)`; zeros at text."""
        is_item = ids >= self.config.text_vocab_size
        if item_table is None:
            return self.logit_scale.new_zeros(len(ids), self.config.hidden_size)
        read = (ids - self.config.text_vocab_size)[is_item]
        if isinstance(item_table, ItemRows):
            read, item_table = item_table.places(read), item_table.tokens
        tokens = F.embedding(read, item_table.flatten(1)).unflatten(1, item_table.shape[1:])
        vectors = scoring_vectors(tokens)
        return vectors.new_zeros(len(ids), vectors.shape[1]).masked_scatter(is_item[:, None], vectors)

    def _check_arguments(self, input_ids, cu_seqlens, attention_mask, cache) -> None:
        check_own_parts(self)
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(
                f"input_ids: expected (B, S) with at least one token, got {tuple(input_ids.shape)}"
            )
        check_integers("input_ids", input_ids)
        if cu_seqlens is not None and (attention_mask is not None or cache is not None):
            raise ValueError("cu_seqlens: packed sequences take neither attention_mask nor cache")
        if cu_seqlens is not None and len(input_ids) != 1:
            raise ValueError(f"input_ids: expected (1, T) with cu_seqlens, got {tuple(input_ids.shape)}")
        if self.backbone.config._attn_implementation != ATTENTION_NAME:
            raise ValueError(
                f"attn_implementation: expected {ATTENTION_NAME!r} in the backbone (SPAE is its attention), "
                f"got {self.backbone.config._attn_implementation!r}"
            )

    def _layout(self, input_ids, attention_mask, ranks, cu_seqlens, past: int) -> SequenceLayout:
        batch, new = input_ids.shape
        item_mask = input_ids >= self.config.text_vocab_size
        if cu_seqlens is not None:
            ranks = None if ranks is None else ranks.flatten()
            return packed_layout(cu_seqlens, ranks, item_mask[0], self.config.tokens_per_item)
        expected = (batch, past + new)
        if attention_mask is None:
            attention_mask = torch.ones(expected, dtype=torch.bool, device=input_ids.device)
        elif tuple(attention_mask.shape) != expected:
            raise ValueError(f"attention_mask: expected {expected}, got {tuple(attention_mask.shape)}")
        mask = attention_mask.bool()
        if ranks is None:
            if past:
                raise ValueError("ranks: expected (B, past + S) beside a cache that is not empty, got None")
            ranks = item_ranks(item_mask & mask, self.config.tokens_per_item)
        elif tuple(ranks.shape) != expected:
            raise ValueError(f"ranks: expected {expected}, got {tuple(ranks.shape)}")
        return padded_layout(mask, ranks, new)

    @staticmethod
    def _as_row(layout: SequenceLayout) -> SequenceLayout:
        """The layout of the same sequences without padding: one row of `Tq` tokens."""
        return replace(layout, query_index=None, key_index=None, key_width=None)

    @staticmethod
    def _unpack(packed: torch.Tensor, layout: SequenceLayout, batch: int, new: int) -> torch.Tensor:
        """`(Tq, ...) -> (B, S, ...)`, zeros at padding; for a packed row `(1, ...)`."""
        if layout.query_index is not None and len(packed) != batch * new:
            grid = packed.new_zeros(batch * new, *packed.shape[1:])
            packed = grid.index_copy(0, layout.query_index, packed)
        return packed.unflatten(0, (batch, -1))

    @staticmethod
    def _repack(grid: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        """`(B, S, ...) -> (Tq, ...)`: what `_unpack` spread out."""
        flat = grid.flatten(0, 1)
        return flat if layout.query_index is None else flat[layout.query_index]

    def _needs_items(self, ids: torch.Tensor, targets: torch.Tensor | None, vocabulary: str) -> bool:
        if self.config.num_items == 0:
            return False
        text = self.config.text_vocab_size
        if bool((ids >= text).any()) or (targets is not None and bool((targets >= text).any())):
            return True
        return vocabulary != "text" and not (targets is not None and self.training)

    def _read_rows(
        self, input_ids: torch.Tensor, targets: torch.Tensor
    ) -> tuple[ItemRows | None, Candidates | None]:
        """Compress the items that a batch reads, predicts or draws as negatives; also return the negatives."""
        text = self.config.text_vocab_size
        if self.config.num_items == 0:
            return None, None
        read, asked = input_ids[input_ids >= text] - text, targets[targets >= text] - text
        candidates = self.negatives.candidates(asked)
        if not len(asked):  # this process has no target
            candidates = None
        items = torch.cat([read, asked, *([] if candidates is None else [candidates.items])]).unique()
        return (ItemRows(items, self.mrc(items)[0]) if len(items) else None), candidates

    def _embed(
        self,
        ids: torch.Tensor,
        layout: SequenceLayout,
        item_table: torch.Tensor | ItemRows | None,
        shape: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """`(T,)` ids to `(T, H)` embeddings: text rows, or item tokens with their position prompt, in one pass.

        A plain embedding's rows are read by the kernel. Another module, such as one with an adapter, with weights that
        Accelerate loads, or with hooks, is called; its hooks see the embeddings of all tokens.

        Args:
            shape: `(B, S)` of the batch, which hooks see; by default one row.
        """
        words = self.backbone.get_input_embeddings()
        text = self.config.text_vocab_size
        item_mask = ids >= text
        word_ids = torch.where(item_mask, 0, ids)
        # Gemma's embedding modules multiply by a constant; item tokens are calibrated to the rows before it
        scale = embedding_scale(words)
        if read_directly(words):
            packed = self._pack_embeddings(words.weight, word_ids, ids, layout, item_table)
            if words.padding_idx is not None and words.weight.requires_grad:  # whose row gets no gradient
                packed = torch.where((ids == words.padding_idx)[:, None], packed.detach(), packed)
            return packed if scale is None else packed * scale.to(packed.dtype)
        shape = shape or (1, len(ids))

        thread = get_ident()

        def with_items(module: nn.Module, args: tuple, rows: torch.Tensor) -> torch.Tensor:
            if get_ident() != thread:  # another thread's pass
                return rows
            rows = self._repack(rows, layout)
            own_row = torch.arange(len(ids), device=ids.device)
            packed = self._pack_embeddings(rows, own_row, ids, layout, item_table)
            if scale is not None:
                packed = torch.where(item_mask[:, None], packed * scale.to(packed.dtype), rows)
            return self._unpack(packed, layout, *shape)

        handle = words.register_forward_hook(with_items, prepend=True)
        try:
            return self._repack(words(self._unpack(word_ids, layout, *shape)), layout)
        finally:
            handle.remove()

    def _pack_embeddings(
        self,
        table: torch.Tensor,
        rows_of_words: torch.Tensor,
        ids: torch.Tensor,
        layout: SequenceLayout,
        item_table: torch.Tensor | ItemRows | None,
    ) -> torch.Tensor:
        """`(T, H)` embeddings of `(T,)` ids, of which text is `table[rows_of_words]`."""
        text, item_mask = self.config.text_vocab_size, ids >= self.config.text_vocab_size
        k = self.config.tokens_per_item
        prompts = self.spae.position_prompts
        ranks = layout.rank_q
        if prompts is None:
            prompts, ranks = table.new_zeros(1, table.shape[1]), torch.full_like(ranks, -1)
        items = table.new_zeros(0, table.shape[1])
        read = (ids - text).clamp(min=0)
        if isinstance(item_table, ItemRows):
            read, item_table = item_table.places(read), item_table.tokens
        rows = torch.where(item_mask, read * k + item_slots(item_mask, layout.rank_q, k), -1)
        if item_table is not None and bool(item_mask.any()):
            tokens = item_table.flatten(0, 1)
            if len(ids) < len(
                tokens
            ):  # a few histories: scale only the items that they read, not the catalogue
                # in float32 for training, so that gradients of an item that is read often are summed in it
                tokens = F.embedding(rows.clamp(min=0), tokens.float() if tokens.requires_grad else tokens)
                rows = torch.where(item_mask, torch.arange(len(ids), device=ids.device), -1)
            items = (tokens * self.config.embedding_rms).to(table.dtype)
        return pack_tokens(
            rows_of_words,
            table,
            items,
            rows.int(),
            ranks.clamp(max=len(prompts) - 1),
            prompts.to(table.dtype),
        )

    @property
    def training_hash(self) -> str | None:
        """Hash of what the model was trained on (`data.fingerprints.training_hash`), for the leak check; None if
        unknown."""
        return self.config.training_hash


def without_last(
    input_ids: torch.Tensor, targets: torch.Tensor, ranks: torch.Tensor | None, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Packed sequences without their last tokens, which predict nothing and which no other token reads.

    A sequence of one token is not changed.

    Raises:
        ValueError: `ranks` has another length than the row.
    """
    if ranks is not None and ranks.numel() != input_ids.numel():
        raise ValueError(f"ranks: expected {tuple(input_ids.shape)}, got {tuple(ranks.shape)}")
    kept = torch.ones(input_ids.shape[1], dtype=torch.bool, device=input_ids.device)
    kept[last_positions(cu_seqlens, at_least=2)] = False
    dropped = (cu_seqlens.diff() >= 2).int()
    shorter = cu_seqlens - F.pad(dropped.cumsum(0), (1, 0)).to(cu_seqlens.dtype)
    ranks = None if ranks is None else ranks.flatten()[kept][None]
    return input_ids[:, kept], targets[:, kept], ranks, shorter


AutoModelForCausalLM.register(SpeederConfig, SpeederForCausalLM)
