"""Candidate files: uniform, independent of targets but for their absence, the same for ever, and refused elsewhere."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder.data.interactions import Interactions, LeaveOneOut
from speeder.errors import SpeederError
from speeder.evaluation.candidates import Candidates, draw_items
from speeder.evaluation.leaks import LeakError, check_candidates

NUM_ITEMS = 60


def split_of(sequences) -> LeaveOneOut:
    users = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    items = np.concatenate(sequences)
    return LeaveOneOut(
        Interactions(users, items, np.arange(len(items)), [f"u{u}" for u in range(len(sequences))])
    )


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(0)
    return [rng.integers(0, NUM_ITEMS, rng.integers(1, 12)) for _ in range(80)]


@pytest.fixture(scope="module")
def split(sequences):
    return split_of(sequences)


@pytest.mark.parametrize("name", ["test", "validation"])
def test_negatives_lie_outside_the_history_and_are_not_the_target(split, name):
    drawn = Candidates.draw(split, name, NUM_ITEMS, 19)
    assert drawn.negatives.shape == (len(split.users(name)), 19)
    for row, history, target in zip(drawn.negatives, split.histories(name), split.targets(name), strict=True):
        assert len(set(row)) == 19 and not set(row) & {*history.tolist(), int(target)}
    listed = drawn.listed(split.targets(name))
    assert all(set(row) == {*some, target} for row, some, target in zip(
        listed, drawn.negatives, split.targets(name), strict=True))  # fmt: skip


def test_a_draw_is_the_same_for_ever():
    """Numbers that a published candidate file rests on: they must not change with any library or rewrite."""
    assert draw_items(0, "test", 3, 5, 100, {1, 2}) == [68, 56, 11, 21, 45]
    assert draw_items(7, "validation", 0, 5, 12101, ()) == [6010, 478, 288, 4402, 4309]


@settings(max_examples=30)
@given(st.integers(0, 2**40), st.integers(0, NUM_ITEMS - 1), st.integers(0, 10_000))
def test_another_target_changes_nothing_but_its_own_absence(seed, target, user):
    """The stream without any target, less the target, is what is drawn: no other trace of it is left."""
    history = {1, 5, 9}
    stream = draw_items(seed, "test", user, 20, NUM_ITEMS, history)
    drawn = draw_items(seed, "test", user, 19, NUM_ITEMS, history | {target})
    assert drawn == [item for item in stream if item != target][:19]


def test_the_draw_is_uniform_and_the_targets_place_in_a_prompt_too():
    many = split_of([np.array([0, 1, 2, 3])] * 4000)
    drawn = Candidates.draw(many, "test", NUM_ITEMS, 19)
    counts = np.bincount(drawn.negatives.ravel(), minlength=NUM_ITEMS)
    assert not counts[:4].any()
    expected = 4000 * 19 / (NUM_ITEMS - 4)
    assert np.square(counts[4:] - expected).sum() / expected < 100  # chi-square of 55 degrees, p about 2e-4
    places = np.bincount((drawn.listed(many.targets("test")) == 3).argmax(axis=1), minlength=20)
    assert np.square(places - 200).sum() / 200 < 50


def test_saved_and_loaded_is_the_same(split, tmp_path):
    drawn = Candidates.draw(split, "test", NUM_ITEMS, 19, seed=3)
    drawn.save(tmp_path / "candidates.json")
    loaded = Candidates.load(tmp_path / "candidates.json")
    assert loaded.hash() == drawn.hash() and np.array_equal(loaded.negatives, drawn.negatives)
    check_candidates(loaded, split, NUM_ITEMS)
    assert Candidates.draw(split, "test", NUM_ITEMS, 19, seed=4).hash() != drawn.hash()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("speeder-candidates-1", "speeder-candidates-9", "expected candidates of speeder-candidates-1"),
        ('"seed": 3', '"seed": 4', "content has changed"),
        ("[0,[", "[0,[1,", "not readable"),
        ('"users"', '"', "JSON"),
    ],
)
def test_a_damaged_file_is_refused(split, tmp_path, old, new, message):
    path = tmp_path / "candidates.json"
    Candidates.draw(split, "test", NUM_ITEMS, 19, seed=3).save(path)
    text = path.read_text()
    path.write_text(text.replace(old, new, 1) if old in text else text[: len(text) // 2])
    with pytest.raises(SpeederError, match=message):
        Candidates.load(path)


def test_candidates_of_another_split_are_refused(split, sequences):
    drawn = Candidates.draw(split, "test", NUM_ITEMS, 19)
    with pytest.raises(SpeederError, match="drawn for the split"):
        check_candidates(drawn, split_of([*sequences[:-1], np.array([1, 2, 3])]), NUM_ITEMS)
    with pytest.raises(LeakError, match="not over the users"):
        check_candidates(replace(drawn, users=drawn.users[::-1]), split, NUM_ITEMS)


def seeded_by_target(split, user, target, history):
    return np.random.default_rng(target).permutation(np.setdiff1d(np.arange(NUM_ITEMS), [*history, target]))[
        :19
    ]


def near_the_target(split, user, target, history):
    outside = np.setdiff1d(np.arange(NUM_ITEMS), [*history, target])
    return outside[np.argsort(abs(outside - target), kind="stable")[:19]]


def one_swapped(split, user, target, history):
    drawn = draw_items(0, "test", user, 20, NUM_ITEMS, {*history.tolist(), int(target)})
    return drawn[:18] + drawn[19:] if user == 40 else drawn[:19]


@pytest.mark.parametrize("plant", [seeded_by_target, near_the_target, one_swapped])
def test_negatives_that_depend_on_the_target_are_caught(split, tmp_path, plant):
    """A planted file with a sound format and a right hash."""
    rows = zip(split.users("test"), split.targets("test"), split.histories("test"), strict=True)
    planted = np.array([plant(split, *row) for row in rows])
    honest = Candidates.draw(split, "test", NUM_ITEMS, 19)
    replace(honest, negatives=planted).save(tmp_path / "planted.json")
    with pytest.raises(LeakError, match="not those of seed 0"):
        check_candidates(Candidates.load(tmp_path / "planted.json"), split, NUM_ITEMS)


def test_negatives_drawn_over_a_few_items_are_caught(split, tmp_path):
    """A sound file of its seed, but over the first 40 items alone, such as the popular ones."""
    Candidates.draw(split, "test", 40, 19).save(tmp_path / "few.json")
    with pytest.raises(LeakError, match=f"drawn over 40 items, the catalogue has {NUM_ITEMS}"):
        check_candidates(Candidates.load(tmp_path / "few.json"), split, NUM_ITEMS)


def test_too_few_items_are_a_readable_error(split):
    with pytest.raises(SpeederError, match=r"expected at most .* outside the history of test number"):
        Candidates.draw(split, "test", NUM_ITEMS, 59)
    with pytest.raises(SpeederError, match="at least 1"):
        Candidates.draw(split, "test", NUM_ITEMS, 0)
