"""Equal times: shuffled by a seed, and nothing else changes; and the refusals of rules that fit no data."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder.data import PreparedData
from speeder.data.interactions import FILE_ORDER
from speeder.data.temporal_split import DATES, TemporalSplit
from speeder.errors import SpeederError
from speeder.evaluation.leaks import check_split
from speeder.prepare.pipeline import prepare, prepare_ml100k
from speeder.prepare.ties import Ties

ITEMS = [f"item {n}" for n in range(12)]
NAMES = [f"user {n}" for n in range(4)]
events = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 11), st.integers(0, 2)),
    min_size=1,
    max_size=40,
    unique_by=lambda row: row[:2],
).filter(lambda rows: len({(user, time) for user, _, time in rows}) > len({user for user, *_ in rows}))


def ordered(rows: list[tuple[int, int, int]], ties: Ties) -> list[tuple[int, int, int]]:
    """(user, time, item) by the rule."""
    user, item, time = (np.array(column) for column in zip(*rows, strict=True))
    order = ties.sort(user, item, time, NAMES, ITEMS)
    return [*zip(user[order].tolist(), time[order].tolist(), item[order].tolist(), strict=True)]


@settings(deadline=None)
@given(rows=events, seed=st.integers(0, 99), random=st.randoms())
def test_a_shuffle_changes_ties_alone(rows, seed, random) -> None:
    kept, shuffled = ordered(rows, Ties()), ordered(rows, Ties("shuffle", seed))
    assert sorted(shuffled) == sorted(kept)
    assert [row[:2] for row in shuffled] == [row[:2] for row in kept]
    assert ordered(rows, Ties("shuffle", seed)) == shuffled  # the same seed
    random.shuffle(rows)
    assert ordered(rows, Ties("shuffle", seed)) == shuffled  # whatever the file's order
    alone = [row for row in rows if row[0] == rows[0][0]]
    if len({time for *_, time in alone}) > 1:  # and whoever else is in it
        assert ordered(alone, Ties("shuffle", seed)) == [row for row in shuffled if row[0] == rows[0][0]]


def test_every_order_of_a_tie_is_as_likely() -> None:
    rows = [(0, 0, 0), (0, 1, 1), (0, 2, 1), (0, 3, 1)]
    found = [tuple(item for *_, item in ordered(rows, Ties("shuffle", seed))) for seed in range(600)]
    counts = {order: found.count(order) for order in set(found)}
    assert len(counts) == 6 and min(counts.values()) > 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("random",), "ties: expected one of file, shuffle, got 'random'"),
        (("file", 3), "ties seed: expected a number from 0, with ties 'shuffle', got 3"),
        (("shuffle", -1), "ties seed: expected a number from 0, .* got -1"),
    ],
)
def test_wrong_rules_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(SpeederError, match=message):
        Ties(*arguments)


def test_where_one_time_is_all_that_a_user_has_there_is_nothing_to_keep() -> None:
    rows = [(0, 0, 5), (0, 1, 5), (1, 2, 7), (1, 3, 7)]
    assert [item for *_, item in ordered(rows, Ties())] == [0, 1, 2, 3]
    with pytest.raises(SpeederError, match="ties: expected 'file', since all interactions of each user"):
        ordered(rows, Ties("shuffle"))


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Six users, three events a day on four days, always in the order of the items' names."""
    days = [f"2024-03-1{day}" for day in range(4)]
    lines = [
        f"u{user},i{3 * day + n},{when}"
        for user in range(6)
        for day, when in enumerate(days)
        for n in range(3)
    ]
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "interactions.csv").write_text("\n".join(["user,item,timestamp", *lines, ""]))
    return folder


def made(shop: Path, **how) -> PreparedData:
    data = prepare("plain", shop, shop.parent / "out", modalities=[], **how)
    check_split(data.split, data.interactions)
    return data


def test_the_rule_is_recorded_and_hashed(shop: Path) -> None:
    kept, shuffled = made(shop), made(shop, ties="shuffle")
    other = made(shop, ties="shuffle", ties_seed=4)
    assert kept.manifest["ties"] == FILE_ORDER
    assert other.manifest["ties"] == {"order": "shuffle", "seed": 4}
    assert kept.manifest | {"ties": None} == other.manifest | {"ties": None}
    assert len({kept.split.hash(), shuffled.split.hash(), other.split.hash()}) == 3
    assert made(shop, ties="shuffle").split.hash() == shuffled.split.hash()
    assert kept.split.targets("test").tolist() != shuffled.split.targets("test").tolist()
    assert np.array_equal(kept.interactions.time, shuffled.interactions.time)
    assert kept.catalogue.ids == shuffled.catalogue.ids


def test_ties_are_of_the_raw_times_and_not_of_whole_seconds(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    lines = "".join(f"u,i{n},2024-03-14T09:10:00.{n:03}\n" for n in range(9))
    file.write_text(f"user,item,timestamp\n{lines}")
    data = prepare("plain", file, tmp_path / "out", modalities=[], ties="shuffle")
    assert [data.catalogue.ids[n] for n in data.interactions.item] == [f"i{n}" for n in range(9)]


def test_dates_and_shares_give_a_temporal_split(shop: Path) -> None:
    dates = made(shop, split="temporal", split_time=["2024-03-12", "2024-03-13"])
    assert isinstance(dates.split, TemporalSplit)
    assert dates.manifest[DATES] == {"validation_from": 1_710_201_600, "test_from": 1_710_288_000}
    assert dates.manifest["split"].startswith("temporal: interactions before 2024-03-12 train; ")
    assert [len(items) for items in dates.split.training()] == [6] * 6
    assert [dates.catalogue.ids[n] for n in dates.split.targets("test")] == ["i9"] * 6
    shares = made(shop, split="temporal", split_time=["0.5", "0.75"])
    assert shares.split.hash() == dates.split.hash()
    # by default 0.8 and 0.9, here both in the last day
    with pytest.raises(SpeederError, match="a validation date before the test date, got 2024-03-13 and 2024"):
        made(shop, split="temporal")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"split": "random"}, "split: expected one of leave-one-out, temporal, got 'random'"),
        ({"split_time": [0.5, 0.6]}, "two dates or shares, .* with --split temporal, got 0.5 0.6 with leave"),
        ({"split": "temporal", "split_time": [0.5]}, "expected two dates or shares"),
        ({"split": "temporal", "split_time": ["soon", 0.5]}, "a date such as 2014-01-31, .* got 'soon'"),
        ({"split": "temporal", "split_time": ["2014", 0.5]}, "a date such as 2014-01-31, .* got '2014'"),
        ({"split": "temporal", "split_time": [0.5, 1.5]}, "a date such as 2014-01-31, .* got 1.5"),
        (
            {"split": "temporal", "split_time": ["2023-01-01", 0.5]},
            "no user has a validation target; the temporal split needs users with an interaction before a date",
        ),
        ({"split": "temporal", "split_time": [0.5, "2025-01-01"]}, "no user has a test target"),
        ({"ties": "random"}, "ties: expected one of"),
    ],
)
def test_dates_that_leave_nothing_are_refused(shop: Path, how: dict, message: str) -> None:
    with pytest.raises(SpeederError, match=message):
        made(shop, **how)
    assert not (shop.parent / "out").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"ties": "shuffle"}, "ties: expected 'file' for data without times, whose lines are in order"),
        ({"split": "temporal"}, "split: expected 'leave-one-out' for data without times, got 'temporal'"),
    ],
)
@pytest.mark.parametrize("name", ["sequences", "microlens"])
def test_data_without_times_refuse_both(tmp_path: Path, name: str, how: dict, message: str) -> None:
    file = tmp_path / ("x_pairs.tsv" if name == "microlens" else "sequences.txt")
    file.write_text("u a b c d\nv b c d\n")
    with pytest.raises(SpeederError, match=message):
        prepare(name, file, tmp_path / "out", modalities=[], **how)
    assert prepare(name, file, tmp_path / "out", modalities=[]).manifest["ties"] == FILE_ORDER


def test_movielens_100k_as_an_asset_takes_both(tmp_path: Path) -> None:
    (tmp_path / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        + "".join(f"{item}\tFilm {item}\t1990\tDrama\n" for item in range(1, 9))
    )
    (tmp_path / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        + "".join(f"{user}\t{item}\t5\t{item // 2}\n" for user in range(1, 9) for item in range(1, 9))
    )
    kept, other = (
        prepare_ml100k(
            tmp_path / "out",
            source=tmp_path,
            modalities=[],
            ties=ties,
            split="temporal",
            split_time=[0.5, 0.7],
        )
        for ties in ("file", "shuffle")
    )
    assert other.manifest["ties"] == {"order": "shuffle", "seed": 0}
    assert kept.manifest[DATES] == other.manifest[DATES]
    assert np.array_equal(kept.interactions.time, other.interactions.time)
    assert not np.array_equal(kept.interactions.item, other.interactions.item)
    check_split(other.split, other.interactions)
