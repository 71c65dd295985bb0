"""The catalogue: round trips, growth, refusals, and what becomes of damaged or half-written folders."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speeder.data import ItemCatalogue
from speeder.errors import SpeederError
from tests.io.killing import killed_at

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def catalogues(draw: st.DrawFn) -> ItemCatalogue:
    ids = draw(st.lists(words, unique=True, max_size=6))
    count = len(ids)

    def column(values: st.SearchStrategy) -> list:
        return draw(st.lists(values, min_size=count, max_size=count))

    catalogue = ItemCatalogue(ids, column(words), column(words), column(st.none() | words))
    for name in draw(st.lists(st.sampled_from(["text", "image", "a-b_c"]), unique=True)):
        width = draw(st.integers(1, 4))
        finite = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
        rows = column(st.lists(finite, min_size=width, max_size=width))
        present = torch.tensor(column(st.booleans()), dtype=torch.bool)
        catalogue = catalogue.with_features(name, torch.tensor(rows).reshape(count, width), present)
    return catalogue


def assert_same(left: ItemCatalogue, right: ItemCatalogue) -> None:
    assert (left.ids, left.titles, left.texts, left.images) == (
        right.ids,
        right.titles,
        right.texts,
        right.images,
    )
    assert list(left.modalities.items()) == list(right.modalities.items())
    for name in left.modalities:
        assert torch.equal(left.features[name], right.features[name])
        assert torch.equal(left.present[name], right.present[name])


def example() -> ItemCatalogue:
    catalogue = ItemCatalogue(["a", "b", "c"], ["A", "B", "C"], ["one", "", "three"], ["a.png", None, None])
    catalogue = catalogue.with_features(
        "text", torch.arange(6.0).reshape(3, 2), torch.tensor([1, 0, 1]).bool()
    )
    return catalogue.with_features("image", torch.ones(3, 4))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(catalogue=catalogues())
def test_round_trip_keeps_all_and_its_bytes(catalogue: ItemCatalogue, tmp_path: Path) -> None:
    folder = tmp_path / "catalogue"
    catalogue.save(folder)
    loaded = ItemCatalogue.load(folder)
    assert_same(catalogue, loaded)
    assert_same(catalogue, ItemCatalogue.load(folder, verify=False))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    loaded.save(folder)  # onto the very files that its features are mapped from
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["catalogue"]


@settings(deadline=None, max_examples=30)
@given(first=catalogues(), second=catalogues())
def test_concat_keeps_both_sides_or_says_why_not(first: ItemCatalogue, second: ItemCatalogue) -> None:
    shared = set(first.ids) & set(second.ids)
    widths = [(first.modalities[m], second.modalities[m]) for m in first.modalities if m in second.modalities]
    if shared or any(left != right for left, right in widths):
        with pytest.raises(ValueError, match=r"more than once|features here"):
            first.concat(second)
        return
    both = first.concat(second)
    assert both.ids == first.ids + second.ids and both.images == first.images + second.images
    assert set(both.modalities) == set(first.modalities) | set(second.modalities)
    for side, rows in ((first, slice(0, len(first))), (second, slice(len(first), None))):
        for name in both.modalities:
            if name in side.modalities:
                assert torch.equal(both.features[name][rows], side.features[name])
                assert torch.equal(both.present[name][rows], side.present[name])
            else:
                assert not both.present[name][rows].any() and not both.features[name][rows].any()


def test_features_are_zero_where_absent_and_the_original_is_untouched() -> None:
    catalogue = example()
    given_features = torch.ones(3, 2, dtype=torch.float64)
    other = catalogue.with_features("text", given_features, torch.tensor([True, True, False]))
    assert other.features["text"].dtype == torch.float32
    assert other.features["text"].tolist() == [[1, 1], [1, 1], [0, 0]]
    assert catalogue.features["text"].tolist() == [[0, 1], [0, 0], [4, 5]]
    assert given_features.all()
    assert list(other.modalities) == ["text", "image"] and other.titles is catalogue.titles


def test_index_of_finds_rows_and_names_what_is_missing() -> None:
    assert [example().index_of(name) for name in "cab"] == [2, 0, 1]
    with pytest.raises(KeyError, match="no item has the id 'z' among 3 items"):
        example().index_of("z")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ids": ["a", "a"]}, ValueError, "'a' occurs more than once"),
        ({"ids": "ab"}, TypeError, "ids must be a list"),
        ({"ids": [1]}, TypeError, r"ids\[0\] must be a string, but is a int"),
        ({"ids": ["a"], "titles": []}, ValueError, r"titles must have one entry an item \(1\), but has 0"),
        ({"ids": ["a"], "texts": [None]}, TypeError, r"texts\[0\]"),
        ({"ids": ["a"], "present": {"text": torch.ones(1).bool()}}, ValueError, "no features"),
    ],
)
def test_bad_columns_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ItemCatalogue(**arguments)


@pytest.mark.parametrize(
    ("name", "features", "present", "error", "message"),
    [
        ("text", torch.zeros(2, 4), None, ValueError, r"\(I, F\) with I = 3"),
        ("text", torch.zeros(3), None, ValueError, r"have shape \(3,\)"),
        ("text", torch.zeros(3, 0), None, ValueError, "F > 0"),
        ("text", torch.zeros(3, 4, dtype=torch.long), None, TypeError, "floating point"),
        ("text", [[0.0]] * 3, None, TypeError, "must be a tensor"),
        (
            "text",
            torch.tensor([[0.0], [float("nan")], [0.0]]),
            None,
            ValueError,
            r"'text' .* item '[^']+' \(row 1\) hold NaN",
        ),
        (
            "text",
            torch.tensor([[0.0], [0.0], [float("inf")]]),
            None,
            ValueError,
            r"item '[^']+' \(row 2\) hold NaN",
        ),
        ("text", torch.zeros(3, 4), torch.ones(2).bool(), ValueError, r"\(3,\) bool"),
        ("text", torch.zeros(3, 4), torch.ones(3), ValueError, "torch.float32"),
        ("../text", torch.zeros(3, 4), None, ValueError, "modality's name"),
    ],
)
def test_bad_features_are_named(
    name: str, features: object, present: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        example().with_features(name, features, present)


def test_features_whose_sum_overflows_are_still_finite() -> None:
    large = torch.full((3, 4), 3e38)
    assert torch.equal(example().with_features("text", large).features["text"], large)


@pytest.mark.parametrize("file", ["items.parquet", "text.safetensors", "image.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed", "empty"])
def test_damaged_files_are_named(tmp_path: Path, file: str, damage: str) -> None:
    folder = tmp_path / "catalogue"
    example().save(folder)
    path = folder / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif file == "manifest.json":
        path.write_text(json.dumps({**json.loads(content), "items": 4}))
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SpeederError, match="catalogue") as caught:
        ItemCatalogue.load(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SpeederError, match=r"thesis\.txt"):
        example().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    saved = tmp_path / "catalogue"
    example().save(saved)
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(SpeederError, match=r"notes\.txt"):
        example().save(saved)
    assert_same(ItemCatalogue.load(saved), example())


def test_a_save_killed_anywhere_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    old, new = example(), example().concat(ItemCatalogue(["d"]))
    folder = tmp_path / "catalogue"
    seen = set()
    for touch in range(100):
        old.save(folder)
        assert [path.name for path in tmp_path.iterdir()] == ["catalogue"], (
            "what a killed one left is cleared"
        )
        killed = killed_at(touch, lambda: new.save(folder))
        loaded = ItemCatalogue.load(folder)
        assert_same(loaded, new if len(loaded) == len(new) else old)
        seen.add(len(loaded))
        if not killed:
            break
    assert not killed and touch > 5 and seen == {len(old), len(new)}


def test_items_are_written_group_by_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example().save(tmp_path / "at once")
    monkeypatch.setattr("speeder.data.catalogue._ROW_GROUP", 2)
    example().save(tmp_path / "in groups")
    at_once, in_groups = (
        pq.ParquetFile(tmp_path / name / "items.parquet") for name in ("at once", "in groups")
    )
    assert in_groups.num_row_groups == 2 and in_groups.read() == at_once.read()
    assert_same(ItemCatalogue.load(tmp_path / "in groups"), example())


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "catalogue"
    example().save(folder)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("speeder.data.catalogue.save_file", full_disk)
    with pytest.raises(SpeederError, match="No space"):
        example().concat(ItemCatalogue(["d"])).save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["catalogue"]
    assert_same(ItemCatalogue.load(folder), example())
