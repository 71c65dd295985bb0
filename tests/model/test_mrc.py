"""MRC: gates are a softmax over what an item has, tokens are normalised, missing modalities do not leak in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.mrc import CLOSED, MRC, drop_modalities
from speeder.model.packing import packed_layout
from tests.model.worlds import TEXT, tiny_backbone, tiny_catalogue, tiny_model


@settings(max_examples=20, deadline=None)
@given(
    offsets=st.lists(st.floats(-8, 8), min_size=4, max_size=4),
    rows=st.lists(st.integers(0, 19), min_size=1, max_size=6),
    k=st.integers(1, 3),
)
def test_gates_and_tokens(offsets, rows, k):
    model = tiny_model(item_embedding=True, tokens_per_item=k)
    model.mrc.gate_offset.copy_(torch.tensor(offsets))
    with torch.no_grad():
        tokens, gates = model.mrc()
        some_tokens, some_gates = model.mrc(torch.tensor(rows))
    assert tokens.shape == (20, k, 32) and gates.shape == (20, 4)
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(20))
    assert not gates[~model.mrc.present].any()
    torch.testing.assert_close(some_tokens, tokens[rows], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(some_gates, gates[rows])
    unscaled = tokens / model.mrc.norm_weight
    torch.testing.assert_close(unscaled.pow(2).mean(dim=-1), torch.ones(20, k), atol=1e-3, rtol=1e-3)


def test_the_token_is_the_gated_sum_of_its_experts():
    """Against the formula written out for one item, expert by expert."""
    model = tiny_model()
    catalogue, mrc = model.catalogue, model.mrc
    item = next(i for i in range(20) if catalogue.present["text"][i] and catalogue.present["image"][i])
    total, weights = 0.0, {}
    with torch.no_grad():
        for name in mrc.names:
            if not catalogue.present[name][item]:
                continue
            x = torch.nn.functional.layer_norm(
                catalogue.features[name][item], catalogue.features[name].shape[1:]
            )
            expert, offset = mrc.experts[name], mrc.gate_offset[mrc.names.index(name)]
            hidden = torch.nn.functional.gelu(expert.up.weight @ x + expert.up.bias)
            output = expert.down.weight @ hidden + expert.down.bias
            weights[name] = (mrc.gates[name].weight @ x + mrc.gates[name].bias + offset).exp()
            total = total + weights[name] * output
        token = total / sum(weights.values())
        token = token / (token.pow(2).mean() + 1e-6).sqrt() * mrc.norm_weight
        torch.testing.assert_close(mrc()[0][item, 0], token, atol=1e-5, rtol=1e-4)


def test_an_absent_modality_cannot_be_read():
    """Whatever stands in the rows of absent features, nothing of it reaches a token."""
    catalogue = tiny_catalogue()
    model = tiny_model()
    with torch.no_grad():
        before = model.mrc()[0].clone()
        for name in catalogue.modalities:
            getattr(model.mrc, f"features_{name}")[~catalogue.present[name]] = torch.nan
        after = model.mrc()[0]
    torch.testing.assert_close(after, before)


def test_a_closed_modality_weighs_nothing_but_serves_an_item_with_nothing_else():
    model = tiny_model()
    column = model.mrc.names.index("image")
    model.mrc.gate_offset[column] = CLOSED
    present = model.mrc.present
    alone = present[:, column] & (present.sum(dim=1) == 1)
    assert alone.any(), "the catalogue has an item with a picture and nothing else"
    gates = model.gates()["image"]
    assert (gates[~alone] < 1e-9).all()
    torch.testing.assert_close(gates[alone], torch.ones(int(alone.sum())))


@given(probability=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_modality_dropout_keeps_at_least_one(probability, seed):
    torch.manual_seed(seed)
    present = torch.rand(50, 4) > 0.5
    present[:, 0] |= ~present.any(dim=1)
    is_open = torch.tensor([True, True, False, False])
    kept = drop_modalities(present, probability, is_open)
    assert not (kept & ~present).any()
    has_open = (present & is_open).any(dim=1)
    assert (kept & is_open).any(dim=1)[has_open].all(), "never an item's last open modality"
    assert torch.equal(kept[~has_open], present[~has_open])


def test_item_tokens_are_kept_until_a_weight_changes():
    model = tiny_model()
    with torch.no_grad():
        first = model.item_tokens()[0]
        assert model.item_tokens()[0] is first
        model.mrc.norm_weight.mul_(2.0)
        second = model.item_tokens()[0]
    torch.testing.assert_close(second, 2 * first)
    model.train()
    assert model.item_tokens()[0].requires_grad


def test_the_catalogue_is_compressed_once_for_many_requests(monkeypatch):
    model, calls = tiny_model(), []
    forward = MRC.forward
    monkeypatch.setattr(MRC, "forward", lambda *args: calls.append(1) or forward(*args))
    for history in ([1, 2], [3], [4, 5, 6]):
        model.recommend([history], k=3)
        model.score([history])
    model.gates()
    assert len(calls) == 1
    model.train()
    model.recommend([[1]], k=3)
    assert model.training and len(calls) > 1, "in training, weights move between requests"


@pytest.mark.parametrize("fused", [True, False])
def test_kept_item_tokens_do_not_outlive_an_optimizer_step(fused):
    """Fused optimizers change weights without telling torch's version counter."""
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    before = model.score([[1, 2, 3]])
    model.train()
    ids = torch.tensor([[65, 66, 67, 68]])
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()
    after = model.score([[1, 2, 3]])
    assert (after - before).abs().max() > 1e-2
    model.clear_cache()
    torch.testing.assert_close(model.score([[1, 2, 3]]), after)


@pytest.mark.exact
def test_kept_item_tokens_do_not_cross_autocast():
    model = tiny_model()
    exact = model.score([[1, 2, 3]])
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.score([[1, 2, 3]])
    assert not torch.equal(exact, rough)
    assert torch.equal(model.score([[1, 2, 3]]), exact)


@pytest.mark.exact
def test_catalogues_that_do_not_fit_are_refused_and_change_nothing():
    model = tiny_model()
    before = model.score([[1, 2]])
    whole = tiny_catalogue()
    ids = ["a", "b"]
    zeros, none = torch.zeros(2, 7), torch.zeros(2, dtype=torch.bool)
    bare = ItemCatalogue(ids, features={"text": zeros}, present={"text": none})
    narrow = ItemCatalogue(ids, features={"text": torch.ones(2, 3)})
    for wrong, error, message in [
        (bare, SpeederError, r"2 item\(s\) have none of the modalities .* \(for one: a, b\)"),
        (narrow, ValueError, "text"),
        (ItemCatalogue([whole.ids[0]], features={"text": torch.ones(1, 7)}), ValueError, "id0"),
    ]:
        with pytest.raises(error, match=message):
            model.add_items(wrong)
    with pytest.raises(SpeederError, match="expected the modality 'collaborative', got text"):
        model.set_catalogue(ItemCatalogue(ids, features={"text": torch.ones(2, 7)}))
    assert len(model.catalogue) == model.config.num_items == 20
    assert torch.equal(model.score([[1, 2]]), before)


def test_a_model_without_a_catalogue_says_so():
    from speeder.model.modeling import SpeederForCausalLM

    model = SpeederForCausalLM(tiny_model().config)
    with pytest.raises(SpeederError, match="no catalogue"):
        model(torch.tensor([[64]]))


@pytest.mark.parametrize("items", [20, 1200], ids=["whole catalogue scaled", "rows that are read"])
def test_gradients_of_an_item_that_is_read_often_are_summed_in_float32(items):
    """In bfloat16, a sum of equal parts ends growing at 256 of them."""
    model = SpeederForCausalLM.from_backbone(tiny_backbone(), tiny_catalogue(items)).to(torch.bfloat16)
    ids = torch.full((1000,), TEXT + 3)
    layout = packed_layout(torch.tensor([0, 1000], dtype=torch.int32), None, ids >= TEXT)
    table = torch.zeros(items, 1, 32, dtype=torch.bfloat16, requires_grad=True)
    model._embed(ids, layout, table).float().sum().backward()
    expected = torch.zeros(items, 1, 32)
    expected[3] = 1000 * model.config.embedding_rms
    torch.testing.assert_close(table.grad.float(), expected, rtol=0.01, atol=0)
