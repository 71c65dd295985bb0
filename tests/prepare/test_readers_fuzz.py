"""50,000 mutated lines for every form of every reader: whatever a line holds, it is kept or counted."""

import gzip
import json
import logging
import random
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speeder.data import PreparedData
from speeder.errors import SpeederError
from speeder.prepare.raw_table import read_raw, scratch_folder
from speeder.prepare.readers import READERS
from speeder.prepare.readers.ml100k import read_ml100k

INTERACTIONS, ITEMS = 30_000, 20_000
USERS, KINDS = 200, 100  # few, so that many lines meet an item that is known
SOUND = 0.3  # share of lines that are left as they are

TOKENS = [
    b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 400, b"null", b"true", b"[]", b"{}", b'["a", "b"]',
    b'""', b'"', b"'", b'"' * 3, b"\\", b"\\u0000", b"\\ud800", b"\x00", b"\xff\xfe", b"\xc3\x28",
    b"\xed\xa0\x80", b"../../etc/passwd", b"/etc/passwd", b"<b>", b"<script>", b"<!--", b"&amp;",
    b"&#99999999;", b"&#xD800;", b"[" * 400, b"(" * 400, b'{"a":' * 400, b"-" * 400, b",", b"::", b"\t",
    b"|", b"\r", b" ", b"A" * 2000, b"__import__('os')", b"2020-01-01", b"\xe2\x80\xae", b"lambda: 0",
]  # fmt: skip


def mutated(line: bytes, chance: random.Random) -> bytes:
    """The bytes after one to three changes."""
    for _ in range(chance.randint(1, 3)):
        at, kind = chance.randrange(len(line) + 1), chance.randrange(6)
        end = min(len(line), at + chance.randint(1, 20))
        if kind == 0:
            line = line[:at] + chance.choice(TOKENS) + line[at:]
        elif kind == 1:
            line = line[:at] + chance.choice(TOKENS) + line[end:]
        elif kind == 2:
            line = line[:at] + line[end:]
        elif kind == 3:
            line = line[:at] + bytes([chance.randrange(256)]) + line[at + 1 :]
        elif kind == 4:
            line = line[:at] + line[at:end] * chance.randint(2, 5) + line[end:]
        else:
            line = line[:at]
    return line


def amazon_review(user: int, item: int, time: int) -> str:
    return json.dumps({"overall": 5.0, "reviewerID": f"A{user}", "asin": f"B{item}", "unixReviewTime": time})


def amazon_item(item: int) -> dict:
    return {
        "asin": f"B{item}",
        "title": f"Cup {item} &amp; <b>more</b>",
        "category": ["Toys", "Cups"],
        "description": ["Tea."],
    }


def plain_row(user: int, item: int, time: int, **more: object) -> str:
    return json.dumps({"user": user, "item": f"i{item}", "timestamp": time + 0.5, "rating": 4, **more})


def date(time: int) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat()


RATED = {"amazon-2014", "amazon-2014 reviews", "amazon-2018", "amazon-2023 csv", "ml-100k", "ml-10m", "ml-latest",
         "plain csv", "plain jsonl", "plain parquet"}  # fmt: skip
META_2014 = ("meta_R.json.gz", [], lambda i: str(amazon_item(i)))
META_2023 = ("meta_R.jsonl", [], lambda i: json.dumps({"parent_asin": f"B{i}", "title": "T", "features": []}))

# family -> name of the reader, file of interactions with its header and lines, file of items with its header and lines
FAMILIES: dict[str, tuple[str, str, list[str], Callable, str, list[str], Callable]] = {
    "amazon-2014": ("amazon-2014", "R.csv", [], lambda u, i, t: f"A{u},B{i},5.0,{t}",
                    *META_2014),
    "amazon-2014 reviews": ("amazon-2014", "reviews_R.json.gz", [],
                            lambda u, i, t: str(json.loads(amazon_review(u, i, t)) | {"reviewText": "It's \"it\""}),
                            *META_2014),
    "amazon-2018": ("amazon-2018", "R.json.gz", [], amazon_review,
                    "meta_R.json", [], lambda i: json.dumps(amazon_item(i))),
    "amazon-2018 csv": ("amazon-2018", "R.csv", [], lambda u, i, t: f'B{i},"A{u}",5.0,{t}',
                        "meta_R.json", [], lambda i: json.dumps(amazon_item(i))),
    "amazon-2023": ("amazon-2023", "R.jsonl", [],
                    lambda u, i, t: json.dumps({"parent_asin": f"B{i}", "user_id": f"A{u}", "timestamp": t * 1000}),
                    *META_2023),
    "amazon-2023 csv": ("amazon-2023", "R.csv.gz", ["user_id,parent_asin,rating,timestamp"],
                        lambda u, i, t: f"A{u},B{i},4.0,{t}123", *META_2023),
    "ml-100k": ("ml-100k", "u.data", [], lambda u, i, t: f"{u}\t{i}\t5\t{t}",
                "u.item", [], lambda i: f"{i}|Film, The (1995)|01-Jan-1995||http://x|" + "|".join("01" * 9 + "0")),
    "ml-1m": ("ml-1m", "ratings.dat", [], lambda u, i, t: f"{u}::{i}::5::{t}",
              "movies.dat", [], lambda i: f"{i}::Film {i}, The (1995)::Drama|War"),
    "ml-10m": ("ml-10m", "ratings.dat", [], lambda u, i, t: f"{u}::{i}::3.5::{t}",
               "movies.dat", [], lambda i: f"{i}::Film é {i}, The (1995)::Drama|War"),
    "ml-20m": ("ml-20m", "ratings.csv", ["userId,movieId,rating,timestamp"], lambda u, i, t: f"{u},{i},3.5,{t}",
               "movies.csv", ["movieId,title,genres"], lambda i: f'{i},"Film {i}, The (1995)",Drama|War'),
    "ml-latest": ("ml-latest", "ratings.csv", ["userId,movieId,rating,timestamp"], lambda u, i, t: f"{u},{i},3.5,{t}",
                  "movies.csv", ["movieId,title,genres"], lambda i: f"{i},Film {i} (1995),(no genres listed)"),
    "microlens": ("microlens", "M_pairs.csv", ["user,item,timestamp"], lambda u, i, t: f"{u},{i},{t}000",
                  "M_titles.csv", ["item,title"], lambda i: f'{i},"A, ""title"" {i}"'),
    "microlens tsv": ("microlens", "M_pairs.tsv", [], lambda u, i, t: f"{u}\t{i} {t % KINDS}",
                      "M_title_en.csv", [], lambda i: f'{i},A, ""title"" {i}'),
    "sequences": ("sequences", "sequences.txt", [], lambda u, i, t: f"{u} {i}",
                  "items.jsonl", [], lambda i: json.dumps({"item": i, "title": f"T {i}", "image": f"{i}.jpg"})),
    "plain": ("plain", "interactions.tsv", ["user\titem\ttimestamp"], lambda u, i, t: f"{u}\t{i}\t{t}",
              "items.csv", ["id,title,text,image"], lambda i: f'{i},Title,"Text, long",{i}.jpg'),
    "plain csv": ("plain", "interactions.csv.gz", ["user,item,timestamp,rating"],
                  lambda u, i, t: f'{u},"i{i}",{date(t)}.25,3', "items.tsv", ["id\ttitle"], lambda i: f"i{i}\tTitle"),
    "plain jsonl": ("plain", "interactions.jsonl", [], plain_row,
                    "items.jsonl.gz", [], lambda i: json.dumps({"item": f"i{i}", "title": "T", "text": "Te <b>xt"})),
    "plain parquet": ("plain", "interactions.parquet", ["user\titem\ttimestamp\trating"],
                      lambda u, i, t: f"{u}\ti{i}\t{t}.5\t4", "items.parquet", ["id\ttitle\timage"],
                      lambda i: f"i{i}\tTitle\t{i}.jpg"),
}  # fmt: skip


def write(path: Path, header: list[str], lines: list[bytes], chance: random.Random) -> int:
    """Writes a file of lines, most of them mutated; returns how many there are."""
    lines = [
        line if chance.random() < SOUND else mutated(line, chance).replace(b"\n", b" ") for line in lines
    ]
    if path.suffix == ".parquet":
        write_strings(path, header[0].split("\t"), lines)
        return len(lines)
    # the first lines tell a format, and stay
    content = b"\n".join([*(line.encode() for line in header), *lines]) + b"\n"
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return len(lines)


def write_strings(path: Path, names: list[str], lines: list[bytes]) -> None:
    """Parquet's columns are typed and its strings are Unicode, but what strings say is free."""
    rows = [line.decode("utf-8", "replace").split("\t") for line in lines]
    cells = [[row[place] if place < len(row) else None for row in rows] for place in range(len(names))]
    pq.write_table(pa.table(dict(zip(names, cells, strict=True))), path)


@pytest.mark.parametrize("family", FAMILIES)
def test_mutated_lines_are_kept_or_counted(family: str, tmp_path: Path) -> None:
    logging.disable(logging.WARNING)  # pytest would keep thousands of records
    try:
        name, interaction_file, header, row, item_file, item_header, describe = FAMILIES[family]
        chance = random.Random(family)
        raw = tmp_path / "raw"
        raw.mkdir()
        rows = [row(chance.randrange(USERS), chance.randrange(KINDS), 10**9 + n) for n in range(INTERACTIONS)]
        written = write(raw / interaction_file, header, [line.encode() for line in rows], chance)
        items = [describe(n % KINDS) for n in range(ITEMS)]
        written_items = write(raw / item_file, item_header, [line.encode() for line in items], chance)

        with scratch_folder(tmp_path / "out") as scratch:
            lowest = 2 if family in RATED else None
            data = read_raw(READERS[name].open(raw, None), scratch, repeats=True, min_rating=lowest)
    finally:
        logging.disable(logging.NOTSET)

    counts = data.manifest["interactions"]
    assert counts["kept"] == len(data.interactions)
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["read"]
    if family in ("sequences", "microlens tsv"):  # a line may hold several interactions
        assert counts["read"] >= written
    elif header:  # quotes may join lines
        assert written * 0.98 < counts["read"] <= written
    else:
        assert counts["read"] == written
    assert INTERACTIONS * SOUND < counts["kept"] < counts["read"], "some are lost, and many are not"
    assert ("rating is not a number" in counts["dropped"]) == (family in RATED)

    item_counts = data.manifest["items"]
    described = len(data.catalogue) - item_counts["without_line"]
    assert item_counts["kept"] == described >= KINDS
    assert item_counts["kept"] + sum(item_counts["dropped"].values()) == item_counts["read"] <= written_items
    assert all(text.isprintable() and "<b>" not in text for text in data.catalogue.texts if text.isascii())

    data.save(tmp_path / "out")  # all that was let in can be written
    loaded = PreparedData.load(tmp_path / "out")
    assert loaded.catalogue.titles == data.catalogue.titles and loaded.split.hash() == data.split.hash()


def test_mutated_lines_of_the_ml100k_asset_are_kept_or_counted(tmp_path: Path) -> None:
    logging.disable(logging.WARNING)
    try:
        chance = random.Random("asset")
        rows = [
            f"{n // KINDS}\t{n % KINDS}\t5\t{10**9 + chance.randrange(99)}.0".encode()
            for n in range(INTERACTIONS)
        ]
        written = write(
            tmp_path / "ml-100k.inter",
            ["user_id:token\titem_id:token\trating:float\ttimestamp:float"],
            rows,
            chance,
        )
        films = [f"{n % KINDS}\tFilm {n}, The\t1995\tDrama War".encode() for n in range(ITEMS)]
        header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
        written_items = write(tmp_path / "ml-100k.item", [header], films, chance)
        data = read_ml100k(tmp_path)
    finally:
        logging.disable(logging.NOTSET)
    for part, lines, kept in (
        ("interactions", written, len(data.interactions)),
        ("items", written_items, len(data.catalogue)),
    ):
        counts = data.manifest[part]
        assert counts["kept"] == kept and kept + sum(counts["dropped"].values()) == counts["read"]
        assert lines * 0.98 < counts["read"] <= lines
    assert len(data.interactions) > INTERACTIONS * SOUND and set(map(str, range(KINDS))) <= set(
        data.catalogue.ids
    )
    data.save(tmp_path / "out")
    assert PreparedData.load(tmp_path / "out").split.hash() == data.split.hash()


@pytest.mark.parametrize("form", ["gzip", "parquet"])
def test_mutated_files_are_read_or_refused(form: str, tmp_path: Path) -> None:
    """Any byte of a compressed file may be wrong, or its end missing."""
    path = tmp_path / ("x.parquet" if form == "parquet" else "x.csv.gz")
    rows = [(f"u{n % 7}", f"i{n % 11}", n) for n in range(300)]
    if form == "parquet":
        columns = dict(zip(("user", "item", "time"), map(list, zip(*rows, strict=True)), strict=True))
        pq.write_table(pa.table(columns), path, row_group_size=100)
    else:
        lines = "".join(f"{user},{item},{time}\n" for user, item, time in rows)
        path.write_bytes(gzip.compress(f"user,item,time\n{lines}".encode()))
    whole, chance, refused = path.read_bytes(), random.Random(form), 0
    logging.disable(logging.WARNING)
    try:
        for turn in range(200):
            path.write_bytes(mutated(whole, chance) if turn % 4 else whole[: turn * len(whole) // 200])
            try:
                with scratch_folder(tmp_path / "out") as scratch:
                    data = read_raw(READERS["plain"].open(path, None), scratch, repeats=True)
            except SpeederError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1
            else:
                assert data.manifest["interactions"]["kept"] == len(data.interactions)
    finally:
        logging.disable(logging.NOTSET)
    assert refused > 100, "most of such files are no files of their kind any more"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
