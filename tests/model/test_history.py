"""The history look-up: weighted means of the items read, the same in every way of running a model."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, StaticCache

from speeder.baselines.fit_neighbours import fit_neighbours
from speeder.data.catalogue import ItemCatalogue
from speeder.data.interactions import Interactions, LeaveOneOut
from speeder.model.config import CACHE_NAME
from speeder.model.history import START_DECAY, make_room
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.sequences import pack_batch, pad_batch
from speeder.model.streamed_ranking import ReadOnDemand
from speeder.recipes.neighbours import NeighboursConfig
from speeder.serving.sessions import UserSessions
from tests.model.worlds import TEXT, tiny_backbone, tiny_catalogue, tiny_model

NEAR = dict(atol=1e-5, rtol=1e-5)
HISTORIES = [[1, 2, 3], [4], [9, 1, 7, 7, 0], [5, 2]]
WITH_LOOKUP = dict(history_lookup=True, experts="linear", words=True)


def looked_up(model, history, ahead):
    """The sum written out in float64; `ahead`: ranks from the newest item to the asking token."""
    vectors = model.item_vectors(model.item_table()).double()
    weights = model.history.log_weights.double().exp()
    total = sum(weights[len(history) - 1 - j + ahead] * vectors[item] for j, item in enumerate(history))
    return total / total.pow(2).mean().sqrt()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    "prompt", [{}, dict(prompt_prefix=[5, 6], prompt_suffix=[8, 9])], ids=["items", "text"]
)
@torch.no_grad()
def test_queries_have_the_weighted_mean_of_the_history(prompt, k):
    model = tiny_model(**WITH_LOOKUP, **prompt, tokens_per_item=k, num_distance_buckets=16)
    width = model.config.hidden_size
    batch = pack_batch([model.sequence(history) for history in HISTORIES])
    states = model.last_states(**batch)
    assert states.shape == (len(HISTORIES), 2 * width)
    for state, history in zip(states, HISTORIES, strict=True):
        found = torch.nn.functional.rms_norm(state[width:].double(), (width,))
        torch.testing.assert_close(found, looked_up(model, history, ahead=1 if prompt else 0), **NEAR)
        query = model.item_head(state[:width]) + found.float()
        query = query / query.pow(2).mean().sqrt() * model.logit_scale.exp() / width
        torch.testing.assert_close(model.item_queries(state[None])[0], query, **NEAR)


@pytest.mark.parametrize(
    "prompt", [{}, dict(prompt_prefix=[5, 6], prompt_suffix=[8, 9])], ids=["items", "text"]
)
@torch.no_grad()
def test_every_way_of_running_gives_the_same_scores(prompt):
    """Beside the item pairs too."""
    model = tiny_model(**WITH_LOOKUP, **prompt)
    model.set_item_pairs([[1, 2, 3, 4], [9, 7, 0], [7, 5, 2]])
    model.config.pair_weight = 3.0
    scores = model.score(HISTORIES)
    for side in ("left", "right"):
        batch = pad_batch([model.sequence(history) for history in HISTORIES], 0, side)
        logits = model(**batch, vocabulary="items").logits[..., TEXT:]
        last = batch["attention_mask"].long().cumsum(1).argmax(1)
        torch.testing.assert_close(logits[torch.arange(len(HISTORIES)), last], scores, **NEAR)
    sessions = UserSessions(model, 200)
    sessions.extend({user: history[:1] for user, history in enumerate(HISTORIES)})
    rest = {user: history[1:] for user, history in enumerate(HISTORIES)}
    torch.testing.assert_close(sessions.score(rest), scores, **NEAR)
    for history, row in zip(HISTORIES, scores, strict=True):
        [best] = model.recommend([history], 3, exclude_seen=False)
        assert [item.item for item in best] == row.argsort(descending=True)[:3].tolist()


@torch.no_grad()
def test_a_long_prompt_takes_nothing_of_the_history():
    """Its tokens share the weights of the mean, of which only the direction counts beside the backbone's state."""
    model = tiny_model(**WITH_LOOKUP, prompt_prefix=[5] * 3000, prompt_suffix=[8])
    [state] = model.last_states(**pack_batch([model.sequence([1, 2, 3])]))
    query = model.item_head(state[: model.config.hidden_size]) + looked_up(model, [1, 2, 3], ahead=1)
    query = query / query.pow(2).mean().sqrt() * model.logit_scale.exp() / model.config.hidden_size
    torch.testing.assert_close(model.item_queries(state[None])[0], query.float(), atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_generation_from_a_cache_reads_the_whole_history():
    model = tiny_model(**WITH_LOOKUP)
    model.set_item_pairs([[1, 2, 3, 4], [9, 7, 0], [7, 5, 2]])
    model.config.pair_weight = 3.0
    ids = torch.tensor([[TEXT + 1, TEXT + 2, TEXT + 3], [TEXT + 9, TEXT + 1, TEXT + 7]])
    found = model.generate(ids, max_new_tokens=4, do_sample=False)
    whole = ids
    for _ in range(4):
        logits = model(whole, vocabulary="items", use_cache=False).logits[:, -1]
        whole = torch.cat([whole, logits.argmax(dim=1, keepdim=True)], dim=1)
    assert torch.equal(found, whole)
    beams = model.generate(ids, max_new_tokens=2, num_beams=3, do_sample=False)
    assert beams.shape == (2, 5)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_caches_hold_the_vectors(kind):
    model = tiny_model(**WITH_LOOKUP)
    batch = pad_batch([model.sequence(history) for history in ([1, 2, 3], [9, 1, 7, 7])], 0)
    whole = model(**batch, vocabulary="items", use_cache=False).logits[:, -1]
    for first in (2, 3):
        room = {"max_cache_len": 9} if kind is StaticCache else {}
        cache = kind(config=model.config.text_config, **room)
        mask = batch["attention_mask"]
        for start, end in ((0, first), (first, batch["input_ids"].shape[1])):
            logits = model(
                batch["input_ids"][:, start:end],
                attention_mask=mask[:, :end],
                ranks=batch["ranks"][:, :end],
                **{CACHE_NAME: cache},
                vocabulary="items",
            ).logits
        torch.testing.assert_close(logits[:, -1], whole, **NEAR)


def test_a_static_cache_of_sliding_windows_has_room_for_all():
    config = Gemma3TextConfig(
        num_hidden_layers=2, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    )
    cache = StaticCache(config=config, max_cache_len=9)
    make_room(cache, 2)
    assert cache.layers[2].max_cache_len == 9


def test_a_cache_without_room_is_refused():
    from transformers import Cache
    from transformers.cache_utils import DynamicLayer

    with pytest.raises(ValueError, match="cache: expected a DynamicCache"):
        make_room(Cache(layers=[DynamicLayer()]), 1)


def test_a_new_model_ranks_as_content_neighbours_do():
    """Before any training the score is the likeness of whitened features, as the floor has it."""
    catalogue = tiny_catalogue(40)
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randperm(40, generator=generator)[:6].tolist() for _ in range(30)]
    users, items = zip(*[(u, i) for u, row in enumerate(sequences) for i in row], strict=True)
    split = LeaveOneOut(Interactions(users, items, range(len(users)), [f"u{n}" for n in range(30)]))
    config = NeighboursConfig(content_history=50, content_decay=START_DECAY)
    floor = fit_neighbours(split, catalogue, ["text"], config)
    has_text = catalogue.present["text"].nonzero().flatten().tolist()
    known = ItemCatalogue(
        [catalogue.ids[i] for i in has_text],
        features={"text": catalogue.features["text"][has_text]},
    )
    model = SpeederForCausalLM.from_backbone(
        tiny_backbone(), known, modalities=["text"], experts="linear", history_lookup=True
    )
    histories = [[0, 3, 5], [7], [2, 2, 9, 1]]
    ours = model.score(histories)
    theirs = floor.part("text", [[has_text[i] for i in row] for row in histories])[:, has_text]
    factors = (ours * theirs).sum(1, keepdim=True) / theirs.square().sum(1, keepdim=True)  # one for each user
    torch.testing.assert_close(ours, theirs * factors, atol=2e-4, rtol=1e-3)
    assert (factors > 0).all()


def test_weights_are_learned_and_kept():
    model = tiny_model(**WITH_LOOKUP).train()
    batch = pack_batch(
        [model.sequence(row[:-1], row[-1]) for row in HISTORIES if len(row) > 1], with_labels=True
    )
    model(**batch).loss.backward()
    for name in ("history.log_weights", "mrc.words.vectors.weight", "mrc.experts.text.direct.weight"):
        assert model.get_parameter(name).grad.abs().sum() > 0, name
    model.zero_grad()
    before = model.eval().score(HISTORIES)
    sessions = UserSessions(model, 200)
    sessions.score(dict(enumerate(HISTORIES)))
    with torch.no_grad():
        model.history.log_weights[0] += 1
    after = model.score(HISTORIES)
    assert not torch.allclose(before, after)
    again = sessions.score({user: [3] for user in range(4)})
    torch.testing.assert_close(again, model.score([[*row, 3] for row in HISTORIES]), **NEAR)


def test_saved_and_loaded(tmp_path):
    model = tiny_model(**WITH_LOOKUP, item_embedding=True)
    model.save_pretrained(tmp_path)
    loaded = SpeederForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.score(HISTORIES), model.score(HISTORIES), atol=0, rtol=0)
    copied = copy.deepcopy(model)
    torch.save(copied.state_dict(), io.BytesIO())
    assert torch.equal(copied.score(HISTORIES), model.score(HISTORIES))


@pytest.mark.parametrize(
    "prompt", [{}, dict(prompt_prefix=[5, 6], prompt_suffix=[8, 9])], ids=["items", "text"]
)
def test_a_store_is_read_once_a_pass(prompt):
    """For the tokens and for the look-up; an id out of range is told before anything is read."""
    model = tiny_model(**WITH_LOOKUP, **prompt)
    expected = next(iter(model.user_states(HISTORIES))).dense
    store, asked = ReadOnDemand(model), []
    model.item_store = SimpleNamespace(rows=lambda items: asked.append(len(items)) or store.rows(items))
    found = next(iter(model.user_states(HISTORIES))).dense
    torch.testing.assert_close(found, expected, **NEAR)
    assert asked == [sum(map(len, HISTORIES))]
    with pytest.raises(ValueError, match="input_ids: expected ids in"):
        model.last_states(torch.tensor([[TEXT + 99]]), torch.tensor([[0]]), torch.tensor([0, 1]))
    assert len(asked) == 1
