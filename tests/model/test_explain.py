"""Explanations are what they say: scores with and without a history item, and the gate's own weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder.model.explain import explain, leave_one_out
from tests.model.worlds import tiny_model

ITEMS = 20


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_history=6)


@pytest.fixture(scope="module")
def prompted():
    return tiny_model(max_history=6, prompt_prefix=[5, 6], prompt_suffix=[7, 8])


@settings(max_examples=25, deadline=None)
@given(
    history=st.lists(st.integers(0, ITEMS - 1), min_size=2, max_size=9),
    items=st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=5),
)
def test_changes_are_those_of_scoring_the_history_without_each_entry(model, history, items):
    """Histories with repeats, and longer than what is read, among them."""
    scores, changes = leave_one_out(model, history, items, batch_size=3)
    read = history[-6:]
    whole = model.score([read])[0]
    torch.testing.assert_close(scores, whole[items], rtol=1e-4, atol=1e-4)
    assert changes.shape == (len(read), len(items))
    for j in range(len(read)):
        without = model.score([[*read[:j], *read[j + 1 :]]])[0]
        torch.testing.assert_close(changes[j], (whole - without)[items], rtol=1e-4, atol=2e-4)


def test_an_explanation_names_items_scores_gates_and_effects(model):
    history, items = ["id3", "id7", "id11"], ["id1", "id15"]
    found = explain(model, history, items)
    scores, changes = leave_one_out(model, history, items)
    gates = model.gates()
    assert [(e.id, e.item, e.title) for e in found] == [("id1", 1, "Title 1"), ("id15", 15, "Title 15")]
    for column, explanation in enumerate(found):
        assert explanation.score == pytest.approx(float(scores[column]))
        assert explanation.gates == pytest.approx({n: float(w[explanation.item]) for n, w in gates.items()})
        assert sum(explanation.gates.values()) == pytest.approx(1, abs=1e-5)
        absent = [n for n in explanation.gates if not model.catalogue.present[n][explanation.item]]
        assert all(explanation.gates[name] == 0 for name in absent)
        assert [effect.id for effect in explanation.history] == history
        assert [effect.change for effect in explanation.history] == pytest.approx(changes[:, column].tolist())


def test_a_history_item_that_is_made_to_matter_matters_most(prompted):
    """A recommendation that rests on one entry says so: the change is the fall of the score, not its opposite."""
    whole = prompted.score([[2, 9, 4]])[0]
    falls = {entry: whole - prompted.score([[i for i in (2, 9, 4) if i != entry]])[0] for entry in (2, 9, 4)}
    item = int(falls[9].argmax())  # the item whose score falls most without entry 9
    effects = {e.item: e.change for e in explain(prompted, [2, 9, 4], [item])[0].history}
    assert effects[9] > 0 and effects == pytest.approx(
        {k: float(v[item]) for k, v in falls.items()}, abs=1e-4
    )


def test_a_single_entry_has_an_effect_only_beside_a_prompt(model, prompted):
    alone = explain(model, [4], [1])[0]
    assert alone.history[0].change is None
    assert alone.score == pytest.approx(float(model.score([[4]])[0, 1]), abs=1e-4)
    beside = explain(prompted, [4], [1])[0]
    expected = prompted.score([[4]])[0, 1] - prompted.score([[]])[0, 1]
    assert beside.history[0].change == pytest.approx(float(expected), abs=1e-4)


def test_mistakes_are_named_and_the_mode_stays(model):
    with pytest.raises(ValueError, match="history: expected at least one item"):
        explain(model, [], [1])
    with pytest.raises(ValueError, match="items: expected at least one item to explain"):
        explain(model, [1], [])
    with pytest.raises(ValueError, match="expected lists"):
        explain(model, "id1", [1])
    with pytest.raises(KeyError, match="nothing"):
        explain(model, ["nothing"], [1])
    with pytest.raises(ValueError, match=r"0\.\.19"):
        explain(model, [1], [20])
    model.train()
    try:
        explain(model, [1, 2], [3])
        assert model.training
    finally:
        model.eval()
