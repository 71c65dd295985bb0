"""`speeder prepare` and `speeder describe`, and the way from raw files to a table in three commands."""

import re
from pathlib import Path

import pytest
from PIL import Image

from speeder.cli.main import build_parser, main
from speeder.data import PreparedData
from speeder.prepare.leave_out import leave_out_bare
from speeder.prepare.pipeline import prepare_ml100k
from speeder.prepare.readers import READERS
from speeder.prepare.synthetic import synthetic_world
from tests.model.worlds import save_tiny_backbone
from tests.prepare.amazon_pair import write_amazon_2018
from tests.prepare.encoders.tiny import save_clip

RECIPE = """
backbone: {backbone}
precision: fp32
batch_users: 64
stages:
  - {{name: text, open: [text], steps: 3}}
  - {{name: +collaborative, open: [text, collaborative], steps: 3}}
"""


def test_every_reader_is_offered(capsys: pytest.CaptureFixture) -> None:
    for name in READERS:
        assert build_parser().parse_args(["prepare", name, "raw", "--out", "out"]).name == name
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in READERS)
    with pytest.raises(SystemExit):
        main(["describe", "--help"])
    assert "example:\n  speeder describe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plain"], "expected the PATH of the raw files of plain"),
        (["ml-100k", "--k-core", "5"], "ml-100k without PATH takes no --items, no --columns"),
        (["plain", "none.csv"], "none.csv is missing"),
        (["plain", "x.csv", "--k-core", "0"], "k-core: expected at least 1, got 0"),
        (["plain", "x.csv", "--k-core", "9", "--without", "text"], "no interaction is left of 1 lines"),
        (["ml-1m", "x.csv"], "expected ratings.dat of ml-1m, found no ratings"),
        (["amazon-2018", "x.csv", "--time-unit", "ms"], "for plain data"),
        (
            ["plain", "x.csv", "--ties-seed", "1"],
            "ties seed: expected a number from 0, with ties 'shuffle', got 1",
        ),
        (["plain", "x.csv", "--split-time", "0.5", "0.6"], "split-time: expected two dates or shares"),
        (["ml-100k", "--split-time", "0.5", "0.6"], "split-time: expected two dates or shares"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text("user,item,timestamp\nu,i,1\n")
    assert main(["prepare", *arguments, "--out", "out"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("speeder: ") and message in lines[0], lines
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["x.csv"]


def test_pictures_by_item_id(
    tmp_path: Path, efficientnet_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEEDER_CACHE", str(tmp_path / "cache"))
    covers = tmp_path / "raw" / "covers"
    covers.mkdir(parents=True)
    Image.new("RGB", (60, 80), "red").save(covers / "1.jpg")
    (covers / "2.jpg").write_bytes(b"no picture")
    (tmp_path / "raw" / "M_pairs.csv").write_text("user,item,timestamp\n7,1,1000\n7,2,2000\n7,3,3000\n")
    (tmp_path / "raw" / "M_titles.csv").write_text("item,title\n1,One\n2,Two\n3,Three\n")
    command = ["prepare", "microlens", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    command += ["--without", "text", "collaborative", "--image-encoder", str(efficientnet_folder)]
    assert main(command) == 0
    data = PreparedData.load(tmp_path / "out")
    assert data.catalogue.modalities == {"image": 1280}
    assert data.catalogue.present["image"].tolist() == [True, False, False]
    record = data.manifest["images"]
    assert (record["matched"], record["missing"], list(record["broken"])) == (2, ["3"], ["2.jpg"])


def test_encoders_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEEDER_CACHE", str(tmp_path / "cache"))
    save_tiny_backbone(tmp_path / "backbone")
    save_clip(tmp_path / "clip")
    raw = tmp_path / "raw"
    (raw / "covers").mkdir(parents=True)
    Image.new("RGB", (60, 80), "red").save(raw / "covers" / "1.jpg")
    (raw / "M_pairs.csv").write_text("user,item,timestamp\n7,1,1000\n7,2,2000\n")
    (raw / "M_titles.csv").write_text("item,title\n1,w3 w4\n2,w5\n")
    command = ["prepare", "microlens", str(raw), "--out", str(tmp_path / "out"), "--without", "collaborative"]
    names = {"text": f"backbone:{tmp_path / 'backbone'}", "image": str(tmp_path / "clip")}
    assert main([*command, "--text-encoder", names["text"], "--image-encoder", names["image"]]) == 0
    data = PreparedData.load(tmp_path / "out")
    assert data.catalogue.modalities == {"text": 32, "image": 12}
    assert {name: record["name"] for name, record in data.manifest["encoders"].items()} == names


BARE = ["--without", "text", "image", "collaborative"]


def write_shop(folder: Path, header: str = "user,item,timestamp", time: str = "{day}", **more: str) -> Path:
    """Events of 20 users with 5 items on 5 days; a row's `time` is a form of the day, from 1 on."""
    folder.mkdir(exist_ok=True)
    end, events = more.get("end", ""), [(f"ü{u}", f"i{i}", i + 1) for u in range(20) for i in range(5)]
    rows = [f"{user},{item},{time.format(day=day)}{end}" for user, item, day in events]
    text = "\n".join([header, *rows, *more.get("rows", "").split()]) + "\n"
    (folder / "interactions.csv").write_text(text, encoding=more.get("encoding", "utf-8"))
    return folder


def prepared(shop: Path, *options: str) -> int:
    return main(["prepare", "plain", str(shop), "--out", str(shop.parent / "out"), *BARE, *options])


@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        (
            {"time": "1{day}/03/2024 09:10"},
            [],
            "100 of 100 lines cannot be used: timestamp is not a number (line 2: got '11/03/2024 09:10'; expected"
            " ISO 8601 such as 2024-03-14T09:10, or seconds since 1970)",
        ),
        (
            {"time": "soon"},
            ["--time-unit", "us"],
            "got 'soon'; expected ISO 8601 such as 2024-03-14T09:10, or microseconds since 1970",
        ),
        (
            {"time": "171040740000{day}"},
            [],
            "100 of 100 lines cannot be used: timestamp is before 1970 or after 2100 (line 2: got '1710407400001';"
            " looks like milliseconds: add --time-unit ms",
        ),
        ({"time": "171040740000000{day}"}, [], "looks like microseconds: add --time-unit us"),
        ({"time": "171040740000000000{day}"}, ["--time-unit", "ms"], "looks like nanoseconds: add --time-unit ns"),
        # one line more, which can be used, does not make another file of it
        ({"time": "1{day}/03/2024", "rows": "u,i0,1"}, [], "100 of 101 lines cannot be used"),
        ({"end": ",x"}, [], "100 of 100 lines cannot be used: wrong number of fields (line 2: got 4, expected 3)"),
        ({"encoding": "latin-1"}, [], "100 of 100 lines cannot be used: not UTF-8 (line 2: save the file as UTF-8)"),
        (
            {"header": "customer_id,product_id,created_at"},
            [],
            "it names customer_id, product_id, created_at; rename a column to 'user', and a column to 'item', and a"
            " column to 'timestamp'",
        ),
        (
            {"header": "user,item,created_at"},
            [],
            "has no column 'timestamp' or 'time' or 'ts'; it names user, item, created_at; rename a column to"
            " 'timestamp'",
        ),
        (
            {"header": "user;item;timestamp"},
            [],
            "the separator seems to be ';': expected ','; save the table with commas",
        ),
        (
            {"header": '"user";"item";"timestamp"'},
            [],
            "the separator seems to be ';': expected ','; save the table with commas",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_meant_in_another_way_gets_one_error(
    how: dict, options: list[str], message: str, tmp_path: Path, capsys, caplog: pytest.LogCaptureFixture
) -> None:
    assert prepared(write_shop(tmp_path / "shop", **how), *options) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("speeder: ") and message in lines[0], lines
    assert len(caplog.messages) <= 5, "of lines of one kind, only the first are told one by one"
    assert not (tmp_path / "out").exists()


def test_most_lines_may_lack_a_user(tmp_path: Path) -> None:
    """That is no other format: a shop's visitors without a name."""
    rows = " ".join(f",i0,{time}" for time in range(5000))
    assert prepared(write_shop(tmp_path / "shop", rows=rows)) == 0
    assert PreparedData.load(tmp_path / "out").manifest["interactions"]["dropped"] == {"no user id": 5000}


def test_json_lines_tell_their_names_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"customer": 1, "item": "a", "ts": 1}\n{"customer": 1, "item": "b"}\n')
    assert main(["prepare", "plain", str(file), "--out", str(tmp_path / "out")]) == 1
    message = "'uid'; it names customer, item, ts; rename a column to 'user'"
    assert message in capsys.readouterr().err
    file.write_text(
        '{"user": 1, "item": "a", "ts": 1}\n{"user": 1, "item": "b", "TS": 2, "\\ud800": 1, "where": 2}\n'
    )
    assert main(["prepare", "plain", str(file), "--out", str(tmp_path / "out"), *BARE]) == 0
    assert "interactions: columns not used: where\n" in capsys.readouterr().out
    file.write_text('[\n{"user": 1}\n]\n')
    assert main(["prepare", "plain", str(file), "--out", str(tmp_path / "out")]) == 1


def test_what_is_not_used_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shop = write_shop(tmp_path / "shop", rows="ü1,i1,9 ü2,i2,9 ü2,i2,9")
    assert prepared(shop) == 0
    whole = capsys.readouterr().out
    assert "dropped: 3 repeats of a user with an item (keep them with --repeats); more:" in whole
    assert not any(word in whole for word in ("not used", "only their title", "without a line", "share"))
    data = PreparedData.load(tmp_path / "out")
    assert data.manifest["interactions"]["dropped"] == {"same user and item as another line": 3}

    (shop / "items.csv").write_text(
        "item,category,title,text,colour\ni0,x,Lamp,,\ni1,x,Cup?,,\ni2,x,Kettle,Boils.,\ni3,x,,Red.,\n"
    )
    assert prepared(write_shop(shop, "user,item,timestamp,place", end=",home"), "--repeats") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[1:] == [
        "interactions: columns not used: place",
        "items: columns not used: category, colour (what describes an item belongs into text; --columns keeps a column"
        " for filters)",
        "items with only their title as text: 2 of 5",
        "items without a line in the file of items: 1",
    ]


def test_equal_times_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    message = (
        "of events share their user's time with another: their order is the file's, oldest first is expected"
    )
    shop = write_shop(
        tmp_path / "shop", time="2024-03-1{day}", rows=" ".join(f"ü{u},x,2024-03-11" for u in range(6))
    )
    assert prepared(shop) == 0
    assert f"11% {message}" in capsys.readouterr().out  # 2 of each of 6 users' 6 events, of 106 in all
    assert PreparedData.load(tmp_path / "out").manifest["same_time"] == 12
    # no two events of these days are at one time, though they are on one day
    assert prepared(write_shop(tmp_path / "shop", time="2024-03-14T09:10:00.00000{day}")) == 0
    assert "share" not in capsys.readouterr().out


def test_a_temporal_split_and_shuffled_ties_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shop = write_shop(
        tmp_path / "shop", time="2024-03-1{day}", rows=" ".join(f"ü{u},x,2024-03-11" for u in range(6))
    )
    dates = ["--split", "temporal", "--split-time", "2024-03-12", "2024-03-13"]
    assert prepared(shop, "--ties", "shuffle", "--ties-seed", "5", *dates) == 0
    told = capsys.readouterr().out
    assert (
        "split: Temporal split (training before 2024-03-12, test targets from 2024-03-13 on), ties: order shuffle, seed"
        " 5\n"
    ) in told
    assert "share their user's time" not in told
    assert "items unseen in training: " in told
    data = PreparedData.load(tmp_path / "out")
    assert f"test users: {len(data.split.users('test'))} of " in told


def test_a_replaced_folder_is_told_where_its_split_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    message = "replaced; runs trained on the earlier data can no longer be evaluated"
    shop = write_shop(tmp_path / "shop")
    assert prepared(shop) == prepared(shop) == 0
    assert message not in caplog.text, "the same data again"
    assert prepared(write_shop(shop, rows="ü1,i1,9"), "--repeats") == 0
    assert caplog.text.count(message) == 1
    (tmp_path / "out" / "interactions.parquet").write_bytes(b"damaged")
    assert prepared(shop) == 0 and caplog.text.count(message) == 1

    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        + "".join(f"{i}\tHeat\t1995\tAction\n" for i in range(4))
    )
    for films in ([0, 1, 2], [1, 2, 3]):
        rows = "".join(f"1\t{film}\t5\t{film}\n" for film in films)
        (raw / "ml-100k.inter").write_text(
            "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + rows
        )
        prepare_ml100k(tmp_path / "films", source=raw, modalities=())
    assert caplog.text.count(message) == 2


def test_no_file_of_items_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shop = write_shop(tmp_path / "shop")
    assert main(["prepare", "plain", str(shop), "--out", str(tmp_path / "out")]) == 1
    assert "no item has a text: expected items.csv (item, title, and perhaps text)" in capsys.readouterr().err


def test_the_help_tells_the_columns(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    told = capsys.readouterr().out
    for part in ("user,item,timestamp", "item,title", "user item item", "A modality is"):
        assert part in told
    assert "speeder prepare plain shop/ --out data/shop" in told


@pytest.mark.slow
def test_from_raw_amazon_2018_files_to_a_table_in_three_commands(
    tmp_path: Path, minilm_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SPEEDER_CACHE", str(tmp_path / "cache"))
    world = synthetic_world(num_items=60, num_users=300, history=8, held_out=0.0)
    write_amazon_2018(world, tmp_path / "raw")
    save_tiny_backbone(tmp_path / "backbone")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(backbone=tmp_path / "backbone"))
    data, run = tmp_path / "data", tmp_path / "run"

    command = ["prepare", "amazon-2018", str(tmp_path / "raw"), "--out", str(data)]
    assert main([*command, "--text-encoder", str(minilm_folder)]) == 0
    assert re.search(
        r"2400 interactions of 300 users with 60 items, modalities: text .* collaborative",
        capsys.readouterr().out,
    )
    assert (
        main(["train", "--data", str(data), "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(run)])
        == 0
    )
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    table = capsys.readouterr().out
    assert all(f"\n{row}" in table for row in ("popularity", "neighbours", "SASRec", "Speeder"))

    assert main(["describe", str(data), "--tokenizer", str(tmp_path / "backbone")]) == 0
    report = capsys.readouterr().out
    assert re.search(r"interactions read +2,426, kept 2,400", report)
    assert re.search(r"same user and item as another line +5\n", report) and re.search(
        r"not JSON +1\n", report
    )
    assert re.search(r"user with fewer than 5 interactions +20\n", report)

    prepared = PreparedData.load(data)
    assert prepared.manifest["filters"]["k_core"] == 5
    names = prepared.interactions.user_ids, prepared.catalogue.ids
    mine = dict(
        zip(names[0], [[names[1][i] for i in row] for row in prepared.interactions.sequences()], strict=True)
    )
    ids, sequences = world.catalogue.ids, world.interactions.sequences()
    theirs = {
        user: [ids[item] for item in row]
        for user, row in zip(world.interactions.user_ids, sequences, strict=True)
    }
    assert mine == theirs


def test_items_without_text_are_left_out_by_the_flag_that_training_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SPEEDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_tiny_backbone(Path("backbone"))
    recipe = RECIPE.split("  - {{name: +coll")[0].format(backbone="backbone")
    Path("recipe.yaml").write_text(recipe)
    rows = [f"u{n},i{(n + step) % 6},{step}\n" for n in range(8) for step in range(4)]
    rows += ["lonely,i5,1\n"]
    Path("interactions.csv").write_text("user,item,timestamp\n" + "".join(rows))
    Path("items.csv").write_text(
        "item,title\n" + "".join(f"i{n},w{n} w{n + 1}\n" for n in range(5)) + "i5,\n"
    )
    prepare = [
        "prepare",
        "plain",
        ".",
        "--out",
        "data",
        "--without",
        "image",
        "--text-encoder",
        "backbone:backbone",
    ]
    training = ["train", "--data", "data", "--recipe", "recipe.yaml", "--out", "run"]
    assert main(prepare) == 0
    whole = PreparedData.load("data")
    capsys.readouterr()
    assert main(training) == 1 and not Path("run").exists()
    told = capsys.readouterr().err
    assert "1 item(s) have none of the modalities text (for one: i5)" in told
    assert "speeder prepare --require text" in told

    assert main([*prepare, "--require", "text"]) == 0
    message = "1 of 6 items have no text and are left out (the first: 'i5'), with 5 interactions and 1 users"
    assert message in caplog.text
    assert "5 item without the modalities of --require" in capsys.readouterr().out
    data = PreparedData.load("data")
    assert data.catalogue.ids == [id_ for id_ in whole.catalogue.ids if id_ != "i5"]
    assert data.interactions.user_ids == whole.interactions.user_ids[:-1]
    before, after = (
        [[each.catalogue.ids[item] for item in row] for row in each.interactions.sequences()]
        for each in (whole, data)
    )
    assert after == [[item for item in row if item != "i5"] for row in before[:-1]]
    counts = data.manifest["interactions"]
    assert counts["kept"] == len(data.interactions) and counts["read"] == len(rows)
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["read"]
    assert data.manifest["items"]["left_out"] == {"require": ["text"], "items": 1}
    assert main(training) == 0 and main(["describe", "data", "--tokenizer", "backbone"]) == 0

    capsys.readouterr()
    assert main([*prepare, "--require", "image"]) == 1
    assert "require: no item has image features; the data have: text" in capsys.readouterr().err


def test_nothing_is_left_out_where_nothing_is_bare(tmp_path: Path) -> None:
    world = synthetic_world(num_users=30)
    data = PreparedData(world.catalogue, world.interactions, world.manifest)
    assert leave_out_bare(data, ["text"]) is data
