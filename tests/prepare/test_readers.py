"""Every raw format, from small files that hold what the real ones hold: each quirk, and what becomes of it."""

import gzip
import json
import os
import re
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speeder.data import PreparedData
from speeder.errors import SpeederError
from speeder.prepare.new_items import read_items
from speeder.prepare.pipeline import prepare
from speeder.prepare.raw_table import read_raw, scratch_folder
from speeder.prepare.readers import READERS
from speeder.prepare.readers.plain import IMAGE, ITEM, RATING, TEXT, TIME, TITLE, USER, plain

NO_INTERACTIONS = "item without interactions that are kept"


def read(name: str, path: Path, items: Path | None = None, **options: object) -> PreparedData:
    with scratch_folder(path.parent / "out") as scratch:
        return read_raw(READERS[name].open(path, items), scratch, **options)


def histories(data: PreparedData) -> dict[str, list[str]]:
    """User id -> item ids, oldest first."""
    sequences = data.interactions.sequences()
    return {
        user: [data.catalogue.ids[item] for item in items]
        for user, items in zip(data.interactions.user_ids, sequences, strict=True)
    }


def write(path: Path, lines: list[str | bytes], end: str = "\n") -> Path:
    raw = b"".join((line if isinstance(line, bytes) else line.encode()) + end.encode() for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def review_2018(user: object, item: object, time: object, stars: object = 5.0, **more: object) -> str:
    return json.dumps({"overall": stars, "reviewerID": user, "asin": item, "unixReviewTime": time, **more})


def test_amazon_2018(tmp_path: Path) -> None:
    write(
        tmp_path / "raw" / "Toys.json.gz",
        [
            review_2018("A1", "B1", 300, vote="2", style={"Color:": " Red"}, image=["http://x/y.jpg"]),
            review_2018("A1", "B2", 100, 1.0),
            review_2018("A1", "B2", 100, 1.0),  # 2018's files repeat whole lines
            review_2018("A2", "B3", 200),
            review_2018("A2", "B1", "250"),
            review_2018(None, "B1", 1),
            review_2018("A2", ["B1"], 1),
            '{"overall": 5.0, "reviewerID": "A2", "asin": "B4", "unixReviewTime": NaN}',
            review_2018("A2", "B5", 5, stars="five"),
            '{"overall": 5.0, "reviewerID": "A2", "as',
            "[1, 2]",
            b'{"reviewerID": "A2\xff", "asin": "B1", "unixReviewTime": 7}',
            "",
        ],
    )
    write(
        tmp_path / "raw" / "meta_Toys.json.gz",
        [
            json.dumps({
                "asin": "B1", "title": "Tom &amp; Jerry <b>Cup</b>", "brand": "ACME",
                "category": ["Toys", "Cups</span>"],
                "description": ["Holds <i>tea</i>.", "", "Holds <i>tea</i>."],
                "feature": ["Blue", "<script>var a=1;</script>"],
            }),
            json.dumps({"asin": "B2", "title": "var a = (new Date()).getTime();", "description": "A string"}),
            json.dumps({"asin": "B1", "title": "Again"}),
            json.dumps({"asin": "B9", "title": "Nobody has it"}),
            json.dumps({"title": "No id"}),
            json.dumps({"asin": "B5", "title": ["A list", "of titles"], "brand": None, "category": "Toys"}),
        ],
    )  # fmt: skip
    data = read("amazon-2018", tmp_path / "raw")
    assert histories(data) == {"A1": ["B2", "B1"], "A2": ["B5", "B3", "B1"]}
    assert data.manifest["interactions"] == {
        "read": 13,
        "kept": 5,
        "dropped": {
            "same user and item as another line": 1,
            "no user id": 1,
            "item id is not a string": 1,
            "timestamp is not a number": 1,
            "not JSON": 1,
            "not an object with named fields": 1,
            "not UTF-8": 1,
            "blank": 1,
        },
    }
    items = dict(
        zip(data.catalogue.ids, zip(data.catalogue.titles, data.catalogue.texts, strict=True), strict=True)
    )
    assert items["B1"] == (
        "Tom & Jerry Cup",
        "Tom & Jerry Cup. Brand: ACME. Categories: Toys, Cups. Blue. Holds tea.",
    )
    assert items["B2"] == ("", "A string.")
    assert items["B3"] == ("", "")
    assert items["B5"] == ("A list of titles", "A list of titles. Categories: Toys.")
    assert data.manifest["items"] == {
        "read": 6,
        "kept": 3,
        "dropped": {"item listed before": 1, NO_INTERACTIONS: 1, "no item id": 1},
        "cut_short": 0,
        "titles_blanked": 1,
        "without_line": 1,
        "without_text": 1,
    }
    rated = read("amazon-2018", tmp_path / "raw", min_rating=3)
    assert histories(rated) == {"A1": ["B1"], "A2": ["B3", "B1"]}
    assert rated.manifest["interactions"]["dropped"]["rated lower than the threshold"] == 2
    assert rated.manifest["interactions"]["dropped"]["rating is not a number"] == 1


def test_of_an_items_lines_the_first_with_a_title_counts(tmp_path: Path) -> None:
    reviews = write(tmp_path / "R.json", [review_2018("A1", item, time) for time, item in enumerate("abc")])
    lines = [
        {"asin": "a", "title": "", "description": "x" * 3000},
        {"asin": "b", "description": "Kept"},
        {"asin": "c", "title": "x.getTime()"},
        {"asin": "a", "title": "A", "brand": "B"},
        {"asin": "a", "title": "Too late"},
        {"asin": "b", "description": "Not this"},
        {"asin": "c", "title": "C"},
    ]
    metas = write(tmp_path / "meta_R.json", [json.dumps(line) for line in lines])
    data = read("amazon-2018", reviews, metas)
    assert data.catalogue.titles == ["A", "", "C"]
    assert data.catalogue.texts == ["A. Brand: B.", "Kept.", "C."]
    counts = data.manifest["items"]
    assert (counts["kept"], counts["dropped"]) == (3, {"item listed before": 4})
    assert counts["cut_short"] == counts["titles_blanked"] == 0, "what is replaced does not count"


def test_amazon_2018_ratings_have_the_item_first(tmp_path: Path) -> None:
    write(tmp_path / "raw" / "Toys.csv", ["B1,A1,5.0,100", "B2,A1,5.0,50", '"B3","A2",1.0,7', "B4,A1,5.0"])
    write(tmp_path / "raw" / "meta_Toys.json", [json.dumps({"asin": "B1", "title": "Cup"})])
    data = read("amazon-2018", tmp_path / "raw")
    assert histories(data) == {"A1": ["B2", "B1"], "A2": ["B3"]}
    assert data.manifest["interactions"]["dropped"] == {"wrong number of fields": 1}
    # the same columns taken for 2014's give users that the items' file does not know: refused, not swapped in silence
    with pytest.raises(SpeederError, match="do they belong together"):
        read("amazon-2014", tmp_path / "raw")


def test_amazon_2014(tmp_path: Path) -> None:
    """Ratings with the user first; items, and some review files, are Python literals, which are never evaluated."""
    ran = tmp_path / "ran"
    write(
        tmp_path / "raw" / "ratings_Toys.csv",
        ["A1,B1,5.0,100", "A1,B2,2.0,50", "A2,B1,3.0,1e400", "A2,B3,3.0,9\r"],
    )
    write(
        tmp_path / "raw" / "meta_Toys.json.gz",
        [
            "{'asin': 'B1', 'title': \"Tom's \\d Cup\", 'categories': [['Toys', 'Cups'], ['Toys']], 'price': 1.5,"
            " 'brand': 'ACME', 'description': 'Says \"tea\".', 'related': {'also_bought': ['B7']}, 'salesRank': {}}",
            "{'asin': 'B9', 'title': broken but not wanted}",
            "{'asin': 'B2', 'title': open('" + str(ran) + "', 'w')}",
            "__import__('pathlib').Path('" + str(ran) + "').touch()",
            "{'title': 'Key in another place', 'asin': 'B3', 'imUrl': 'http://x/y.jpg'}",
            "(" * 300 + ")" * 300,
            "-" * 100_000 + "1",
            "{'asin': 'B2', 'title': '" + "x" * (1 << 20) + "'}",
        ],
    )  # fmt: skip
    data = read("amazon-2014", tmp_path / "raw")
    assert histories(data) == {"A1": ["B2", "B1"], "A2": ["B3"]}
    assert data.manifest["interactions"]["dropped"] == {"timestamp is not a number": 1}
    assert not ran.exists()
    assert data.catalogue.texts[data.catalogue.index_of("B1")] == (
        'Tom\'s \\d Cup. Brand: ACME. Categories: Toys, Cups. Says "tea".'
    )
    assert data.catalogue.titles[data.catalogue.index_of("B3")] == "Key in another place"
    assert data.manifest["items"]["dropped"] == {
        NO_INTERACTIONS: 1,
        "not a Python literal": 4,
        "Python literal longer than 1 MiB": 1,
    }

    reviews = [
        review_2018("A1", "B1", 100, helpful=[1, 2]),
        str({"reviewerID": "A1", "asin": "B3", "unixReviewTime": 20}),
        '{"reviewerID": "A2", \'asin\': "B1", "unixReviewTime": 3}',
    ]
    reviews = write(tmp_path / "reviews.json.gz", reviews)
    data = read("amazon-2014", reviews, tmp_path / "raw" / "meta_Toys.json.gz")
    assert histories(data) == {"A1": ["B3", "B1"], "A2": ["B1"]}


def test_amazon_2023(tmp_path: Path) -> None:
    """`parent_asin` in place of a colour's or size's own, and milliseconds, which tell what seconds would tie."""
    reviews = [
        {"rating": 5.0, "title": "x", "asin": "B1-r", "parent_asin": "B1", "user_id": "A1", "timestamp": 1588687728923},
        {"rating": 5.0, "asin": "B2", "parent_asin": "B2", "user_id": "A1", "timestamp": 1588687728922},
        {"rating": 5.0, "asin": "B1-blue", "parent_asin": "B1", "user_id": "A1", "timestamp": 1588687728000},
        {"rating": 5.0, "asin": "B3", "parent_asin": "B3", "user_id": "A1", "timestamp": 1588687728923},
    ]  # fmt: skip
    items = [
        {"parent_asin": "B1", "title": "Cup", "store": "ACME", "categories": ["Toys"], "features": ["Blue"],
         "description": [], "images": [{"large": "http://x"}], "details": {"a": 1}, "main_category": None},
        {"parent_asin": "B2", "title": None, "store": None, "categories": [], "description": ["Only this"]},
    ]  # fmt: skip
    write(tmp_path / "raw" / "Toys.jsonl.gz", [json.dumps(line) for line in reviews])
    write(tmp_path / "raw" / "meta_Toys.jsonl.gz", [json.dumps(line) for line in items])
    data = read("amazon-2023", tmp_path / "raw")
    assert histories(data) == {"A1": ["B1", "B2", "B3"]}
    assert data.interactions.time.tolist() == [1588687728] * 3
    texts = dict(zip(data.catalogue.ids, data.catalogue.texts, strict=True))
    assert texts == {"B1": "Cup. Brand: ACME. Categories: Toys. Blue.", "B2": "Only this.", "B3": ""}

    ratings = ["user_id,parent_asin,rating,timestamp", "A1,B2,4.0,1588687728923", "A2,B1,1.0,1588687728923"]
    data = read("amazon-2023", write(tmp_path / "Toys.csv", ratings), tmp_path / "raw" / "meta_Toys.jsonl.gz")
    assert histories(data) == {"A1": ["B2"], "A2": ["B1"]}


def test_a_folder_must_hold_one_file_of_each(tmp_path: Path) -> None:
    for name in ("a.json.gz", "b.json.gz", "meta_a.json.gz"):
        write(tmp_path / name, [])
    with pytest.raises(SpeederError, match=r"one file of reviews or ratings, found a\.json\.gz, b\.json\.gz"):
        read("amazon-2018", tmp_path)
    (tmp_path / "b.json.gz").unlink()
    (tmp_path / "meta_a.json.gz").unlink()
    with pytest.raises(SpeederError, match=r"one file of items \(meta\*\), found none"):
        read("amazon-2018", tmp_path)
    with pytest.raises(SpeederError, match=r"meta\.json cannot be read: it is missing"):
        read("amazon-2018", tmp_path / "a.json.gz", tmp_path / "meta.json")


def test_movielens_1m(tmp_path: Path) -> None:
    write(
        tmp_path / "ml" / "ratings.dat",
        ["1::10::5::300", "1::20::3::100", "2::10::4::5", "2:10:4:5", "2::30::1::9"],
    )
    write(
        tmp_path / "ml" / "movies.dat",
        ["10::City of Lost Children, The (1995)::Adventure|Sci-Fi".encode("latin-1"),
         "20::Misérables, Les (1995)::Drama|Musical".encode("latin-1"), "30::unknown::", "99::Unseen (2000)::Drama"],
    )  # fmt: skip
    data = read("ml-1m", tmp_path / "ml")
    assert histories(data) == {"1": ["20", "10"], "2": ["10", "30"]}
    assert data.catalogue.titles == ["The City of Lost Children (1995)", "Les Misérables (1995)", ""]
    assert data.catalogue.texts[1] == "Les Misérables (1995). Genres: Drama, Musical."
    assert data.manifest["interactions"]["dropped"] == {"wrong number of fields": 1}
    # 10M has the same files in UTF-8
    write(tmp_path / "ml" / "movies.dat", ["20::Misérables, Les (1995)::Drama"])
    assert "Les Misérables (1995)" in read("ml-10m", tmp_path / "ml" / "ratings.dat").catalogue.titles


@pytest.mark.parametrize("name", ["ml-20m", "ml-latest"])
def test_movielens_20m_and_latest(name: str, tmp_path: Path) -> None:
    ratings = ["userId,movieId,rating,timestamp", "1,10,3.5,300", "1,20,0.5,100", "1,20,x,y"]
    write(tmp_path / "ml" / "ratings.csv", ratings, end="\r\n")
    films = ["movieId,title,genres", '10,"American President, The (1995)",Comedy|Drama|Romance',
             '20,"""Great"" One (2001)",(no genres listed)', '30,"never closed']  # fmt: skip
    write(tmp_path / "ml" / "movies.csv", films, end="\r\n")
    data = read(name, tmp_path / "ml")
    assert histories(data) == {"1": ["20", "10"]}
    assert data.catalogue.texts == [
        "The American President (1995). Genres: Comedy, Drama, Romance.",
        '"Great" One (2001).',
    ]
    assert data.manifest["interactions"]["dropped"] == {"timestamp is not a number": 1}
    assert data.manifest["items"]["dropped"] == {"quotes that do not match": 1}


def test_another_release_of_movielens_is_refused(tmp_path: Path) -> None:
    ratings = write(tmp_path / "ml" / "ratings.csv", ["userId,movieId,rating,timestamp", "1,10,3.5,300"])
    write(tmp_path / "ml" / "movies.csv", ["movieId,title,genres", "10,Heat (1995),Action"])
    for path in (tmp_path / "ml", ratings):
        with pytest.raises(
            SpeederError, match=r"ratings\.dat of ml-1m, found ratings\.csv \(ml-20m or ml-latest\)"
        ):
            read("ml-1m", path)
    assert read("ml-20m", ratings).catalogue.titles == ["Heat (1995)"]
    with pytest.raises(SpeederError, match=r"expected u\.data of ml-100k, found no ratings"):
        read("ml-100k", tmp_path)


def test_movielens_100k_from_grouplens(tmp_path: Path, ml100k_folder: Path) -> None:
    """The original files give what the asset's give."""
    rows = [line.split("\t") for line in (ml100k_folder / "ml-100k.inter").read_text().splitlines()[1:]]
    write(tmp_path / "ml" / "u.data", ["\t".join([u, i, r, t.removesuffix(".0")]) for u, i, r, t in rows])
    flags = "|".join(["0", "1", *["0"] * 17])
    films = [
        f"{i}|Caf\xe9 {i}, The (1995)|01-Jan-1995||http://x|{flags}".encode("latin-1") for i in range(1, 1683)
    ]
    write(tmp_path / "ml" / "u.item", films)
    data = read("ml-100k", tmp_path / "ml")
    assert (len(data.interactions), len(data.catalogue)) == (100_000, 1682)
    assert data.catalogue.texts[data.catalogue.index_of("7")] == "The Café 7 (1995). Genres: Action."
    from speeder.prepare.readers.ml100k import read_ml100k

    asset = read_ml100k(ml100k_folder)
    assert histories(data) == histories(asset)


def test_microlens_pairs_of_both_kinds(tmp_path: Path) -> None:
    folder = tmp_path / "ml"
    write(
        folder / "M_titles.csv",
        ["item,title", "1,One", '2,"Two, ""quoted"""', '3,"Runs on', 'over two lines"'],
    )
    write(folder / "M_pairs.tsv", ["7\t2 1 3", "8\t1", "9", "7\t1 2"])
    data = read("microlens", folder)
    assert histories(data) == {"7": ["2", "1", "3"], "8": ["1"]}
    assert data.manifest["interactions"] == {
        "read": 7,
        "kept": 4,
        "dropped": {"user without items": 1, "same user and item as another line": 2},
    }
    assert data.catalogue.titles == ['Two, "quoted"', "One", "Runs on over two lines"]
    assert data.manifest["items"]["read"] == 3
    write(folder / "M_pairs.csv", ["user,item,timestamp", "7,1,1583378629552", "7,2,1583378629551", "8,3,-5"])
    (folder / "M_covers").mkdir()
    data = read("microlens", folder)
    assert histories(data) == {"7": ["2", "1"]} and data.interactions.time.tolist() == [1583378629] * 2
    assert data.manifest["interactions"]["dropped"] == {"timestamp is before 1970 or after 2100": 1}
    assert READERS["microlens"].open(folder, None).images == folder / "M_covers"


PAIRS = ["user,item,timestamp", "7,1,1000", "7,2,2000", "8,3,3000"]
RELEASED = ["1,One, or two", '2,"Two, ""quoted"""', '3,"Three" and, more', "no comma", '"4",Four']


def test_microlens_titles_as_released(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`*_title_en.csv` has no header, and its titles hold commas and quotes; others may lie beside it."""
    folder = tmp_path / "ml"
    write(folder / "MicroLens-100k_pairs.csv", PAIRS)
    data = read("microlens", folder)
    assert data.catalogue.titles == ["", "", ""]
    assert f"{folder}: found no titles (*_title*.csv), so items have no text" in caplog.text

    caplog.clear()
    english = write(folder / "MicroLens-100k_title_en.csv", RELEASED)
    expected = ["One, or two", 'Two, "quoted"', '"Three" and, more']
    data = read("microlens", folder)
    assert data.catalogue.titles == expected and data.catalogue.texts[0] == "One, or two."
    assert data.manifest["items"]["read"] == 5
    assert data.manifest["items"]["dropped"] == {"wrong number of fields": 1, NO_INTERACTIONS: 1}

    write(folder / "MicroLens-100k_title_cn.csv", ["1,一"])
    assert read("microlens", folder).catalogue.titles == expected
    assert (
        "of MicroLens-100k_title_cn.csv, MicroLens-100k_title_en.csv, MicroLens-100k_title_en.csv is read"
        in (caplog.text)
    )
    elsewhere = write(tmp_path / "elsewhere" / "names.csv", RELEASED)
    assert read("microlens", folder, elsewhere).catalogue.titles == expected
    english.unlink()
    assert read("microlens", folder).catalogue.titles == ["一", "", ""]
    write(folder / "MicroLens_titles.csv", ["item,title", "1,One"])
    with pytest.raises(
        SpeederError, match=r"one file \*_title\*\.csv, found MicroLens-100k_title_cn\.csv, Micro"
    ):
        read("microlens", folder)


PLAIN = [("u1", "i1", 100), ("u1", "i2", 50), ("u2", "i1", 7)]


@pytest.mark.parametrize("form", ["csv", "csv.gz", "tsv", "jsonl", "parquet", "dates.csv", "dates.parquet"])
def test_plain_tables(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    path = folder / f"interactions.{form.removeprefix('dates.')}"
    users, items, times = map(list, zip(*PLAIN, strict=True))
    if form == "parquet":
        pq.write_table(pa.table({"user_id": users, "item": items, "TIMESTAMP": times}), path)
    elif form == "dates.parquet":
        dates = pa.array([time * 1000 for time in times], pa.timestamp("ms", tz="Europe/Berlin"))
        pq.write_table(pa.table({"user_id": users, "item": items, "timestamp": dates}), path)
    elif form == "jsonl":
        write(path, [json.dumps({"user": u, "item_id": i, "time": t}) for u, i, t in PLAIN])
    elif form == "dates.csv":
        write(
            path,
            ["user,item,timestamp"]
            + [f"{u},{i},{datetime.utcfromtimestamp(t).isoformat()}" for u, i, t in PLAIN],
        )
    else:
        tab = "\t" if form == "tsv" else ","
        write(
            path,
            [b"\xef\xbb\xbf" + tab.join(["item", "user", "x", "timestamp"]).encode()]
            + [tab.join([i, u, "", f"{t}.0"]) for u, i, t in PLAIN],
        )
    pq.write_table(
        pa.table({"id": ["i1", "i2"], "title": ["One", None], "text": ["One and more", "Just text"]}),
        folder / "items.parquet",
    )
    data = read("plain", folder)
    assert histories(data) == {"u1": ["i2", "i1"], "u2": ["i1"]}
    assert sorted(data.interactions.time.tolist()) == [7, 50, 100]
    assert data.catalogue.texts == ["One and more.", "Just text."]


SUBSECOND = {  # three times within a second of 2020, given latest, earliest, middle
    "float seconds": ("csv", [1588687728.9, 1588687728.1, 1588687728.5]),
    "dates": ("csv", ["2020-05-05T14:08:48.900", "2020-05-05 14:08:48.1", "2020-05-05T16:08:48.5+02:00"]),
    "microseconds": ("csv", ["2020-05-05T14:08:48.000003", "2020-05-05T14:08:48.000001Z", "1588687728.000002"]),
    "JSON numbers": ("jsonl", [1588687728.9, 1588687728.1, 1588687728.5]),
    "Parquet ms": ("parquet", pa.array([1588687728900, 1588687728100, 1588687728500], pa.timestamp("ms"))),
    "Parquet ns": ("parquet", pa.array([1588687728000000003, 1588687728000000001, 1588687728000000002],
                                       pa.timestamp("ns", "Asia/Tokyo"))),
    "Parquet float": ("parquet", pa.array([1588687728.9, 1588687728.1, 1588687728.5])),
}  # fmt: skip


@pytest.mark.parametrize("kind", SUBSECOND)
@pytest.mark.parametrize("repeats", [False, True])
def test_parts_of_a_second_order(kind: str, repeats: bool, tmp_path: Path) -> None:
    """Cut to seconds first, they would leave the order of the file, and another item as the test target."""
    suffix, times = SUBSECOND[kind]
    path = write_plain(tmp_path / f"x.{suffix}", ["u"] * 3, ["c", "a", "b"], times)
    data = read("plain", path, repeats=repeats)
    assert histories(data) == {"u": ["a", "b", "c"]}
    assert data.interactions.time.tolist() == [1588687728] * 3


def write_plain(path: Path, users: list, items: list, times: object) -> Path:
    """A plain table of interactions, in the form that its name says."""
    rows = zip(users, items, times, strict=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"user": users, "item": items, "timestamp": times}), path)
    elif path.suffix == ".jsonl":
        write(path, [json.dumps({"user": u, "item": i, "timestamp": t}) for u, i, t in rows])
    else:
        write(path, ["user,item,timestamp"] + [f"{u},{i},{t}" for u, i, t in rows])
    return path


def test_parts_of_a_tick_order_in_every_unit(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "x.csv", ["u"] * 3, ["c", "a", "b"], ["7000.9", "7000.1", "7000.5"])
    for unit in ("ms", "us", "ns"):
        with scratch_folder(tmp_path / "out") as scratch:
            data = read_raw(plain(path, None, unit), scratch)
        # a nanosecond is what is kept
        assert histories(data) == {"u": ["c", "a", "b"] if unit == "ns" else ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.timestamp("ms"), [2**63 - 1, 2**55, -(2**63), -1, 4_102_444_800_001]),
        (pa.timestamp("ns"), [-(2**63), -1, 4_102_444_800 * 10**9 + 1]),
        (pa.date64(), [2**63 - 1, -86_400_000]),
        # the last's nanoseconds wrap around to 1970 in 64 bits
        (pa.date32(), [2**31 - 1, -(2**31), 213_504]),
        (pa.float64(), [float("nan"), float("inf"), 1e300, -0.5]),
        (pa.int64(), [2**63 - 1, -1]),
    ],
)
def test_hostile_times_in_parquet_are_counted(kind: pa.DataType, values: list, tmp_path: Path) -> None:
    column = pa.array([*values, 0], pa.int64() if pa.types.is_date64(kind) else kind).cast(kind)
    path = write_plain(
        tmp_path / "x.parquet", ["u"] * len(column), list(map(str, range(len(column)))), column
    )
    data = read("plain", path)
    assert histories(data) == {"u": [str(len(values))]}
    assert sum(data.manifest["interactions"]["dropped"].values()) == len(values)


def test_eight_digits_are_dates_among_dates(tmp_path: Path) -> None:
    """`20200101` is a date where most of the first times are, and the number that it is elsewhere."""
    times = ["20200103", "2020-01-02", "20200101", "2020-01-04T00:00:00", "20201399"]
    path = write_plain(tmp_path / "dates.csv", ["u"] * 5, list("cabde"), times)
    data = read("plain", path)
    assert histories(data) == {"u": ["b", "a", "c", "d"]}
    assert data.interactions.time.tolist() == [1577836800 + 86_400 * day for day in range(4)]
    assert data.manifest["interactions"]["dropped"] == {"timestamp is not a date": 1}
    path = write_plain(
        tmp_path / "rows.csv", ["u"] * 4, list("badc"), ["20200102", "20200101", "30200000", "20200103"]
    )
    data = read("plain", path)
    assert histories(data) == {"u": ["a", "b", "c", "d"]} and data.interactions.time[0] == 20_200_101
    path = write_plain(
        tmp_path / "few.csv", ["u"] * 4, list("abcd"), ["1588687728", "20200102", "2020-01-01", "9"]
    )
    assert histories(read("plain", path)) == {"u": ["d", "b", "c", "a"]}


def test_plain_time_units_and_repeats(tmp_path: Path) -> None:
    path = write(
        tmp_path / "plays.csv",
        ["user,item,timestamp,rating", "u,a,2000,1", "u,b,3000,", "u,a,4000,5", "u,a,4000,5"],
    )

    def plays(**options: object) -> PreparedData:
        with scratch_folder(tmp_path / "out") as scratch:
            return read_raw(plain(path, None, "ms"), scratch, **options)

    assert histories(plays()) == {"u": ["a", "b"]}
    data = plays(repeats=True)
    assert histories(data) == {"u": ["a", "b", "a"]} and data.interactions.time.tolist() == [2, 3, 4]
    assert data.manifest["interactions"]["dropped"] == {"same user, item and time as another line": 1}
    assert plays(min_rating=2).manifest["interactions"]["dropped"] == {
        "rated lower than the threshold": 1, "rating is not a number": 1, "same user and item as another line": 1,
    }  # fmt: skip


@pytest.mark.parametrize("names", [USER, (*ITEM, "id"), TIME, RATING, TITLE, TEXT, IMAGE])
def test_the_page_on_data_lists_the_accepted_names(names: tuple[str, ...]) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    row = re.search(rf"^\| `{names[0]}` \|(.*?)\|", page, re.MULTILINE)
    assert row and tuple(re.findall(r"`(\w+)`", row[1])) == names[1:]


def test_plain_tables_that_are_none(tmp_path: Path) -> None:
    for name, content, message in [
        ("interactions.csv", "", "is empty"),
        ("interactions.csv", "\n \n", "is empty"),
        (
            "interactions.csv",
            "üser,item\n".encode("latin-1"),
            "its first line is not UTF-8, and a header line was expected; save the file as UTF-8",
        ),
        ("interactions.csv", "user,item,timestamp\nu,i,1".encode("utf-16"), "its first line is not UTF-8"),
        ("interactions.csv", b"\xff\nuser,item,timestamp\nu,i,1\n", "its first line is not UTF-8"),
        ("interactions.csv", "x" * (4 << 20) + "y\n", "its first line is longer than 4 MiB"),
        ("interactions.csv", "user,thing,timestamp\n", "no column 'item' or 'item_id'"),
        ("interactions.csv", "user,item,timestamp\n", "no interaction is left of 0 lines"),
        (
            "interactions.csv",
            "user,item,timestamp\nu,i,soon\n",
            "1 of 1 lines cannot be used: timestamp is not a number",
        ),
        ("interactions.parquet", "PAR1", "cannot be read as Parquet"),
        ("interactions.jsonl", "{}\n", "1 no user id"),
    ]:
        folder = tmp_path / "raw"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(SpeederError, match=message):
            read("plain", folder)
    write(folder / "interactions.csv", ["user,item,timestamp"])
    with pytest.raises(SpeederError, match="expected only one of"):
        read("plain", folder)
    with pytest.raises(SpeederError, match="expected a table interactions"):
        read("plain", tmp_path)
    with pytest.raises(SpeederError, match="another kind of name"):
        read("plain", write(tmp_path / "x.xlsx", []))


@pytest.mark.skipif(
    "SPEEDER_SHARED_DATA" not in os.environ, reason="SPEEDER_SHARED_DATA names no folder of data"
)
def test_real_beauty_is_the_standard_benchmark(tmp_path: Path) -> None:
    """Runs only where that (not redistributable) folder is at hand."""
    folder = Path(os.environ["SPEEDER_SHARED_DATA"]) / "amazon-beauty-2014"
    with scratch_folder(tmp_path / "out") as scratch:
        data = read_raw(READERS["sequences"].open(folder, None), scratch, core=5)
    assert (len(data.interactions.user_ids), len(data.catalogue), len(data.interactions)) == (
        22_363,
        12_101,
        198_502,
    )
    assert data.manifest["interactions"]["dropped"] == {} and data.manifest["items"]["without_text"] == 7
    lines = (folder / "sequences.txt").read_text().splitlines()
    assert list(histories(data).items()) == [(line.split()[0], line.split()[1:]) for line in lines]


# --- further columns of items ---------------------------------------------------------------------------------------


def shop(folder: Path) -> Path:
    write(folder / "interactions.csv", ["user,item,timestamp", *(f"u{i % 3},{i % 4},{i}" for i in range(12))])
    write(
        folder / "items.csv",
        ["item,title,Category,brand", "0,Kettle,Kitchen,", "1,Lamp,Light,Acme", "2,Pan,Kitchen,Acme"],
    )
    return folder


def test_further_columns_are_kept_for_filters(tmp_path):
    data = prepare(
        "plain", shop(tmp_path / "shop"), tmp_path / "data", modalities=[], columns=["category", "brand"]
    )
    for catalogue in (data.catalogue, PreparedData.load(tmp_path / "data").catalogue):
        assert catalogue.columns["category"] == ["Kitchen", "Light", "Kitchen", None]
        assert catalogue.columns["brand"] == [None, "Acme", "Acme", None]
        assert catalogue.rows_where("category", ["Kitchen"]).tolist() == [0, 2]
    assert data.manifest["unused_columns"]["items"] == []
    new = write(tmp_path / "new.csv", ["id,title,category", "9,Pot,Kitchen"])
    items, _ = read_items(new, known=data.catalogue)
    assert items.columns == {"category": ["Kitchen"], "brand": [None]}


@pytest.mark.parametrize(
    "columns, message",
    [
        (["colour"], "items.csv has no column 'colour'"),
        (["title"], "columns: expected further columns of items, each once, got title"),
        (["brand", "brand"], "each once"),
    ],
)
def test_columns_that_cannot_be_kept(tmp_path, columns, message):
    with pytest.raises(SpeederError, match=message):
        prepare("plain", shop(tmp_path / "shop"), tmp_path / "data", modalities=[], columns=columns)
    (tmp_path / "shop" / "items.csv").unlink()
    with pytest.raises(SpeederError, match=f"columns: expected .*{columns[0]}"):
        prepare("plain", tmp_path / "shop", tmp_path / "data", modalities=[], columns=columns)
    with pytest.raises(SpeederError, match="columns: expected none for ml-1m"):
        prepare("ml-1m", tmp_path / "shop", tmp_path / "data", columns=["brand"])
