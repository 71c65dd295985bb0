"""Lets the last layer compute only the states that are read.

Ranking reads one state per history. All layers but the last must compute every token, since the next layer's keys and
values need them. Of the last layer's output all but one token per history would be discarded, with four fifths of the
layer's products. No model code is patched. The layer runs on all tokens until it passes its keys and values to the
cache, where it is stopped. Then it runs on the tokens that are read, with a cache that returns the keys and values of
all tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from threading import get_ident
from typing import Any

import torch
from torch import nn

CACHE_NAMES = (
    "cache",
    "past_key_values",
    "layer_past",
)  # what layers call their cache, by family and release


class _Taken(Exception):
    """Stops a layer that has passed on its keys and values."""


class _Taker:
    """A cache that stores the keys and values, and stops the layer."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> None:
        self.states = keys, values
        raise _Taken


class _Giver:
    """A cache that returns the keys and values of all tokens."""

    def __init__(self, states: tuple[torch.Tensor, torch.Tensor]):
        self.states = states

    def update(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        return self.states


@contextmanager
def last_layer_computes(decoder: nn.Module, rows: torch.Tensor) -> Iterator[None]:
    """In this context, a pass of the decoder over one packed row returns only the states of `rows`.

    Args:
        decoder: has `layers`, as every decoder of transformers.
        rows: `(B,)` the last token of each sequence.

    Raises:
        TypeError: the layers have no cache argument of a known name.
    """
    name, thread = _cache_name(type(decoder.layers[-1])), get_ident()

    def cut(layer: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> tuple[tuple, dict] | None:
        # another thread's pass; it may meet the hook half registered, and hand no kwargs
        if get_ident() != thread:
            return None
        taker = _Taker()
        try:
            layer.forward(*args, **kwargs | {name: taker})
            raise TypeError(f"{type(layer).__name__}: expected it to hand keys and values to its cache")
        except _Taken:
            pass
        tokens = len(kwargs["spae"].layout.rank_q)
        args = tuple(_of_rows(value, rows, tokens) for value in args)
        kwargs = {key: _of_rows(value, rows, tokens) for key, value in kwargs.items()}
        kwargs[name] = _Giver(taker.states)
        spae = kwargs["spae"]
        layout = replace(
            spae.layout,
            cu_seqlens_q=torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device),
            max_seqlen_q=1,
            rank_q=spae.layout.rank_q[rows],
            position_ids=spae.layout.position_ids[rows],
        )
        kwargs["spae"] = replace(spae, layout=layout)
        return args, kwargs

    handle = decoder.layers[-1].register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@cache
def _cache_name(layer: type[nn.Module]) -> str:
    names = inspect.signature(layer.forward).parameters.keys() & set(CACHE_NAMES)
    if len(names) != 1:
        raise TypeError(
            f"{layer.__name__}: expected one of the arguments {', '.join(CACHE_NAMES)}, got {sorted(names)}"
        )
    return names.pop()


def _of_rows(value: Any, rows: torch.Tensor, tokens: int) -> Any:
    """The `rows` of tensors `(1, T, ...)`, such as rotary angles, and of tuples of them."""
    if isinstance(value, tuple):
        return tuple(_of_rows(entry, rows, tokens) for entry in value)
    if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[:2] == (1, tokens):
        return value[:, rows]
    return value
