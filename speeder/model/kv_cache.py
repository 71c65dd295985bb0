"""Packed forward passes that continue from kept keys and values, and what they depend on.

A pass computes only the last tokens of its sequences. Every sequence's keys are the kept ones and its new ones, end to
end without padding, as `spae_attention` reads them; positions and ranks are those of the whole sequence. So the states
equal those of a pass over everything, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import Cache, PreTrainedConfig

from speeder.model.config import CACHE_NAME
from speeder.model.content import autocast_dtype, content_of, for_later, is_known
from speeder.model.item_store import ItemStore
from speeder.model.packing import SequenceLayout
from speeder.model.sequences import TokenSequence

if TYPE_CHECKING:
    from speeder.model.modeling import SpeederForCausalLM

Rows = tuple[torch.Tensor, torch.Tensor]  # keys (N, Hkv, D) and values (N, Hkv, Dv) of N tokens in one layer


class PackedCache(Cache):
    """The cache that the backbone's layers get in such a pass.

    Args:
        write: called with a layer's number and its new tokens' rows; returns all rows, kept and new.
        order: `(Tk,)` int64, the rows of the packed sequences' keys; None: all, in order.
    """

    def __init__(self, write: Callable[[int, torch.Tensor, torch.Tensor], Rows], order: torch.Tensor | None):
        super().__init__(layers=[])
        self.write, self.order = write, order

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs) -> Rows:
        """`(1, Hkv, Tq, D)` new keys and values to the `(1, Hkv, Tk, D)` that attention reads."""
        # as attention does: under autocast the rotary embedding leaves keys in float32 beside bfloat16 values
        key_states = key_states.to(value_states.dtype)
        rows = self.write(layer_idx, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        if self.order is not None:
            rows = tuple(part.index_select(0, self.order) for part in rows)
        return tuple(part.transpose(0, 1)[None] for part in rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: sequences differ in length, and the backbone gets explicit positions."""
        return 0


def as_tokens(sequence: TokenSequence) -> np.ndarray:
    """A sequence's ids and ranks, `(2, S)` int64."""
    return np.array([sequence.ids, sequence.ranks], dtype=np.int64)


def prefix_tokens(model: SpeederForCausalLM) -> np.ndarray:
    """The text that every sequence begins with, `(2, P)` ids and ranks."""
    return as_tokens(TokenSequence(model.shared_prefix, [-1] * len(model.shared_prefix), []))


def common_length(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the common prefix of two `(2, S)` sequences, ranks included."""
    shorter = min(one.shape[1], other.shape[1])
    differ = (one[:, :shorter] != other[:, :shorter]).any(axis=0)
    return int(differ.argmax()) if differ.any() else shorter


@torch.no_grad()
def continued_states(
    model: SpeederForCausalLM,
    item_table: torch.Tensor | ItemStore | None,
    sequences: Sequence[np.ndarray],
    kept: Sequence[int],
    cache: PackedCache,
) -> torch.Tensor:
    """Run the tokens of whole sequences that are not kept, and return each sequence's last final state.

    Args:
        item_table: `(I, K, H)` item tokens, or a store of them; None for text alone.
        sequences: `(2, S)` ids and ranks of each whole sequence.
        kept: number of each sequence's first tokens whose keys and values are in `cache`; fewer than all.

    Returns:
        `(B, H)`, with the history look-up `(B, 2 H)`.
    """

    def tensor(parts: Sequence[np.ndarray], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.as_tensor(np.concatenate(parts), dtype=dtype).to(model.device)

    lengths = np.array([tokens.shape[1] for tokens in sequences])
    new = lengths - np.array(kept)
    pairs = list(zip(sequences, kept, strict=True))
    borders = tensor([[0], new.cumsum()], torch.int32)
    layout = SequenceLayout(
        borders,
        tensor([[0], lengths.cumsum()], torch.int32),
        int(new.max()),
        int(lengths.max()),
        tensor([tokens[1, past:] for tokens, past in pairs], torch.int32),
        tensor([tokens[1] for tokens in sequences], torch.int32),
        tensor([np.arange(past, tokens.shape[1]) for tokens, past in pairs]),
    )
    ids = tensor([tokens[0, past:] for tokens, past in pairs])
    model._check_arguments(ids[None], None, None, None)
    item_table = model._read_items(ids, item_table)
    hidden = model.backbone.get_decoder()(  # (1, T, H)
        inputs_embeds=model._embed(ids, layout, item_table)[None],
        position_ids=layout.position_ids[None],
        **{CACHE_NAME: cache},
        use_cache=True,
        spae=model.spae.context(layout),
    ).last_hidden_state
    last = borders[1:].long() - 1
    states = hidden[0, last]
    if model.history is None:
        return states
    vectors = model._history_vectors(ids, item_table)[None].to(states.dtype)
    looked_up = model.history(vectors, layout, cache)  # of all tokens, as it keeps the vectors of all
    return torch.cat([states, looked_up[last]], dim=-1)


def positions_move(config: PreTrainedConfig) -> bool:
    """Whether a backbone turns all keys by the longest position of a pass ("dynamic" and "longrope" rotary embeddings).
    Then keys of a short sequence are not those of a longer one, and cannot be kept for it."""
    settings = getattr(config, "rope_parameters", None) or {}
    each = [
        settings,
        *(value for value in settings.values() if isinstance(value, dict)),
    ]  # of kinds of layers
    return any(one.get("rope_type") in ("dynamic", "longrope") for one in each)


def text_content(model: SpeederForCausalLM, all_words: bool = False) -> tuple | None:
    """What the keys and values of the shared text depend on: the layers, SPAE, autocast's dtype and the text itself.

    Make it in evaluation mode; None if it is not known (see `content_of`).

    Args:
        all_words: of the text embedding, all rows count, not the shared text's alone.
    """
    words = model.backbone.get_input_embeddings()  # most of a small model, and few of its rows are read
    parts = [model.backbone.get_decoder(), model.spae, *([] if model.history is None else [model.history])]
    content = content_of(*parts, without=None if all_words else words)
    if not is_known(content):
        return content
    prefix = model.shared_prefix
    rows = words(torch.tensor(prefix, dtype=torch.int64, device=model.device)).detach()
    read = rows.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return (*content, autocast_dtype(model.device.type), tuple(prefix), rows.dtype, read)


def session_content(model: SpeederForCausalLM, all_words: bool = False) -> tuple | None:
    """What the keys and values of histories depend on: `text_content`, and the item tokens.

    Args:
        all_words: histories hold text too, such as titles.
    """
    text, tokens = text_content(model, all_words), content_of(model.mrc)
    if text is None or tokens is None:
        return None
    config = model.config
    return (*text, *tokens, model.item_store, config.embedding_rms, config.tokens_per_item)


class KeyValuePool:
    """Keys and values of single tokens in all layers, in one reserved block a layer.

    Args:
        capacity: tokens that fit.
    """

    def __init__(self, capacity: int):
        self.capacity = self.free = capacity
        self._stack = np.arange(capacity)[::-1].copy()  # its first `free` entries are the free slots
        self._layers: dict[int, Rows] = {}

    @property
    def nbytes(self) -> int:
        """Bytes reserved: 0 before the first pass. On a CPU, the system provides pages as they are first written."""
        return sum(part.nbytes for rows in self._layers.values() for part in rows)

    def take(self, count: int) -> np.ndarray:
        """`count` free slots, of which there must be enough. Those freed last come first."""
        self.free -= count
        return self._stack[self.free : self.free + count][::-1].copy()

    def give_back(self, slots: np.ndarray) -> None:
        """Free slots."""
        self._stack[self.free : self.free + len(slots)] = slots[::-1]
        self.free += len(slots)

    def write(self, slots: torch.Tensor, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Rows:
        """Store one layer's rows of new tokens at their slots; returns all rows of the layer."""
        if layer not in self._layers:
            with torch.inference_mode(False):  # what is made in inference mode can only be written in it
                self._layers[layer] = tuple(
                    torch.empty(self.capacity, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
                    for rows in (keys, values)
                )
        for stored, rows in zip(self._layers[layer], (keys, values), strict=True):
            stored.index_copy_(0, slots, rows)
        return self._layers[layer]


class SharedPrefix:
    """Keys and values of the text before every history, computed once per `text_content` of the model."""

    def __init__(self, model: SpeederForCausalLM):
        self.tokens = prefix_tokens(model)
        self._layers: dict[int, Rows] = {}
        cache = PackedCache(self._keep, None)
        with for_later(model.device.type):
            self._last = continued_states(model, None, [self.tokens], [0], cache)

    def states(
        self,
        model: SpeederForCausalLM,
        item_table: torch.Tensor | ItemStore,
        sequences: Sequence[TokenSequence],
    ) -> torch.Tensor:
        """The final states of the sequences' last tokens, `(B, H)`, as from `last_states`."""
        whole = [as_tokens(sequence) for sequence in sequences]
        length = self.tokens.shape[1]
        kept = [length if common_length(self.tokens, tokens) == length else 0 for tokens in whole]
        runs = [row for row, tokens in enumerate(whole) if tokens.shape[1] > kept[row]]
        states = self._last.repeat(len(whole), 1)  # a sequence of the prefix alone has nothing to run
        if runs:
            order, start = [], length  # the prefix's rows come first, then the new ones of all sequences
            for row in runs:
                end = start + whole[row].shape[1] - kept[row]
                order += [np.arange(kept[row]), np.arange(start, end)]
                start = end
            cache = PackedCache(self._joined, torch.as_tensor(np.concatenate(order)).to(states.device))
            states[runs] = continued_states(
                model, item_table, [whole[r] for r in runs], [kept[r] for r in runs], cache
            )
        return states

    def _keep(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Rows:
        self._layers[layer] = (keys, values)
        return keys, values

    def _joined(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Rows:
        prefix_keys, prefix_values = self._layers[layer]
        return torch.cat([prefix_keys, keys]), torch.cat([prefix_values, values])
