"""Which items may be recommended, unknown ids, and new users: against a ranking of all scores, done by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder.cli import recommend
from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError
from speeder.model import choice
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.popularity import FILE, ItemCounts
from speeder.retrieval.shards import TokenShards, write_token_shards
from speeder.serving.sessions import UserSessions
from tests.model.worlds import tiny_catalogue, tiny_model

TRAINING = [[3, 3, 5], [5, 7], [3]]  # 3 three times, 5 twice, 7 once
GENRES = ["Drama", "Comedy", None, "Noir"] * 5


def made(**config) -> SpeederForCausalLM:
    model = tiny_model(**config)
    model.set_catalogue(model.catalogue.with_columns({"genre": GENRES}))
    model.set_item_counts(TRAINING)
    return model


MODEL = made()
SCORES = MODEL.score([[1, 2]])[0]
items = st.lists(st.integers(0, 19), max_size=12)


def ids(recommended) -> list[str]:
    return [item.id for item in recommended]


def by_hand(scores: torch.Tensor, may: set[int], k: int) -> list[str]:
    best = sorted(may, key=lambda item: (-float(scores[item]), item))[:k]
    return [f"id{item}" for item in best]


@settings(deadline=None)
@given(
    st.none() | items,
    items,
    st.none() | st.sets(st.sampled_from(["Drama", "Comedy", "Noir", "x"])),
    st.booleans(),
)
def test_lists_and_columns_choose_what_they_say(allow, deny, genres, exclude_seen):
    may = set(range(20)) - set(deny) - ({1, 2} if exclude_seen else set())
    may &= set(range(20) if allow is None else allow)
    may &= {item for item in range(20) if genres is None or GENRES[item] in genres}
    asked = dict(allow=allow, deny=deny, where=None if genres is None else {"genre": sorted(genres)})
    calls = (
        lambda k: MODEL.recommend([[1, 2]], k, exclude_seen, **asked)[0],
        lambda k: UserSessions(MODEL, 4096).recommend({"u": [1, 2]}, k, exclude_seen, **asked)["u"],
    )
    for call in calls:
        if may:
            found = call(len(may))
            assert ids(found) == by_hand(SCORES, may, len(may))
            torch.testing.assert_close(
                torch.tensor([item.score for item in found]), SCORES[[item.item for item in found]]
            )
        with pytest.raises(
            ValueError, match=rf"k: expected 1\.\.{len(may)}, the items .*, got {len(may) + 1}"
        ):
            call(len(may) + 1)


def test_every_user_of_a_batch_has_the_own_hidden_items_and_stores_choose_too(tmp_path):
    histories, allow = [[1], [2, 3], ["id4", 5, 6]], ["id9", 3, 2, 1, 12, 5]
    plain = MODEL.score(histories)
    store = made()
    write_token_shards(store, tmp_path / "shards", shard_items=7)
    store.use_item_store(TokenShards(tmp_path / "shards"))
    for model in (MODEL, store):
        found = model.recommend(histories, k=3, allow=allow, batch_size=2)
        for history, row, scores in zip([{1}, {2, 3}, {4, 5, 6}], found, plain, strict=True):
            assert ids(row) == by_hand(scores, {9, 3, 2, 1, 12, 5} - history, 3)


def test_unknown_ids_are_an_error_unless_they_are_to_be_skipped():
    for asked in ({"histories": [["id1", "no"]]}, {"allow": ["no"]}, {"deny": ["no"]}):
        with pytest.raises(KeyError, match="'no'"):
            MODEL.recommend(**{"histories": [[1]]} | asked)
    same = MODEL.recommend([["id1", 2]], deny=["id3"])
    assert MODEL.recommend([["no", "id1", "nor", 2]], deny=["id3", "no"], unknown="skip") == same
    with pytest.raises(ValueError, match="expected item indices"):  # an index is no id: this is a slip
        MODEL.recommend([[99]], unknown="skip")
    with pytest.raises(ValueError, match="empty history at 1"):
        MODEL.recommend([[1], ["no"]], unknown="skip")
    sessions = UserSessions(MODEL, 4096)
    sessions.recommend({"u": ["id1", "no"]}, unknown="skip")
    assert sessions.history("u") == [1]


def test_new_users_get_what_is_popular_and_others_what_the_model_says():
    found = MODEL.recommend([[], [1, 2], ["no"]], k=4, unknown="skip", fallback="popularity")
    assert ids(found[0]) == ids(found[2]) == ["id3", "id5", "id7", "id0"]
    assert [item.score for item in found[0]] == [3.0, 2.0, 1.0, 0.0]
    assert found[1] == MODEL.recommend([[1, 2]], k=4)[0]
    chosen = MODEL.recommend([[]], k=2, deny=[3], where={"genre": "Noir"}, fallback="popularity")[0]
    assert ids(chosen) == ["id7", "id11"]
    with pytest.raises(ValueError, match="empty history at 0"):
        MODEL.recommend([[]])


def test_a_prompt_reads_an_empty_history_unless_the_fallback_is_asked_for():
    model = made(prompt_prefix=[5, 6])
    assert model.recommend([[]], k=3) != model.recommend([[]], k=3, fallback="popularity")


def test_counts_follow_ids_and_are_saved(tmp_path):
    MODEL.save_pretrained(tmp_path / "model")
    loaded = SpeederForCausalLM.from_pretrained(tmp_path / "model")
    popular = MODEL.recommend([[]], k=3, fallback="popularity")
    assert loaded.recommend([[]], k=3, fallback="popularity") == popular
    assert loaded.catalogue.columns == {"genre": GENRES}
    backwards = loaded.catalogue.select(range(19, -1, -1))
    other = SpeederForCausalLM.from_pretrained(tmp_path / "model", catalogue=backwards)
    assert ids(other.recommend([[]], k=3, fallback="popularity")[0]) == ids(popular[0])
    more = tiny_catalogue(2, seed=3)
    new = ItemCatalogue(["new0", "new1"], more.titles, features=more.features, present=more.present)
    loaded.add_items(new)
    assert ids(loaded.recommend([[]], k=22, fallback="popularity")[0])[-2:] == ["new0", "new1"]
    assert loaded.catalogue.columns["genre"] == [*GENRES, None, None]
    (tmp_path / "model" / FILE).write_bytes(b"not a table")
    with pytest.raises(SpeederError, match="does not hold readable counts"):
        SpeederForCausalLM.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / FILE).unlink()
    old = SpeederForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(
        SpeederError, match="fallback: expected a recommender with training counts, found none"
    ):
        old.recommend([[]], fallback="popularity")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"unknown": "ignore"}, "unknown: expected one of error, skip, got 'ignore'"),
        ({"fallback": "content"}, "fallback: expected one of popularity, got 'content'"),
        (
            {"where": {"colour": ["red"]}},
            r"where: expected a column of the catalogue \(genre\), got 'colour'",
        ),
        ({"allow": [1.5]}, "expected item indices as integers, got 1.5"),
        ({"deny": "id3"}, "expected a list of items"),
        ({"k": True}, "k: expected a whole number, got bool"),
    ],
)
def test_wrong_choices_are_named(asked, message):
    with pytest.raises((TypeError, ValueError), match=message):
        MODEL.recommend([[1]], **asked)


def test_the_commands_words_are_the_models():
    assert (recommend.UNKNOWN, recommend.FALLBACKS) == (choice.UNKNOWN, choice.FALLBACKS)


def test_columns_fit_the_catalogue(tmp_path):
    catalogue = tiny_catalogue(3).with_columns({"genre": ["a", None, "b"], "year": ["1", "2", "3"]})
    catalogue.save(tmp_path / "saved")
    assert ItemCatalogue.load(tmp_path / "saved").columns == catalogue.columns
    assert catalogue.select([2, 0]).columns == {"genre": ["b", "a"], "year": ["3", "1"]}
    for columns in (
        {"genre": ["a"]},
        {"title": ["a", "b", "c"]},
        {"genre": [1, 2, 3]},
        {"": ["a", "b", "c"]},
    ):
        with pytest.raises((TypeError, ValueError)):
            catalogue.with_columns(columns)


def test_counts_are_those_of_a_plain_count():
    catalogue = tiny_catalogue()
    sequences = [np.array([1, 2, 2]), np.array([], dtype=np.int64), [19]]
    counts = ItemCounts.of_sequences(sequences, catalogue).in_catalogue(catalogue)
    assert counts.tolist() == [[1, 2, 2, 19].count(i) for i in range(20)]
    with pytest.raises(IndexError, match=r"expected items in 0\.\.19"):
        ItemCounts.of_sequences([[20]], catalogue)
