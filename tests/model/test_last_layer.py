"""The last layer computes only what is read, and what is read is the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder.model.last_layer import last_layer_computes
from speeder.model.sequences import pack_batch
from tests.model.worlds import FAMILIES, tiny_model

NEAR = dict(atol=2e-6, rtol=1e-5)
HISTORIES = [[1, 2, 3], [4], [9, 1, 7, 7, 0], [5]]


def packed(model, histories):
    return pack_batch([model.sequence(history) for history in histories])


@torch.no_grad()
def all_states(model, histories):
    """Every token's final state, of which the last of each history are taken."""
    batch = packed(model, histories)
    states = model(**batch, vocabulary="items", output_hidden_states=True, use_cache=False).hidden_states[-1]
    return states[0, batch["cu_seqlens"][1:].long() - 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_whole_layers_in_every_family(family):
    model = tiny_model(family, prompt_prefix=[5, 6], prompt_suffix=[8])
    torch.testing.assert_close(
        model.last_states(**packed(model, HISTORIES)), all_states(model, HISTORIES), **NEAR
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=9), min_size=1, max_size=5))
def test_states_are_those_of_whole_layers_for_any_histories(histories):
    model = tiny_model()
    torch.testing.assert_close(
        model.last_states(**packed(model, histories)), all_states(model, histories), **NEAR
    )


def test_the_last_layer_computes_one_token_a_history_and_the_others_all():
    model = tiny_model()
    rows = []
    for layer in model.backbone.get_decoder().layers:
        layer.mlp.register_forward_hook(lambda _, args, out: rows.append(out.shape[1]))
    model.last_states(**packed(model, HISTORIES))
    assert rows == [10, 4]
    rows.clear()
    all_states(model, HISTORIES)
    assert rows == [10, 10]


def test_a_pass_that_fails_leaves_the_decoder_as_it_was():
    model = tiny_model()
    decoder = model.backbone.get_decoder()
    with pytest.raises(RuntimeError, match="stop"), last_layer_computes(decoder, torch.tensor([0])):
        raise RuntimeError("stop")
    assert not decoder.layers[-1]._forward_pre_hooks


def test_layers_without_a_known_cache_are_named():
    class Layer(torch.nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    decoder = torch.nn.Module()
    decoder.layers = torch.nn.ModuleList([Layer()])
    with pytest.raises(TypeError, match=r"Layer: expected one of the arguments cache, .*got \[\]"):
        last_layer_computes(decoder, torch.tensor([0])).__enter__()
