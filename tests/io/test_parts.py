"""Parts: each computed once, in order, whatever is killed; histories that are wrong are told before any work."""

import os
import shutil

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from speeder.cli.main import main
from speeder.errors import SpeederError
from speeder.io.parts import computed, here, job_parts
from speeder.io.ray import OnRay
from speeder.serving.recommend_file import recommend_file
from tests.io.killing import killed_at
from tests.model.worlds import tiny_model


def doubled():
    return lambda table: pa.table({"twice": pc.multiply(table["row"], 2)})


def job(folder, log=None, identity=None, out=None):
    """Doubles the numbers 0..8 in three parts; `log` gets a line for each part that is computed."""
    tables = (pa.table({"row": [start, start + 1, start + 2]}) for start in (0, 3, 6))

    def runner(make, parts, missing):
        for part in here(make, parts, missing):
            if log is not None:
                with open(log, "a") as file:
                    file.write(f"{part}\n")
            yield part

    with computed(folder, identity or {"a": 1}, tables, doubled, runner, "double") as outputs:
        made = pa.concat_tables(outputs)["twice"].to_pylist()
        if out is not None:
            out.write_text(str(made))
    return made


WHOLE = list(range(0, 18, 2))


def test_a_killed_driver_goes_on_and_nothing_is_lost_or_doubled(tmp_path):
    touch, resumed = 0, 0
    while True:
        folder, out, log = (tmp_path / f"{name}{touch}" for name in ("parts", "out", "log"))
        killed = killed_at(touch, lambda folder=folder, out=out: job(folder, out=out))
        parts = job_parts(folder, {"a": 1})
        done = 3 - len(parts.missing()) if (parts.folder / "job.json").exists() else 0
        assert job(folder, log) == WHOLE
        computed_again = log.read_text().split() if log.exists() else []
        if killed and done:
            resumed += 1
            assert len(computed_again) == 3 - done
        assert not folder.exists()
        if not killed:
            break
        touch += 1
    assert touch > 8 and resumed >= 3


def test_another_jobs_parts_are_thrown_away(tmp_path):
    def interrupted(make, parts, missing):
        yield next(here(make, parts, missing))
        raise KeyboardInterrupt

    tables = [pa.table({"row": [100]}), pa.table({"row": [101]})]
    with (
        pytest.raises(KeyboardInterrupt),
        computed(tmp_path / "parts", {"a": 0}, tables, doubled, interrupted, "double"),
    ):
        pass
    old = job_parts(tmp_path / "parts", {"a": 0})
    assert old.missing() == [1]
    staged = []

    def late(make, parts, missing):  # a lost worker of the old job writes once more
        shutil.copytree(parts.folder / "input", old.folder / "input")
        old.compute(1, doubled())
        staged.append(old.output(1).exists())
        yield from here(make, parts, missing)

    tables = [pa.table({"row": [start, start + 1, start + 2]}) for start in (0, 3, 6)]
    with computed(tmp_path / "parts", {"a": 1}, tables, doubled, late, "double") as outputs:
        assert pa.concat_tables(outputs)["twice"].to_pylist() == WHOLE
    assert staged == [True] and not (tmp_path / "parts").exists()


def test_a_part_that_lost_rows_and_a_second_process_are_errors(tmp_path):
    def careless(make, parts, missing):
        yield from here(make, parts, missing)
        pq.write_table(pa.table({"twice": [0]}), parts.output(1))
        with pytest.raises(SpeederError, match="another process"):
            job(parts.folder.parent)

    tables = [pa.table({"row": [0, 1]}), pa.table({"row": [2, 3]})]
    with (
        pytest.raises(SpeederError, match=r"000001\.parquet: expected 2 rows, got 1"),
        computed(tmp_path / "parts", {}, tables, doubled, careless, "double") as outputs,
    ):
        list(outputs)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch") / "model"
    tiny_model().save_pretrained(folder)
    return folder


def test_recommended_as_one_by_one(model, tmp_path):
    items = [["id3", "id4"], ["id5"], ["id1", "id1", "id9"], ["id2"], ["id7", "id0"]]
    (tmp_path / "in").mkdir()
    for place, rows in enumerate((slice(0, 2), slice(2, 5))):  # files are cut elsewhere than parts
        users = list(range(5))[rows]
        pq.write_table(pa.table({"items": items[rows], "user": users}), tmp_path / "in" / f"{place}.parquet")
    out = tmp_path / "out.parquet"
    assert recommend_file(model, tmp_path / "in", out, 3, part_rows=3) == 5
    table = pq.read_table(out)
    assert table["user"].to_pylist() == list(range(5))
    for history, ids, scores in zip(
        items, table["items"].to_pylist(), table["scores"].to_pylist(), strict=True
    ):
        best = tiny_model().recommend([history], 3)[0]
        assert ids == [item.id for item in best]
        assert scores == pytest.approx([item.score for item in best], rel=1e-5)
    assert set(os.listdir(tmp_path)) == {"in", "out.parquet"}
    arguments = ["--histories", tmp_path / "in", "--out", tmp_path / "cli.parquet", "-k", "3"]
    assert main(["recommend", str(model), *map(str, arguments)]) == 0
    assert pq.read_table(tmp_path / "cli.parquet")["items"] == table["items"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": ["a"]}, "in.parquet: expected a column 'items', got user"),
        ({"items": [["id1"]]}, "expected a column 'user'"),
        ({"user": ["a"], "items": [[1]]}, "lists of strings, the catalogue's ids, got list<.*int64"),
        ({"user": [0.5], "items": [["id1"]]}, "user to be strings or integers, got double"),
        ({"user": ["a", "b"], "items": [["id1"], ["gone"]]}, r"row 1 \(user 'b'\): no item has the id 'gone'"),
        ({"user": ["a", "b"], "items": [["id1"], []]}, "row 1 .*at least one item"),
        ({"user": ["a", None], "items": [["id1"]] * 2}, "row 1 .*expected a user, got null"),
        ({"user": ["a"], "items": [[f"id{i}" for i in range(18)]]}, "expected at least 3 unseen items, got 2"),
    ],
)  # fmt: skip
def test_wrong_histories_get_one_line(columns, message, model, tmp_path):
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    with pytest.raises(SpeederError, match=message):
        recommend_file(model, tmp_path / "in.parquet", tmp_path / "out.parquet", 3)
    assert not (tmp_path / "out.parquet").exists()


def test_what_is_written_is_not_in_the_recommenders_folder(model, tmp_path):
    pq.write_table(pa.table({"user": ["a"], "items": [["id1"]]}), tmp_path / "in.parquet")
    with pytest.raises(SpeederError, match="lies in the recommender's folder"):
        recommend_file(model, tmp_path / "in.parquet", model / "out.parquet", 3)


@pytest.mark.parametrize("histories", ["in", "in/0.parquet"])
def test_what_is_written_is_not_among_the_histories(histories, model, tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"user": ["a"], "items": [["id1"]]}), tmp_path / "in" / "0.parquet")
    before = (tmp_path / "in" / "0.parquet").read_bytes()
    with pytest.raises(SpeederError, match="lies among the histories"):
        recommend_file(model, tmp_path / histories, tmp_path / "in" / "0.parquet", 3)
    assert (tmp_path / "in" / "0.parquet").read_bytes() == before


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("speeder.io.ray.find_spec", lambda name: None)
    with pytest.raises(SpeederError, match=r"pip install .ray\[data\]"):
        OnRay()


def test_a_file_of_histories_takes_lists_unknown_ids_and_new_users(tmp_path):
    model = tiny_model()
    model.set_item_counts([[3, 3, 5], [5, 7, 3]])
    model.save_pretrained(tmp_path / "model")
    histories = [["id1", "no", "id2"], [], ["no"], None]
    pq.write_table(
        pa.table({"user": ["a", "b", "c", "d"], "items": pa.array(histories, pa.list_(pa.string()))}),
        tmp_path / "in.parquet",
    )
    asked = dict(deny=["id3"], unknown="skip", fallback="popularity")
    for where, message in (
        ({}, "row 0 .*'no'"),
        ({"unknown": "skip"}, "row 1 .*at least one item, got none"),
    ):
        with pytest.raises(SpeederError, match=message):
            recommend_file(tmp_path / "model", tmp_path / "in.parquet", tmp_path / "out.parquet", 3, **where)
    recommend_file(tmp_path / "model", tmp_path / "in.parquet", tmp_path / "out.parquet", 3, **asked)
    found = pq.read_table(tmp_path / "out.parquet")["items"].to_pylist()
    assert found[0] == [item.id for item in model.recommend([[1, 2]], 3, deny=[3])[0]]
    assert found[1] == found[2] == found[3] == ["id5", "id7", "id0"]
    with pytest.raises(SpeederError, match="expected at least 3 unseen items, got 2"):
        recommend_file(
            tmp_path / "model",
            tmp_path / "in.parquet",
            tmp_path / "o",
            3,
            allow=["id5", "id3", "id4"],
            **asked,
        )
    with pytest.raises(SpeederError, match="fallback: expected one of popularity"):
        recommend_file(tmp_path / "model", tmp_path / "in.parquet", tmp_path / "o", 3, fallback="content")


def test_the_command_takes_lists_unknown_ids_and_new_users(tmp_path, capsys):
    model = tiny_model()
    model.set_catalogue(model.catalogue.with_columns({"genre": ["Drama", "Comedy"] * 10}))
    model.set_item_counts([[3, 3, 5], [5, 7, 3]])
    model.save_pretrained(tmp_path / "model")

    def told(*arguments: str) -> list[str]:
        assert main(["recommend", str(tmp_path / "model"), "-k", "3", *arguments]) == 0
        return [line.split()[1] for line in capsys.readouterr().out.splitlines()]

    assert told("--history", "--fallback", "popularity") == ["id3", "id5", "id7"]
    assert told("--history", "no", "--unknown", "skip", "--fallback", "popularity", "--deny", "id5") == [
        "id3",
        "id7",
        "id0",
    ]
    allowed = ["id2", "id3", "id5", "id9"]
    expected = [item.id for item in model.recommend([[1]], 3, allow=allowed)[0]]
    assert told("--history", "id1", "--allow", *allowed) == expected
    expected = [item.id for item in model.recommend([[1]], 3, where={"genre": "Comedy"})[0]]
    assert told("--history", "id1", "--where", "genre=Comedy") == expected
    for arguments, message in (
        (["--history"], "empty history"),
        (["--history", "no"], "no item has the id 'no'"),
        (["--history", "id1", "--where", "genre"], "--where: expected COLUMN=VALUE, got 'genre'"),
        (
            ["--history", "id1", "--where", "colour=red"],
            "where: expected a column of the catalogue (genre), got 'colour'",
        ),
    ):
        assert main(["recommend", str(tmp_path / "model"), *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error and error.splitlines()[-1].startswith("speeder: ")
