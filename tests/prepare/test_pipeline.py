"""Preparing MovieLens-100K from start to end, with pictures drawn here."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from speeder.data import PreparedData
from speeder.data.titles import split_year, title_keys
from speeder.prepare.encoders.image import ImageEncoder
from speeder.prepare.encoders.text import TextEncoder
from speeder.prepare.pipeline import prepare_ml100k
from speeder.prepare.posters import match_posters
from speeder.prepare.readers.ml100k import read_ml100k
from speeder.recipes.load import settings_for
from speeder.recipes.sasrec import SASRecConfig

CONTENT = ("text", "image")  # without collaborative features, which take longest
RAW_ITEMS = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
1\tHeat\t1995\tAction
2\tBlue Angel, The (Blaue Engel, Der)\t1930\tDrama
3\tAlien\t1979\tHorror
4\tunkonwn\tunkonwn\tunknown
"""
RAW_INTERACTIONS = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "".join(
    f"{user}\t{item}\t5\t{user * 10 + item}\n" for user in (1, 2) for item in (1, 2, 3, 4)
)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "ml-100k.item").write_text(RAW_ITEMS)
    (folder / "ml-100k.inter").write_text(RAW_INTERACTIONS)
    return folder


@pytest.fixture
def posters(tmp_path: Path) -> Path:
    folder = tmp_path / "posters"
    folder.mkdir()
    Image.new("RGB", (80, 120), "red").save(folder / "1.jpg", quality=95)
    Image.effect_noise((80, 120), 90).convert("RGB").save(folder / "2.jpg")
    whole = (folder / "2.jpg").read_bytes()
    (folder / "2.jpg").write_bytes(whole[: len(whole) // 2])
    records = [
        {"title": "Heat (1995)", "image": "1.jpg", "plot": "Robbers and a detective."},
        {"title": "Der blaue Engel (The Blue Angel) (1930)", "image": "2.jpg", "plot": "N/A"},
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def cache(
    tmp_path: Path, minilm_folder: Path, efficientnet_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[TextEncoder, ImageEncoder]:
    """Both encoders by folder, so that a cache of this test's own needs no downloads."""
    monkeypatch.setenv("SPEEDER_CACHE", str(tmp_path / "cache"))
    return TextEncoder(str(minilm_folder)), ImageEncoder(str(efficientnet_folder))


def test_pictures_plots_and_the_manifest(
    tmp_path: Path, raw: Path, posters: Path, cache: tuple[TextEncoder, ImageEncoder]
) -> None:
    encoders = {"text_encoder": cache[0], "image_encoder": cache[1]}
    data = prepare_ml100k(tmp_path / "out", source=raw, posters=posters, modalities=CONTENT, **encoders)
    assert data.catalogue.texts[0] == "Heat (1995). Genres: Action. Robbers and a detective."
    assert data.catalogue.texts[1] == "The Blue Angel (Der Blaue Engel) (1930). Genres: Drama."
    assert data.catalogue.modalities == {"text": 384, "image": 1280}
    assert data.catalogue.present["text"].tolist() == [True, True, True, False]
    assert data.catalogue.present["image"].tolist() == [True, False, False, False]
    assert not data.catalogue.features["image"][1:].any()
    record = data.manifest["images"]
    assert (record["matched"], record["missing"], record["plots"]) == (2, ["3", "4"], 1)
    assert list(record["broken"]) == ["2.jpg"] and "truncated" in record["broken"]["2.jpg"]
    assert set(data.manifest["encoders"]) == {"text", "image"}
    loaded = PreparedData.load(tmp_path / "out")
    assert loaded.manifest == data.manifest
    assert torch.equal(loaded.catalogue.features["image"], data.catalogue.features["image"])

    again = prepare_ml100k(tmp_path / "again", source=raw, posters=posters, modalities=CONTENT, **encoders)
    assert again.manifest == data.manifest
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            assert (tmp_path / "again" / file.relative_to(tmp_path / "out")).read_bytes() == file.read_bytes()

    plain = prepare_ml100k(
        tmp_path / "plain", source=raw, posters=posters, include_plot=False, modalities=CONTENT, **encoders
    )
    assert plain.catalogue.texts[0] == "Heat (1995). Genres: Action."
    assert plain.manifest["images"]["plots"] == 0


def test_without_posters_there_is_text_alone(
    tmp_path: Path, raw: Path, cache: tuple[TextEncoder, ImageEncoder]
) -> None:
    data = prepare_ml100k(tmp_path / "out", source=raw, text_encoder=cache[0], modalities=CONTENT)
    assert data.catalogue.modalities == {"text": 384} and "images" not in data.manifest


@pytest.mark.skipif(
    "SPEEDER_SHARED_DATA" not in os.environ, reason="SPEEDER_SHARED_DATA names no folder of data"
)
def test_real_posters_match_real_titles(ml100k_folder: Path) -> None:
    """Runs only where that (not redistributable) folder is at hand."""
    folder = Path(os.environ["SPEEDER_SHARED_DATA"]) / "movie-posters"
    titles = read_ml100k(ml100k_folder).catalogue.titles
    found = match_posters(folder, titles)
    assert sum(poster is not None and poster.image is not None for poster in found) >= 1640
    lines = (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()
    by_image = {record["image"]: record["title"] for record in map(json.loads, lines)}
    for title, poster in zip(titles, found, strict=True):
        if poster and poster.image:
            name, year = split_year(by_image[Path(poster.image).name])
            assert year == split_year(title)[1] and set(title_keys(name)) & set(
                title_keys(split_year(title)[0])
            )


def test_settings_of_the_collaborative_features_follow_the_histories() -> None:
    short = settings_for([[1, 2, 3]] * 5 + [[1] * 90] * 4)
    long = settings_for([[1, 2, 3]] * 4 + [[1] * 90] * 5)
    assert short.batch_size > long.batch_size and long == SASRecConfig()
