"""Interactions and the leave-one-out split, against plain Python."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speeder.data import Interactions, LeaveOneOut
from speeder.errors import SpeederError

USERS = 4
rows = st.lists(st.tuples(st.integers(0, USERS - 1), st.integers(0, 9), st.integers(-5, 5)), max_size=40)


def build(lines: list[tuple[int, int, int]]) -> Interactions:
    columns = list(zip(*lines, strict=True)) or [(), (), ()]
    return Interactions(
        *(np.array(column, dtype=np.int64) for column in columns), [f"u{u}" for u in range(USERS)]
    )


def by_user(lines: list[tuple[int, int, int]]) -> list[list[int]]:
    ordered = [
        sorted((time, n, item) for n, (u, item, time) in enumerate(lines) if u == user)
        for user in range(USERS)
    ]
    return [[item for _, _, item in entries] for entries in ordered]


@settings(deadline=None)
@given(lines=rows)
def test_sequences_are_sorted_by_time_then_line(lines: list[tuple[int, int, int]]) -> None:
    interactions = build(lines)
    assert [items.tolist() for items in interactions.sequences()] == by_user(lines)
    assert len(interactions) == len(lines)
    assert sorted(zip(interactions.user, interactions.item, interactions.time, strict=True)) == sorted(lines)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(lines=rows)
def test_round_trip(lines: list[tuple[int, int, int]], tmp_path: Path) -> None:
    interactions = build(lines)
    interactions.save(tmp_path / "i.parquet")
    loaded = Interactions.load(tmp_path / "i.parquet")
    assert loaded.user_ids == interactions.user_ids
    for name in ("user", "item", "time"):
        assert getattr(loaded, name).dtype == np.int64
        assert np.array_equal(getattr(loaded, name), getattr(interactions, name))
    assert LeaveOneOut(loaded).hash() == LeaveOneOut(interactions).hash()
    assert [path.name for path in tmp_path.iterdir()] == ["i.parquet"]


@settings(deadline=None)
@given(lines=rows)
def test_leave_one_out_splits_every_user_as_said(lines: list[tuple[int, int, int]]) -> None:
    split = LeaveOneOut(build(lines))
    whole = by_user(lines)
    long = [user for user in range(USERS) if len(whole[user]) >= 3]
    assert split.users("test").tolist() == split.users("validation").tolist() == long
    training = [items.tolist() for items in split.training()]
    assert training == [items[:-2] if len(items) >= 3 else items for items in whole]
    for name, held_out in (("validation", 2), ("test", 1)):
        histories, targets = split.histories(name), split.targets(name)
        assert [items.tolist() for items in histories] == [whole[user][:-held_out] for user in long]
        assert targets.tolist() == [whole[user][-held_out] for user in long]


@settings(deadline=None)
@given(lines=rows, data=st.data())
def test_the_hash_tells_any_other_task_apart(lines: list[tuple[int, int, int]], data: st.DataObject) -> None:
    split = LeaveOneOut(build(lines))
    assert split.hash() == LeaveOneOut(build(lines)).hash()
    long = split.users("test").tolist()
    changeable = [n for n, (user, _, _) in enumerate(lines) if user in long]
    if changeable:
        position = data.draw(st.sampled_from(changeable))
        user, item, time = lines[position]
        changed = [*lines[:position], (user, item + 1, time), *lines[position + 1 :]]
        assert LeaveOneOut(build(changed)).hash() != split.hash()


def test_ratings_of_the_same_second_keep_their_order() -> None:
    lines = [(0, 5, 7), (1, 1, 1), (0, 3, 7), (0, 9, 7), (0, 1, 2)]
    assert build(lines).sequences()[0].tolist() == [1, 5, 3, 9]


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        (([4], [0], [0]), ValueError, r"user must lie in 0\.\.3"),
        (([-1], [0], [0]), ValueError, "user must lie in"),
        (([0], [-2], [0]), ValueError, "item must not be negative"),
        (([0], [0, 1], [0]), ValueError, r"item must be \(1,\)"),
        (([0], [0], [0.5]), TypeError, "time must hold integers"),
        (([[0]], [[0]], [[0]]), ValueError, "shape"),
    ],
)
def test_bad_columns_are_named(columns: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Interactions(*columns, [f"u{u}" for u in range(USERS)])


def test_user_ids_must_be_unique_strings() -> None:
    for user_ids in (["a", "a"], [1, 2]):
        with pytest.raises(ValueError, match="unique strings"):
            Interactions([0], [0], [0], user_ids)


def test_an_unknown_split_is_named() -> None:
    split = LeaveOneOut(build([]))
    for method in (split.users, split.histories, split.targets):
        with pytest.raises(ValueError, match="'train'"):
            method("train")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "i.parquet"
    with pytest.raises(SpeederError, match=r"i\.parquet is missing"):
        Interactions.load(path)
    build([(0, 1, 2)]).save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SpeederError, match=r"i\.parquet does not hold readable interactions"):
        Interactions.load(path)
