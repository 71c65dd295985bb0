"""The temporal split, against plain Python, and the record of splits and ties in a manifest."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from speeder.data import Interactions, ItemCatalogue, LeaveOneOut, PreparedData
from speeder.data.interactions import FILE_ORDER
from speeder.data.prepared import saved_split
from speeder.data.temporal_split import DATES, TemporalSplit, as_date, recorded_split
from speeder.errors import SpeederError

USERS = 4
rows = st.lists(st.tuples(st.integers(0, USERS - 1), st.integers(0, 9), st.integers(0, 12)), max_size=40)
dates = st.tuples(st.integers(0, 13), st.integers(0, 13)).filter(lambda pair: pair[0] < pair[1])
SHUFFLED = {"order": "shuffle", "seed": 0}


def build(lines: list[tuple[int, int, int]]) -> Interactions:
    columns = list(zip(*lines, strict=True)) or [(), (), ()]
    return Interactions(
        *(np.array(column, dtype=np.int64) for column in columns), [f"u{u}" for u in range(USERS)]
    )


def of_user(lines: list[tuple[int, int, int]], user: int) -> list[tuple[int, int]]:
    """(time, item) of a user, in order."""
    return [(time, item) for who, item, time in sorted(lines, key=lambda line: line[2]) if who == user]


@settings(deadline=None, max_examples=50)
@given(lines=rows, dates=dates)
def test_users_are_split_at_the_same_dates(lines: list[tuple[int, int, int]], dates: tuple[int, int]) -> None:
    first, second = dates
    split = TemporalSplit(build(lines), first, second)
    whole = [of_user(lines, user) for user in range(USERS)]
    for user, items in enumerate(split.training()):
        assert items.tolist() == [item for time, item in whole[user] if time < first]
    for name, start, end in (("validation", first, second), ("test", second, 99)):
        expected = {}
        for user in range(USERS):
            history = [item for time, item in whole[user] if time < start]
            later = [item for time, item in whole[user] if start <= time < end]
            if history and later:
                expected[user] = (history, later[0])
        assert split.users(name).tolist() == [*expected]
        histories = [items.tolist() for items in split.histories(name)]
        assert [*zip(histories, split.targets(name).tolist(), strict=True)] == [*expected.values()]


@settings(deadline=None, max_examples=50)
@given(lines=rows, dates=dates)
def test_no_target_is_before_the_end_of_training(lines, dates) -> None:
    interactions = build([(user, place, time) for place, (user, _, time) in enumerate(lines)])  # an item each
    when = {item: time for item, (_, _, time) in enumerate(lines)}
    split = TemporalSplit(interactions, *dates)
    trained = [when[item] for items in split.training() for item in items.tolist()]
    validated = [when[item] for item in split.targets("validation").tolist()]
    tested = [when[item] for item in split.targets("test").tolist()]
    assert max(trained, default=-1) < min([*validated, *tested], default=99)
    assert max(validated, default=-1) < min(tested, default=99)
    read = [when[item] for items in split.histories("test") for item in items.tolist()]
    assert max(read, default=-1) < min(tested, default=99)


@settings(deadline=None, max_examples=25)
@given(lines=rows, dates=dates, other=dates)
def test_the_hash_tells_dates_ties_and_training_apart(lines, dates, other) -> None:
    assume(dates != other)
    interactions = build(lines)
    split = TemporalSplit(interactions, *dates)
    assert split.hash() == TemporalSplit(build(lines), *dates, FILE_ORDER).hash()
    others = [
        LeaveOneOut(interactions),
        LeaveOneOut(interactions, SHUFFLED),
        TemporalSplit(interactions, *other),
        TemporalSplit(interactions, *dates, SHUFFLED),
        TemporalSplit(interactions, *dates, SHUFFLED | {"seed": 1}),
        # a user who only trains has no history in the hash, but trains the model
        TemporalSplit(build([*lines, (0, 1, -1)]), *dates),
    ]
    assert len({split.hash(), *(each.hash() for each in others)}) == 1 + len(others)


def test_with_one_step_for_all_it_is_leave_one_out() -> None:
    lines = [(user, (3 * user + time) % 7, time) for user in range(USERS) for time in range(6)]
    temporal, left_out = TemporalSplit(build(lines), 4, 5), LeaveOneOut(build(lines))
    assert [*map(list, temporal.training())] == [*map(list, left_out.training())]
    for name in ("validation", "test"):
        assert temporal.targets(name).tolist() == left_out.targets(name).tolist()
        assert [*map(list, temporal.histories(name))] == [*map(list, left_out.histories(name))]
    part = temporal.part(1, 2)
    assert part.users("test").tolist() == part.users("validation").tolist() == [1, 3]
    assert [*map(list, part.training())] == [*map(list, temporal.training())]


def test_titles_tell_what_the_hash_covers() -> None:
    assert LeaveOneOut(build([])).title == LeaveOneOut.title == "Leave one out"
    assert LeaveOneOut(build([]), SHUFFLED).title == "Leave one out, ties: order shuffle, seed 0"
    title = TemporalSplit(build([]), 0, 86_400, SHUFFLED).title
    assert title.startswith(
        "Temporal split (training before 1970-01-01, test targets from 1970-01-02 on), ties: order"
    )


def test_dates_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match="validation_from must be below test_from, but they are 5 and 5"):
        TemporalSplit(build([]), 5, 5)


def test_dates_are_shown_without_needless_midnights() -> None:
    assert as_date(0) == "1970-01-01"
    assert as_date(86_400 + 61) == "1970-01-02T00:01:01Z"


LINES = [(0, 1, 1), (0, 2, 2), (0, 3, 5), (0, 4, 8), (1, 1, 2), (1, 3, 6), (2, 5, 1)]


def test_prepared_data_follow_their_manifest(tmp_path: Path) -> None:
    catalogue = ItemCatalogue([f"i{n}" for n in range(6)], [""] * 6)
    plain = PreparedData(catalogue, build(LINES))
    assert isinstance(plain.split, LeaveOneOut) and plain.split.ties == FILE_ORDER
    manifest = {"ties": SHUFFLED, DATES: {"validation_from": 4, "test_from": 6}}
    data = PreparedData(catalogue, build(LINES), manifest)
    assert isinstance(data.split, TemporalSplit) and data.split.ties == SHUFFLED
    data.save(tmp_path / "data")
    loaded = PreparedData.load(tmp_path / "data")
    assert loaded.split.hash() == data.split.hash() == saved_split(tmp_path / "data")
    assert loaded.split.hash() != plain.split.hash()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({DATES: {"validation_from": 4}}, "split_dates: expected validation_from and test_from"),
        ({DATES: [4, 6]}, "split_dates: expected validation_from and test_from"),
        ({DATES: {"validation_from": 6, "test_from": 4}}, "split_dates: expected"),
        ({"ties": "shuffle"}, "ties: expected a rule such as"),
    ],
)
def test_a_damaged_record_is_named(manifest: dict, message: str) -> None:
    with pytest.raises(SpeederError, match=message):
        recorded_split(build(LINES), manifest)
