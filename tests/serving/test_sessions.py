"""Kept states and the shared instruction give what a pass over everything gives, and only what is new runs."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import takewhile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder.baselines.text.text_prompt import TextPrompt
from speeder.data.catalogue import ItemCatalogue
from speeder.model.kv_cache import common_length
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.sequences import pack_batch
from speeder.serving.sessions import UserSessions
from tests.baselines.text_worlds import cycle_world, save_text_backbone
from tests.model.worlds import FAMILIES, tiny_backbone, tiny_catalogue, tiny_model

NEAR = dict(atol=5e-5, rtol=1e-4)  # logits reach 7: some roundings of float32 at that size
PROMPTS = {
    "items only": ([], []),
    "instruction": ([5, 6, 7], [8, 9]),
    "prefix alone": ([5, 6], []),
    "suffix alone": ([], [4]),
}
MAX_HISTORY = 6
VISITS = st.lists(
    st.tuples(
        st.booleans(),  # whether an answer is asked
        st.dictionaries(st.integers(0, 3), st.lists(st.integers(0, 19), max_size=4), min_size=1),
    ),
    min_size=1,
    max_size=5,
)


@cache
def fixed_model(prompt: str = "instruction", tokens_per_item: int = 1):
    """A model that no test changes."""
    prefix, suffix = PROMPTS[prompt]
    return tiny_model(
        prompt_prefix=prefix, prompt_suffix=suffix, tokens_per_item=tokens_per_item, max_history=MAX_HISTORY
    )


@torch.no_grad()
def whole(model, histories) -> torch.Tensor:
    """Scores by one pass over all tokens, where nothing is kept but the item tokens."""
    states = model.last_states(**pack_batch([model.sequence(list(history)) for history in histories]))
    return model.item_queries(states) @ model.scoring_table().float().T


@contextmanager
def tokens_run(model) -> Iterator[list[int]]:
    """Collects how many tokens enter the backbone in each pass."""
    counts: list[int] = []
    embed = model._embed

    def counted(ids, *args):
        counts.append(len(ids))
        return embed(ids, *args)

    with (
        pytest.MonkeyPatch.context() as patch
    ):  # not of the decoder: of a module that is changed nothing is kept
        patch.setattr(model, "_embed", counted)
        yield counts


@pytest.mark.parametrize("tokens_per_item", [1, 2])
@pytest.mark.parametrize("prompt", PROMPTS)
@settings(max_examples=12, deadline=None)
@given(visits=VISITS, spare=st.integers(0, 40), batch_size=st.integers(1, 3))
def test_visits_score_as_whole_histories_do(prompt, tokens_per_item, visits, spare, batch_size):
    model = fixed_model(prompt, tokens_per_item)
    longest = len(model.sequence([0] * MAX_HISTORY).ids)
    sessions = UserSessions(model, longest + spare, batch_size)
    histories: dict[int, list[int]] = {}
    for asked, events in visits:
        if prompt == "items only":  # a history needs an item there
            events = {user: items or [user] for user, items in events.items()}
        for user, items in events.items():
            histories[user] = histories.get(user, []) + items
        expected = whole(model, [histories[user] for user in events])
        if asked:
            torch.testing.assert_close(sessions.score(events), expected, **NEAR)
        else:
            sessions.extend(events)
        torch.testing.assert_close(sessions.score({user: [] for user in events}), expected, **NEAR)
        memory = sessions.memory()
        kept = sum(len(state.slots) - state.shared for state in sessions._states.values())
        assert memory.tokens == kept + len(model.config.prompt_prefix) <= memory.max_tokens
        assert memory.histories == len(histories) >= memory.users
    assert {user: sessions.history(user) for user in histories} == histories


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_continues_and_shares_its_instruction(family):
    model = tiny_model(family, prompt_prefix=[5, 6, 7], prompt_suffix=[8])
    sessions = UserSessions(model, 60)
    sessions.extend({"a": [1, 2, 3], "b": [4]})
    expected = whole(model, [[4, 5, 6], [1, 2, 3], [9, 1]])
    torch.testing.assert_close(sessions.score({"b": [5, 6], "a": [], "c": [9, 1]}), expected, **NEAR)
    torch.testing.assert_close(model.score([[4, 5, 6], [1, 2, 3], [9, 1]]), expected, **NEAR)


@settings(max_examples=15, deadline=None)
@given(
    visits=st.lists(
        st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(0, 19), min_size=1, max_size=3)),
        min_size=1,
        max_size=3,
    ).filter(all),
    exclude_seen=st.booleans(),
)
def test_recommendations_are_those_of_whole_histories(visits, exclude_seen):
    model, histories = fixed_model(), {}
    sessions = UserSessions(model, 100)
    for events in visits:
        for user, items in events.items():
            histories[user] = histories.get(user, []) + items
        named = {user: [f"id{item}" for item in items] for user, items in events.items()}
        found = sessions.recommend(named, k=4, exclude_seen=exclude_seen)
        whole_histories = [histories[user] for user in events]
        expected = model.recommend(whole_histories, k=4, exclude_seen=exclude_seen)
        assert list(found) == list(events)
        for ours, theirs in zip(found.values(), expected, strict=True):
            assert [r.id for r in ours] == [r.id for r in theirs]
            assert [r.score for r in ours] == pytest.approx([r.score for r in theirs], rel=1e-4, abs=5e-5)


def test_only_new_tokens_run():
    model = fixed_model("instruction", 2)  # 3 tokens before, 2 after, 2 an item
    sessions = UserSessions(model, 200)
    cases = [
        ({"a": [1, 2, 3]}, [3, 6 + 2]),  # the instruction once
        ({"b": [4]}, [2 + 2]),
        ({"a": [5], "b": [6, 7]}, [2 + 2 + 4 + 2]),
        ({"b": []}, [2]),
        ({"a": [8, 9, 10]}, [6 * 2 + 2]),  # 7 items: the window slides and every rank changes
        ({"a": []}, [2]),
    ]
    for events, expected in cases:
        with tokens_run(model) as counts:
            sessions.score(events)
        assert counts == expected
    with tokens_run(model) as counts:
        sessions.extend({"b": [11]})  # no suffix is read
        sessions.extend({"b": []})
    assert counts == [2]


@pytest.mark.exact
def test_without_a_suffix_the_last_state_is_kept():
    model = fixed_model("prefix alone")
    sessions = UserSessions(model, 50)
    first = sessions.score({"a": [1, 2], "b": []})
    with tokens_run(model) as counts:
        assert torch.equal(sessions.score({"a": [], "b": []}), first)
    assert counts == []


def test_users_seen_longest_ago_make_room():
    model = fixed_model("items only")
    sessions = UserSessions(model, 9)
    sessions.score({"a": [1, 2, 3], "b": [4, 5, 6], "c": [7, 8]})
    sessions.score({"a": []})
    sessions.score({"d": [9, 10]})  # b goes
    assert sessions.memory().users == 3 and sessions.memory().tokens == 7
    for user, new_tokens in (("c", 1), ("d", 1), ("b", 4)):
        with tokens_run(model) as counts:
            sessions.score({user: [11]})
        assert counts == [new_tokens]
    sessions.forget("b")
    sessions.forget("b")
    assert sessions.history("b") == [] and sessions.memory().histories == 3
    assert sessions.memory().tokens <= 9 - 4


@torch.no_grad()
def in_place(weight: torch.Tensor) -> None:
    weight.add_(0.5 * torch.randn(weight.shape))


def train_a_step(model) -> None:
    """By a fused optimizer, which changes weights without a new version of the tensors."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model.train()
    model(**pack_batch([model.sequence([1, 2, 3], target=4)], with_labels=True)).loss.backward()
    optimizer.step()
    model.eval()


def load_other_weights(model) -> None:
    model.load_state_dict(
        tiny_model("llama", stir=False, prompt_prefix=[5, 6], prompt_suffix=[7]).state_dict()
    )


ADAPTERS = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
CHANGES = {
    "a weight in place": lambda model: in_place(model.backbone.model.layers[0].mlp.up_proj.weight),
    "a text row": lambda model: in_place(model.backbone.get_input_embeddings().weight[6]),
    "a position table": lambda model: in_place(model.spae.position_prompts),
    "the last norm": lambda model: in_place(model.backbone.model.norm.weight),
    "a training step": train_a_step,
    "other weights": load_other_weights,
    "new items": lambda model: model.add_items(renamed_catalogue()),
    "other features": lambda model: model.set_catalogue(tiny_catalogue(seed=9)),
    "another suffix": lambda model: setattr(model.config, "prompt_suffix", [9, 9]),
    "another prefix": lambda model: setattr(model.config, "prompt_prefix", [9]),
    "adapters": lambda model: model.add_lora(ADAPTERS),
    "merged adapters": lambda model: model.merge_lora(),
    "adapters merged at once": lambda model: (model.add_lora(ADAPTERS), model.merge_lora()),
}


def renamed_catalogue():
    catalogue = tiny_catalogue(3, seed=4)
    catalogue.ids[:] = ["new0", "new1", "new2"]
    return catalogue


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_kept_over_a_change_of_the_model(change):
    model = tiny_model(prompt_prefix=[5, 6], prompt_suffix=[7])
    if change == "merged adapters":
        model.add_lora(ADAPTERS)
    sessions = UserSessions(model, 80)
    sessions.extend({"a": [1, 2, 3], "b": [4]})
    before = model.score([[1, 2, 3, 8], [4]])
    CHANGES[change](model)
    expected = whole(model, [[1, 2, 3, 8], [4]])
    torch.testing.assert_close(sessions.score({"a": [8], "b": []}), expected, **NEAR)
    torch.testing.assert_close(model.score([[1, 2, 3, 8], [4]]), expected, **NEAR)
    if change not in ("new items", "merged adapters"):
        assert (expected[:, :20] - before).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_is_as_near_as_a_whole_pass(how):
    model = tiny_model(prompt_prefix=[5, 6], prompt_suffix=[7])
    histories = [[1, 2, 3, 4, 5], [6, 7, 8]]
    exact = whole(model, histories)
    sessions = UserSessions(model, 80)
    sessions.extend({"a": [1, 2], "b": [6]})  # in float32: not to be read below
    if how == "weights":
        model = model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        sessions.extend({"a": [3], "b": [7]})
        kept = sessions.score({"a": [4, 5], "b": [8]})
        error = (whole(model, histories) - exact).abs().max()
        shared = model.score(histories)
    assert 0 < error < 0.5
    assert (kept - exact).abs().max() < 2 * error
    assert (shared - exact).abs().max() < 2 * error
    assert sessions.memory().bytes == 80 * 2 * 2 * 16 * 2  # tokens, K and V, layers, 2 heads of 8, bfloat16


def test_the_instruction_runs_once_for_all_batches():
    model = tiny_model(prompt_prefix=[5, 6, 7], prompt_suffix=[8, 9])
    histories = [[1, 2], [3], [], [4, 5, 6], [7]]
    with tokens_run(model) as counts:
        first = model.score(histories, batch_size=2)
        model.recommend(histories, k=2, batch_size=5)
    assert counts == [3, 7, 7, 3, 17]
    torch.testing.assert_close(first, whole(model, histories), **NEAR)
    model.config.prompt_suffix = []
    torch.testing.assert_close(
        model.score(histories), whole(model, histories), **NEAR
    )  # [] is the prefix alone
    in_place(model.backbone.get_input_embeddings().weight[6])
    with tokens_run(model) as counts:
        model.score(histories)
    assert counts == [3, 7]


def test_inference_mode_and_training_mode():
    model = tiny_model(prompt_prefix=[5], dropout=0.3)
    sessions = UserSessions(model, 80)
    with torch.inference_mode():
        sessions.score({"a": [1, 2]})
        model.score([[1]])
    expected = whole(model, [[1, 2, 3]])
    torch.testing.assert_close(sessions.score({"a": [3]}), expected, **NEAR)
    model.train()
    torch.testing.assert_close(sessions.score({"a": []}), expected, **NEAR)
    assert model.training
    with torch.inference_mode():
        torch.testing.assert_close(sessions.score({"a": []}), expected, **NEAR)


@pytest.mark.parametrize("part", ["all", "the backbone"])
def test_weights_made_in_inference_mode_are_read_as_others(part):
    """They keep no version."""
    with torch.inference_mode():
        model, backbone = tiny_model(prompt_prefix=[5]), tiny_backbone()
    if part == "the backbone":
        model = SpeederForCausalLM.from_backbone(backbone, tiny_catalogue(), prompt_prefix=[5])
    sessions = UserSessions(model, 80)
    sessions.score({"a": [1, 2]})
    model.score([[1]])
    with tokens_run(model) as counts:
        sessions.score({"a": []})
    assert counts == []
    with torch.inference_mode():
        in_place(model.backbone.get_input_embeddings().weight[5])
    expected = whole(model, [[1, 2, 3]])
    torch.testing.assert_close(sessions.score({"a": [3]}), expected, **NEAR)
    torch.testing.assert_close(model.score([[1, 2, 3]]), expected, **NEAR)


@pytest.mark.parametrize("prompt", ["instruction", "items only"])
def test_what_fails_takes_nothing_in(prompt):
    model = fixed_model(prompt)
    sessions = UserSessions(model, 60, batch_size=1)
    sessions.score({"a": [1, 2]})
    for events, k, error in (
        ({"a": [3], "b": ["nobody"]}, 2, KeyError),
        ({"a": [3], "b": [20]}, 2, ValueError),
        ({"a": [3]}, 18, ValueError),
    ):
        with pytest.raises(error):
            sessions.recommend(events, k=k)
    passes = []

    def second_fails(module, args, kwargs):
        passes.append(1)
        if len(passes) == 2:
            raise MemoryError("no room")

    hook = model.backbone.get_decoder().register_forward_pre_hook(second_fails, with_kwargs=True)
    with pytest.raises(MemoryError):
        sessions.score({"a": [3], "b": [4], "c": [5]})
    hook.remove()
    assert sessions.history("a") == [1, 2] and sessions.history("b") == []
    kept = sum(len(state.slots) - state.shared for state in sessions._states.values())
    assert sessions.memory().tokens == kept + len(model.config.prompt_prefix)
    torch.testing.assert_close(sessions.score({"a": []}), whole(model, [[1, 2]]), **NEAR)  # not ahead
    expected = whole(model, [[1, 2, 3], [4], [5]])
    torch.testing.assert_close(sessions.score({"a": [3], "b": [4], "c": [5]}), expected, **NEAR)


@given(
    one=st.lists(st.tuples(st.integers(0, 1), st.integers(-1, 0)), max_size=5),
    other=st.lists(st.tuples(st.integers(0, 1), st.integers(-1, 0)), max_size=5),
)
def test_common_beginnings_have_equal_ids_and_ranks(one, other):
    tokens = [np.array(rows, dtype=np.int64).reshape(-1, 2).T for rows in (one, other)]
    assert common_length(*tokens) == len(
        list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    )


def test_text_baselines_continue_too(tmp_path):
    """What is kept is a common beginning of tokens, whatever an item's tokens are and the prompt is."""
    catalogue = cycle_world(1).catalogue
    save_text_backbone(tmp_path, catalogue.titles)
    template = "Chosen so far:\n{history}Chosen next:\n"
    for unread_prefix in ([], [0, 1]):  # a template takes the place of `prompt_prefix`
        model = TextPrompt.from_backbone(
            tmp_path, catalogue, template=template, prompt_prefix=unread_prefix
        ).eval()
        sessions = UserSessions(model, 2000)
        sessions.extend({"a": [1, 2], "b": [4]})
        expected = whole(model, [[1, 2, 3], [4]])
        torch.testing.assert_close(sessions.score({"a": [3], "b": []}), expected, **NEAR)
        torch.testing.assert_close(model.score([[1, 2, 3], [4]]), expected, **NEAR)
        kept = sum(len(state.slots) - state.shared for state in sessions._states.values())
        assert sessions.memory().tokens == kept + len(model.shared_prefix)


def test_titles_follow_the_words(tmp_path):
    """A text baseline's histories are text: any row of the text embedding is in what is kept."""
    catalogue = cycle_world(1).catalogue
    save_text_backbone(tmp_path, catalogue.titles)
    model = TextPrompt.from_backbone(tmp_path, catalogue, template="Chosen so far:\n{history}").eval()
    sessions = UserSessions(model, 2000)
    before = sessions.score({"a": [1, 2]})
    with torch.no_grad():
        model.backbone.get_input_embeddings().weight[model.title(1)[:-1]] *= -3
    after = sessions.score({"a": []})
    torch.testing.assert_close(after, whole(model, [[1, 2]]), **NEAR)
    assert (after - before).abs().max() > 1e-3


def test_the_last_token_of_several_runs_again_with_its_item():
    model = tiny_model(tokens_per_item=2, max_history=3)
    sessions = UserSessions(model, 40)
    sessions.score({"user": [1, 1, 1]})
    model.config.max_history = 2
    torch.testing.assert_close(sessions.score({"user": []}), whole(model, [[1, 1]]), **NEAR)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda sessions: pickle.loads(pickle.dumps(sessions))]
)
def test_a_copy_has_the_events_and_no_states(copied):
    model = tiny_model(prompt_prefix=[5])
    sessions = UserSessions(model, 80)
    expected = sessions.score({"user": [1, 2]})
    other = copied(sessions)
    assert other.memory().users == 0
    torch.testing.assert_close(other.score({"user": []}), expected, **NEAR)
    other.extend({"user": [3], "second": [4]})
    assert sessions.history("user") == [1, 2] and sessions.memory().histories == 1
    torch.testing.assert_close(sessions.score({"user": []}), expected, **NEAR)


def test_wrong_arguments_are_named():
    model = fixed_model("instruction", 2)
    with pytest.raises(
        ValueError, match="max_tokens: expected at least 17, the tokens of one history, got 16"
    ):
        UserSessions(model, 16)
    for arguments, message in (
        (dict(max_tokens=0), "max_tokens: expected an integer >= 1, got 0"),
        (dict(max_tokens=50, batch_size=0), "batch_size: expected an integer >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            UserSessions(model, **arguments)
    sessions = UserSessions(model, 50)
    for events, message in (
        ([[1]], "events: expected a mapping from users to items, got list"),
        ({"a": 3}, "events: expected a list of items for 'a', got 3"),
        ({}, "expected at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            sessions.score(events)
    with pytest.raises(ValueError, match=r"k: expected 1..18, .* got 19"):
        sessions.recommend({"a": [1, 2], "b": [3]}, k=19)
    with pytest.raises(ValueError, match="expected at least one item"):
        UserSessions(fixed_model("items only"), 50).score({"a": []})
    other = tiny_model(prompt_prefix=[5])
    other.set_attn_implementation("sdpa")
    for score in (lambda: other.score([[1]]), lambda: UserSessions(other, 60).score({"a": [1]})):
        with pytest.raises(ValueError, match="attn_implementation: expected 'spae'"):
            score()


def test_events_follow_their_ids_into_another_catalogue():
    """They are kept as indices, which name other items there."""
    model = tiny_model(prompt_prefix=[5])
    sessions = UserSessions(model, 80)
    sessions.extend({"a": ["id1", "id2", "id3"], "b": ["id4"]})
    model.add_items(ItemCatalogue(["new"], features={"text": torch.ones(1, 7)}))
    assert sessions.history("a") == [1, 2, 3], "items were only added"
    whole_catalogue, kept = model.catalogue, [3, 0, 2, *range(4, 20)]  # without "id1", in another order
    model.set_catalogue(
        ItemCatalogue(
            [whole_catalogue.ids[i] for i in kept],
            features={name: part[kept] for name, part in whole_catalogue.features.items()},
            present={name: part[kept] for name, part in whole_catalogue.present.items()},
        )
    )
    assert sessions.history("a") == [2, 0] and sessions.history("b") == [3]
    scores = sessions.score({"a": ["id5"], "b": []})
    torch.testing.assert_close(scores, whole(model, [[2, 0, 4], [3]]), **NEAR)
