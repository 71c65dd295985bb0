"""Prepared sets: round trip, damage, interrupted saves."""

from pathlib import Path

import pytest
import torch

from speeder.data import Interactions, ItemCatalogue, PreparedData
from speeder.errors import SpeederError
from tests.io.killing import killed_at


def prepared(items: int = 3) -> PreparedData:
    catalogue = ItemCatalogue([f"i{n}" for n in range(items)]).with_features("text", torch.ones(items, 2))
    interactions = Interactions([0] * items, list(range(items)), list(range(items)), ["u"])
    return PreparedData(catalogue, interactions, {"dataset": "toy", "dropped": {"no id": 1}})


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_round_trip_gives_the_same_data_and_bytes(tmp_path: Path) -> None:
    data = prepared()
    data.save(tmp_path / "a")
    loaded = PreparedData.load(tmp_path / "a")
    assert loaded.manifest == data.manifest
    assert loaded.catalogue.ids == data.catalogue.ids and loaded.catalogue.modalities == {"text": 2}
    assert loaded.split.hash() == data.split.hash()
    loaded.save(tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_an_interaction_without_an_item_is_refused() -> None:
    with pytest.raises(ValueError, match="name item 2, but the catalogue has 2 items"):
        PreparedData(ItemCatalogue(["a", "b"]), Interactions([0], [2], [0], ["u"]))


@pytest.mark.parametrize("file", sorted(["interactions.parquet", "catalogue/manifest.json", "manifest.json"]))
def test_damage_is_named(tmp_path: Path, file: str) -> None:
    prepared().save(tmp_path / "set")
    path = tmp_path / "set" / file
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(SpeederError, match=file.split("/")[-1]):
        PreparedData.load(tmp_path / "set")
    path.unlink()
    with pytest.raises(SpeederError, match=r"missing|does not hold"):
        PreparedData.load(tmp_path / "set")


def test_a_save_killed_anywhere_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    folder, sizes, killed = tmp_path / "set", set(), True
    for touch in range(100):
        prepared(3).save(folder)
        assert [path.name for path in tmp_path.iterdir()] == ["set"], "what a killed one left is cleared"
        killed = killed_at(touch, lambda: prepared(4).save(folder))
        loaded = PreparedData.load(folder)
        assert len(loaded.catalogue) == len(loaded.interactions)
        sizes.add(len(loaded.catalogue))
        if not killed:
            break
    assert not killed and sizes == {3, 4}


def test_other_files_are_never_swept_away(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("1,2")
    with pytest.raises(SpeederError, match=r"mine\.csv"):
        prepared().save(tmp_path)
    prepared().save(tmp_path / "set")
    (tmp_path / "set" / "mine.csv").write_text("1,2")
    with pytest.raises(SpeederError, match=r"mine\.csv"):
        prepared(4).save(tmp_path / "set")
    assert len(PreparedData.load(tmp_path / "set").catalogue) == 3
