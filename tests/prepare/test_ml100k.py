"""Reading MovieLens-100K: the real files in full, and broken ones line by line."""

import logging
from collections import Counter
from pathlib import Path

import pytest

from speeder.data import PreparedData
from speeder.errors import SpeederError
from speeder.prepare.readers.ml100k import read_ml100k

ITEMS = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
INTERACTIONS = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


@pytest.fixture(scope="module")
def real(ml100k_folder: Path) -> PreparedData:
    return read_ml100k(ml100k_folder)


def write(folder: Path, items: bytes, interactions: bytes) -> Path:
    (folder / "ml-100k.item").write_bytes(ITEMS.encode() + items)
    (folder / "ml-100k.inter").write_bytes(INTERACTIONS.encode() + interactions)
    return folder


def test_everything_real_is_kept(real: PreparedData) -> None:
    assert (len(real.catalogue), len(real.interactions)) == (1682, 100_000)
    assert real.interactions.user_ids == [str(user) for user in range(1, 944)]
    assert len(real.split.users("test")) == 943
    assert real.manifest["items"] == {"read": 1682, "kept": 1682, "dropped": {}, "without_text": 1}
    assert real.manifest["interactions"] == {"read": 100_000, "kept": 100_000, "dropped": {}}


def test_real_titles_read_naturally(real: PreparedData) -> None:
    catalogue = real.catalogue
    assert catalogue.titles[0] == "Toy Story (1995)"
    assert catalogue.texts[0] == "Toy Story (1995). Genres: Animation, Children's, Comedy."
    assert catalogue.titles[catalogue.index_of("12")] == "The Usual Suspects (1995)"
    # The one film whose year column holds something else, and the one without a title.
    row = catalogue.index_of("1412")
    assert catalogue.titles[row] == "Land Before Time III: The Time of the Great Giving (1995)"
    unknown = catalogue.index_of("267")
    assert (catalogue.titles[unknown], catalogue.texts[unknown]) == ("", "")


def test_real_histories_match_the_raw_lines(real: PreparedData, ml100k_folder: Path) -> None:
    lines = (ml100k_folder / "ml-100k.inter").read_text().splitlines()[1:]
    raw = [line.split("\t") for line in lines]
    mine = [
        (int(float(time)), number, item) for number, (user, item, _, time) in enumerate(raw) if user == "42"
    ]
    sequence = real.interactions.sequences()[real.interactions.user_ids.index("42")]
    assert [real.catalogue.ids[item] for item in sequence] == [item for _, _, item in sorted(mine)]
    assert Counter(real.interactions.time.tolist()) == Counter(int(float(row[3])) for row in raw)


def test_broken_lines_are_counted_and_logged_by_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = b"1\tHeat\t1995\tAction Crime\n2\tBad\n1\tAgain\t1995\t\n\n3\t\xff\xfe\t1995\tDrama\n"
    items += b"4\tAlien, The\t1979\t\n"
    interactions = (
        b"9\t1\t5\t100\n10\t1\t5\t50.0\n9\t4\t3\t20\r\n9\t3\t1\t1\n9\t1\t2\t7\n"
        b"9\t4\n10\t4\t1\tnoon\n10\t4\t1\tinf\n\t4\t1\t1\n"
    )
    with caplog.at_level(logging.WARNING):
        data = read_ml100k(write(tmp_path, items, interactions))
    assert data.catalogue.ids == ["1", "4"]
    assert data.catalogue.texts == ["Heat (1995). Genres: Action, Crime.", "The Alien (1979)."]
    assert data.interactions.user_ids == ["9", "10"]
    assert [items.tolist() for items in data.interactions.sequences()] == [[1, 0], [0]]
    assert data.manifest["items"] == {
        "read": 6,
        "kept": 2,
        "dropped": {"wrong number of fields": 1, "item listed before": 1, "blank": 1, "not UTF-8": 1},
        "without_text": 0,
    }
    assert data.manifest["interactions"] == {
        "read": 9,
        "kept": 3,
        "dropped": {
            "item not in the item file": 1,
            "same user and item as an earlier line": 1,
            "wrong number of fields": 1,
            "timestamp is not a number": 2,
            "no user id": 1,
        },
    }
    assert "ml-100k.item line 6 dropped: not UTF-8" in caplog.text
    assert "ml-100k.inter line 7 dropped: wrong number of fields" in caplog.text


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpeederError, match=r"ml-100k\.item cannot be read: No such file"):
        read_ml100k(tmp_path)
    write(tmp_path, b"", b"")
    (tmp_path / "ml-100k.item").write_bytes(b"\x00\x01binary")
    with pytest.raises(SpeederError, match=r"ml-100k\.item has no column 'item_id:token'"):
        read_ml100k(tmp_path)


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "raw"
    source.mkdir()
    write(source, b"1\tHeat\t1995\tAction\n", b"9\t1\t5\t100\n")
    for name in ("a", "b"):
        read_ml100k(source).save(tmp_path / name)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_parts_of_a_second_order(tmp_path: Path) -> None:
    items = b"".join(b"%d\tFilm %d\t1995\tDrama\n" % (n, n) for n in (1, 2, 3))
    data = read_ml100k(write(tmp_path, items, b"9\t1\t5\t5.9\n9\t2\t5\t5.1\n9\t3\t5\t5.5\n"))
    assert [data.catalogue.ids[item] for item in data.interactions.sequences()[0]] == ["2", "3", "1"]
    assert data.interactions.time.tolist() == [5, 5, 5]
