"""Texts and pictures encoded in parts: the same bits in the same files as in one process, none of them twice."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from speeder.errors import SpeederError
from speeder.io.parts import here
from speeder.prepare.encoders.image import ImageEncoder
from speeder.prepare.encoders.in_parts import _encoding, _name
from speeder.prepare.encoders.text import TextEncoder
from speeder.prepare.features import add_features
from speeder.prepare.synthetic import synthetic_world
from tests.prepare.encoders.tiny import save_bert, save_clip

TEXTS = [" ".join(words) for words in product(["dogs", "cats", "bank", "robbery", "Heat", "title"], repeat=4)]
TEXTS = [text + " dogs" * (place % 7) for place, text in enumerate(TEXTS[:600])]
TEXTS += ["", TEXTS[3], "  "]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encode") / "bert"
    torch.manual_seed(0)
    save_bert(folder)
    return folder


def files(cache: Path) -> dict[str, bytes]:
    """The cache's files, and nothing else but them."""
    found = {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    assert all(name.endswith(".safetensors") for name in found), list(found)
    return found


@pytest.mark.exact
def test_the_same_files_as_in_one_process(bert, tmp_path):
    expected, there = TextEncoder(str(bert)).encode(TEXTS, cache=tmp_path / "one")
    found, present = TextEncoder(str(bert), runner=here).encode(TEXTS, cache=tmp_path / "parts")
    assert torch.equal(found, expected) and torch.equal(present, there) and there.sum() == len(TEXTS) - 2
    assert files(tmp_path / "one") == files(tmp_path / "parts") and len(files(tmp_path / "one")) == 3
    keys = [
        row.numpy().tobytes()
        for file in (tmp_path / "parts").rglob("*.safetensors")
        for row in load_file(file)["keys"]
    ]
    assert len(keys) == len(set(keys)) == len({text.strip() for text in TEXTS} - {""})

    def never(make, parts, missing):
        raise AssertionError("all is there")

    again, _ = TextEncoder(str(bert), runner=never).encode(TEXTS, cache=tmp_path / "parts")
    assert torch.equal(again, expected)


@pytest.mark.exact
def test_an_interrupted_driver_goes_on_with_the_same_batches(bert, tmp_path):
    expected, _ = TextEncoder(str(bert)).encode(TEXTS, cache=tmp_path / "one")

    def last_first(make, parts, missing):  # and then the driver is gone
        yield from here(make, parts, missing[-1:])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TextEncoder(str(bert), runner=last_first).encode(TEXTS, cache=tmp_path / "parts")
    done = []

    def rest(make, parts, missing):
        done.extend(missing)
        yield from here(make, parts, missing)

    found, _ = TextEncoder(str(bert), runner=rest).encode(TEXTS, cache=tmp_path / "parts")
    assert done == [0, 1] and torch.equal(found, expected)
    assert files(tmp_path / "one") == files(tmp_path / "parts")


@pytest.mark.exact
def test_pictures_and_broken_ones(tmp_path):
    save_clip(tmp_path / "clip")
    paths = []
    for place in range(270):
        paths.append(str(tmp_path / f"{place}.png"))
        Image.new("RGB", (32, 32), (place % 256, place // 2, 90)).save(paths[-1])
    Path(paths[7]).write_bytes(b"no picture")
    paths.append(None)
    expected = ImageEncoder(str(tmp_path / "clip")).encode(paths, cache=tmp_path / "one")
    found = ImageEncoder(str(tmp_path / "clip"), runner=here).encode(paths, cache=tmp_path / "parts")
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert found[2] == expected[2] and list(found[2]) == [paths[7]]
    assert files(tmp_path / "one") == files(tmp_path / "parts")


def test_a_cache_that_workers_do_not_share_is_told(bert, tmp_path):
    def elsewhere(make, parts, missing):
        yield from here(make, parts, missing)
        for file in (tmp_path / "parts").rglob("*.safetensors"):
            file.unlink()

    with pytest.raises(SpeederError, match=r"lacks 600 of 600 rows .*SPEEDER_CACHE"):
        TextEncoder(str(bert), runner=elsewhere).encode(TEXTS, cache=tmp_path / "parts")
    found, _ = TextEncoder(str(bert), runner=here).encode(TEXTS[:3], cache=tmp_path / "parts")
    assert found.any(dim=1).all(), "it is not stuck"


@pytest.mark.parametrize("prefix", ["", "backbone:"])
def test_folders_are_named_from_the_root(bert, monkeypatch, prefix):
    monkeypatch.chdir(bert.parent)
    assert _name(SimpleNamespace(name=f"{prefix}bert")) == f"{prefix}{bert.resolve()}"
    assert _name(SimpleNamespace(name=f"{prefix}nobody/bert")) == f"{prefix}nobody/bert"


def test_a_worker_with_another_model_refuses(bert, tmp_path):
    with pytest.raises(SpeederError, match="this worker has another model"):
        _encoding(lambda: TextEncoder(str(bert)), "text-2:other", tmp_path)


def test_the_catalogues_default_encoders_take_the_runner(bert, tmp_path, monkeypatch):
    made = []

    class Noted(TextEncoder):
        def __init__(self, name=str(bert), **options):
            made.append(options.get("runner"))
            super().__init__(name, **options)

    monkeypatch.setattr("speeder.prepare.encoders.text.TextEncoder", Noted)
    monkeypatch.setenv("SPEEDER_CACHE", str(tmp_path))
    world = synthetic_world(num_users=12, history=5)
    data = add_features(world, ["text"], runner=here)
    assert made[0] is here and data.catalogue.features["text"].shape == (len(world.catalogue), 16)
