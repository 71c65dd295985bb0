"""From raw lines to kept interactions: filters beside obvious ones, hostile lines, broken streams, little memory."""

import gzip
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from speeder.data import PreparedData
from speeder.errors import SpeederError
from speeder.prepare.features import add_images
from speeder.prepare.filters import first_of_repeats, k_core, renumber
from speeder.prepare.pipeline import prepare
from speeder.prepare.raw_table import read_raw, scratch_folder
from speeder.prepare.readers import READERS
from speeder.prepare.readers.lines import MAX_LINE_BYTES, LineCount, read_lines
from speeder.prepare.readers.text import MAX_TEXT, MAX_TITLE, clean, compose
from speeder.prepare.spool import IdColumn
from tests.io.killing import killed_at


def read(name: str, path: Path, items: Path | None = None, **options: object) -> PreparedData:
    with scratch_folder(path.parent / "out") as scratch:
        return read_raw(READERS[name].open(path, items), scratch, **options)


@pytest.fixture(params=[7, 1 << 22], ids=["small parts", "one part"])
def part_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speeder.prepare.filters._PART_ROWS", request.param)


@pytest.mark.usefixtures("part_rows")
@pytest.mark.parametrize("same_time", [False, True])
def test_repeats_leave_the_earliest(same_time: bool) -> None:
    random = np.random.default_rng(1)
    user, item, time = (random.integers(0, high, 200).astype(np.int32) for high in (6, 8, 4))
    rows = sorted(range(200), key=lambda row: time[row])  # stable: of equal times the first line's
    best: dict[tuple, int] = {}
    for row in rows:
        best.setdefault((user[row], item[row], time[row] if same_time else 0), row)
    keep = first_of_repeats(user, item, time, same_time=same_time)
    assert np.flatnonzero(keep).tolist() == sorted(best.values())


@pytest.mark.usefixtures("part_rows")
@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_k_core_is_the_one_found_by_deleting(k: int) -> None:
    random = np.random.default_rng(k)
    user, item = (random.integers(0, 40, 150).astype(np.int32) for _ in range(2))
    given = random.random(150) < 0.9
    left = set(np.flatnonzero(given).tolist())
    while True:
        users, items = Counter(user[list(left)].tolist()), Counter(item[list(left)].tolist())
        gone = {row for row in left if users[user[row]] < k or items[item[row]] < k}
        if not gone:
            break
        left -= gone
    keep = given.copy()
    few_users, few_items = k_core(user, item, keep, k)
    assert np.flatnonzero(keep).tolist() == sorted(left)
    assert few_users + few_items == given.sum() - len(left)
    assert (k == 9) == (len(left) == 0), "both outcomes are tried"


@pytest.mark.usefixtures("part_rows")
def test_numbers_follow_first_appearance() -> None:
    codes = np.random.default_rng(0).integers(0, 9, 60).astype(np.int32) * 2
    new, old = renumber(codes)
    appeared = list(dict.fromkeys(codes.tolist()))
    assert old.tolist() == appeared
    assert new.tolist() == [appeared.index(code) for code in codes]
    assert [len(part) for part in renumber(np.zeros(0, dtype=np.int32))] == [0, 0]


def test_ids_come_back_from_their_hashes_and_collisions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speeder.prepare.spool._ROWS", 3)  # several parts
    names = ["b", "a", "b", "ü", "c", "a", "b", "d"]

    def column(folder: str) -> IdColumn:
        (tmp_path / folder).mkdir()
        made = IdColumn(tmp_path / folder / "users")
        for name in names:
            made.add(name)
        made.close()
        return made

    made = column("sound")
    codes, hashes = made.codes()
    assert [made.names(hashes)[code] for code in codes] == names and len(hashes) == 5
    assert made.names(hashes[codes[[4, 3]]]) == ["c", "ü"] and made.names(hashes[:0]) == []

    monkeypatch.setattr(
        "speeder.prepare.spool.hash", lambda name: {"a": 1, "c": 1}.get(name, ord(name)), raising=False
    )
    made = column("colliding")
    codes, hashes = made.codes()
    assert made.names(hashes[codes[[0, 3]]]) == ["b", "ü"], "ids that are dropped may collide"
    with pytest.raises(SpeederError, match="have the same hash"):
        made.names(hashes[codes[[1]]])


def test_filters_are_counted_and_the_order_is_that_of_the_lines(tmp_path: Path) -> None:
    lines = [f"u{u},i{i},{time},5" for u in (3, 1, 2) for time, i in enumerate((5, 4, 6))]
    lines += ["u9,i5,0,5", "u1,i7,9,5", "u1,i5,0,5", "u2,i4,9,1"]
    path = tmp_path / "x.csv"
    path.write_text("user,item,timestamp,rating\n" + "\n".join(lines) + "\n")
    data = read("plain", path, core=2, min_rating=2)
    assert data.interactions.user_ids == ["u3", "u1", "u2"] and data.catalogue.ids == ["i5", "i4", "i6"]
    assert data.manifest["filters"] == {"k_core": 2, "min_rating": 2, "repeats": False}
    assert data.manifest["interactions"] == {
        "read": 13,
        "kept": 9,
        "dropped": {
            "rated lower than the threshold": 1,
            "same user and item as another line": 1,
            "user with fewer than 2 interactions": 1,
            "item with fewer than 2 interactions": 1,
        },
    }
    with pytest.raises(SpeederError, match=r"no interaction is left of 13 lines \(.*fewer than 5"):
        read("plain", path, core=5)


def test_the_same_files_give_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    """Hashes of strings differ from process to process; nothing of that may show."""
    random = np.random.default_rng(0)
    rows = [f"user-{u},item-{i},{t}" for u, i, t in random.integers(0, 30, (400, 3))]
    (tmp_path / "interactions.csv").write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")
    code = (
        "import sys; from speeder.prepare.pipeline import prepare;"
        "prepare('plain', sys.argv[1], sys.argv[2], core=3, modalities=())"
    )
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, str(tmp_path / "interactions.csv"), str(tmp_path / seed)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    for file in (tmp_path / "1").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "2" / file.relative_to(tmp_path / "1")).read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1", "2", "interactions.csv"]


HOSTILE = [
    (b'{"user": "u", "item": "i", "time": Infinity}', "timestamp is not a number"),
    (b'{"user": "u", "item": "i", "time": 1e999}', "timestamp is not a number"),
    (b'{"user": "u", "item": "i", "time": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"user": "u", "item": "i", "time": ' + b"9" * 400 + b"}", "timestamp is before 1970 or after 2100"),
    (b'{"user": "u", "item": "i", "time": true}', "timestamp is not a number"),
    (b'{"user": "u", "item": "i", "time": "\xd9\xa1\xd9\xa1"}', None),  # digits of another script
    (b'{"user": ' + b"7" * 400 + b', "item": "i", "time": 1}', "no user id"),
    (b'{"user": "' + b"u" * 300 + b'", "item": "i", "time": 1}', "user id is not short, printable text"),
    (b'{"user": "u", "item": "\\ud800", "time": 1}', "item id is not short, printable text"),
    (b'{"user": "u", "item": "a\\nb", "time": 1}', "item id is not short, printable text"),
    (b'{"user": "u", "item": "\\u0000", "time": 1}', "item id is not short, printable text"),
    (b'{"user": "u", "item": {"a": 1}, "time": 1}', "item id is not a string"),
    (b'{"user": "u", "item": "  ", "time": 1}', "item id is not short, printable text"),
    (b"[" * 200_000, "not JSON"),
    (b'{"a":' * 100_000, "not JSON"),
    (b'{"user": "u", "item": "i", "time": 1, "x": "' + b"x" * MAX_LINE_BYTES + b'"}', "longer than 4 MiB"),
    (b"\x00" * 100, "not JSON"),
    ('{"user": "u", "item": "i", "time": 1}'.encode("utf-16"), "not UTF-8"),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_lines_are_counted_with_their_number(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line, reason = HOSTILE[number]
    sound = b'{"user": "v", "item": "j", "time": 1}'
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(sound + b"\n" + line + b"\n" + sound.replace(b"j", b"k")))
    with caplog.at_level(logging.WARNING):
        data = read("plain", path)
    assert data.manifest["interactions"]["read"] == 3
    if reason is None:
        assert len(data.interactions) == 3
    else:
        assert data.manifest["interactions"]["dropped"] == {reason: 1}
        assert f"x.jsonl.gz line 2 dropped: {reason}" in caplog.text and len(data.interactions) == 2


def test_long_lines_are_never_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"a\n" + b"x" * 50 + b"\n" + b"y" * 10 + b"\n" + b"z" * 11 + b"\nb\r\n" + b"w" * 99)
    count = LineCount(path)
    assert list(read_lines(path, count, limit=10)) == [(1, "a"), (3, "y" * 10), (5, "b")]
    assert count.read == 6 and count.dropped.total() == 3


def test_broken_streams_are_refused_with_the_line(tmp_path: Path) -> None:
    lines = b"".join(b'{"user": "u", "item": "i%d", "time": 1}\n' % i for i in range(20_000))
    whole = gzip.compress(lines)
    path, out = tmp_path / "x.jsonl.gz", tmp_path / "out"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (whole[: len(whole) // 2], whole[:-4], bytes(flipped), whole + b"not gzip at all"):
        path.write_bytes(content)
        with pytest.raises(
            SpeederError, match=r"x\.jsonl\.gz line \d+: the gzip stream is broken or cut off"
        ):
            prepare("plain", path, out, modalities=())
        assert [entry.name for entry in tmp_path.iterdir()] == ["x.jsonl.gz"], "nothing half-written is left"
    path.write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]))  # two members are one stream
    assert len(prepare("plain", path, out, modalities=()).interactions) == 20_000


def test_texts_of_any_kind() -> None:
    assert clean("a &lt;b&gt; <p>c</p>\x00d\ud800 \t e<script>x</script><style>y") == "a c d e"
    assert clean([["a", None], 3, {"b": 1}, ["c", True]]) == "a 3 c"
    assert clean(float("nan")) == clean(None) == clean(10**400) == clean({"a": 1}) == ""
    assert clean("5 < 6 > 4 &amp; <3") == "5 < 6 > 4 & <3"
    assert clean("<!--" * 20_000) == clean("<script" * 10_000) == "" and clean("<" * 50_000)
    assert compose("A!", [("Brand", ["B"]), ("None", [])], "c", "A!", "c", "") == "A! Brand: B. c."


def test_long_titles_and_texts_are_cut_and_counted(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "interactions.csv").write_text("user,item,timestamp\nu,a,1\nu,b,2\n")
    lines = [
        json.dumps({"item": "a", "title": "t" * 3_000_000}),
        json.dumps({"item": "b", "title": "é" * 10}),
    ]
    (tmp_path / "raw" / "items.jsonl").write_text("\n".join(lines))
    data = read("plain", tmp_path / "raw")
    assert data.catalogue.titles == ["t" * MAX_TITLE, "é" * 10]
    assert len(data.catalogue.texts[0]) == MAX_TEXT and data.manifest["items"]["cut_short"] == 1


def test_names_of_pictures_stay_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.png").write_bytes(b"")
    names = [
        "sub/a.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        "b\0.png",
        "x" * 5000,
        "none.png",
        None,
    ]
    lines = [json.dumps({"item": f"i{n}", "title": "t", "image": name}) for n, name in enumerate(names)]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    rows = "".join(f"u,i{n},{n}\n" for n in range(len(names)))
    (tmp_path / "interactions.csv").write_text("user,item,timestamp\n" + rows)
    with scratch_folder(tmp_path / "out") as scratch:
        data = read_raw(READERS["plain"].open(tmp_path, None), scratch)
    found = add_images(data, folder, by_name=True)
    assert found.catalogue.images == [str(folder / "sub" / "a.png"), *[None] * 6]
    assert found.manifest["images"]["refused"] == ["i1", "i2", "i3"]
    assert found.manifest["images"]["missing"] == [f"i{n}" for n in range(1, 7)]


def test_names_of_pictures_without_a_folder_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "items.csv").write_text("item,title,image\na,A,a.png\nb,B,\nc,C,c.png\n")
    (tmp_path / "interactions.csv").write_text("user,item,timestamp\nu,a,1\nu,b,2\nu,c,3\n")
    data = prepare("plain", tmp_path, tmp_path / "out", modalities=())
    assert data.catalogue.images == [None] * 3
    assert data.manifest["images"] == {"matched": 0, "names_without_folder": 2}
    assert "pictures named in the table: 2; without --images" in caplog.text
    assert PreparedData.load(tmp_path / "out").manifest == data.manifest

    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "M_pairs.csv").write_text("user,item,timestamp\nu,a,1\nu,b,2\n")
    (tmp_path / "pairs" / "covers").mkdir()
    items = tmp_path / "items.csv"
    data = prepare("microlens", tmp_path / "pairs", tmp_path / "out", items=items, modalities=())
    assert data.manifest["images"]["names_unused"] == 1
    assert "1 items name a picture, but these pictures are found by item id" in caplog.text


def test_killed_anywhere_it_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    raw, out = tmp_path / "x.csv", tmp_path / "made" / "out"

    def write(items: int) -> None:
        raw.write_text("user,item,timestamp\n" + "".join(f"u,i{i},{i}\n" for i in range(items)))

    write(3)
    prepare("plain", raw, out, modalities=())
    write(5)
    touch, seen = 0, set()
    while killed_at(touch, lambda: prepare("plain", raw, out, modalities=())):
        seen.add(len(PreparedData.load(out).interactions))
        touch += 1
    assert seen == {3, 5} or seen == {3}
    assert touch > 3 and len(PreparedData.load(out).interactions) == 5
    prepare("plain", raw, out, modalities=())
    left = sorted(
        entry.name for entry in out.parent.iterdir() if "reading" in entry.name or "lock" in entry.name
    )
    assert left == [], "the next run clears what killed ones left"


def test_one_folder_is_prepared_once_at_a_time(tmp_path: Path) -> None:
    raw = tmp_path / "x.csv"
    raw.write_text("user,item,timestamp\nu,i,1\n")
    with (
        scratch_folder(tmp_path / "out"),
        pytest.raises(SpeederError, match="being prepared by another process"),
    ):
        prepare("plain", raw, tmp_path / "out", modalities=())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(SpeederError, match=r"holds 'thesis\.txt'"):
        prepare("plain", tmp_path / "none.csv", tmp_path / "mine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "netflix"}, "got 'netflix'"),
        ({"core": 0}, "k-core: expected at least 1, got 0"),
        ({"time_unit": "h"}, "got 'h'"),
        ({"path": "none.csv"}, "is missing"),
        ({"modalities": ("text",)}, "no item has a text"),
        ({"modalities": ("collaborative",)}, "collaborative features cannot be fitted"),
        ({"images": "none", "modalities": ()}, "none is not a folder"),
    ],
)
def test_settings_that_do_not_fit(
    options: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text("user,item,timestamp\nu,i,1\n")
    with pytest.raises(SpeederError, match=message):
        prepare(**{"name": "plain", "path": "x.csv", "out": "out", **options})
    assert not Path("out").exists()


_MEMORY = """
import sys, threading
from pathlib import Path
from speeder.prepare.pipeline import prepare
name, folder = sys.argv[1], Path(sys.argv[2])
def anonymous():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024
def peak(size):
    highest, done = [0], threading.Event()
    def watch():
        while not done.wait(0.005):
            highest[0] = max(highest[0], anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    prepare(name, folder / size, folder / f"out-{size}", core=5, modalities=())
    done.set()
    watcher.join()
    return highest[0]
small = peak("small")
print(peak("large") - small)
"""


def plain_lines(folder: Path, lines: int) -> None:
    with open(folder / "interactions.csv", "w") as file:
        file.write("user,item,timestamp\n")
        file.writelines(f"u{n % 1000},i{n % 97},{n}\n" for n in range(10_000))
        file.writelines(f"a-user-with-a-long-id-{n:012},i{n % 97},{n}\n" for n in range(lines - 10_000))


def amazon_lines(folder: Path, lines: int) -> None:
    """A quarter of the lines are items', most of which nobody has."""
    review = '{"rating": 5.0, "text": "%s", "parent_asin": "i%d", "user_id": "%s", "timestamp": %d}\n'
    item = '{"parent_asin": "%s", "title": "A cup for %d", "description": ["%s"]}\n'
    words = "Holds tea, and looks good. " * 8
    with gzip.open(folder / "R.jsonl.gz", "wt", compresslevel=1) as file:
        for n in range(lines * 3 // 4):
            user = f"u{n % 1000}" if n < 10_000 else f"a-user-with-a-long-id-{n:012}"
            file.write(review % (words, n % 97, user, 10**12 + n))
    with gzip.open(folder / "meta_R.jsonl.gz", "wt", compresslevel=1) as file:
        file.writelines(item % (f"i{n}" if n < 97 else f"nobodys-{n}", n, words) for n in range(lines // 4))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(("name", "write"), [("plain", plain_lines), ("amazon-2023", amazon_lines)])
def test_a_million_lines_take_little_memory(
    name: str, write: Callable[[Path, int], None], tmp_path: Path
) -> None:
    """Nearly every line has a user of its own, whom the 5-core drops: an id must not stay in memory."""
    for size, lines in (("small", 20_000), ("large", 1_000_000)):
        (tmp_path / size).mkdir()
        write(tmp_path / size, lines)
    process = subprocess.run(
        [sys.executable, "-c", _MEMORY, name, str(tmp_path)], check=True, capture_output=True, text=True
    )
    # a table of the million ids alone takes 170 MB
    assert float(process.stdout) < 140, f"{process.stdout} MB more for a million lines"
