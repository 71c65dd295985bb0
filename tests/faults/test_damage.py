"""Files that are missing, cut or changed, and numbers that are not finite: told by name, never used in silence."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from speeder.cli.main import main
from speeder.data import PreparedData
from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError
from speeder.model.modeling import SpeederForCausalLM
from speeder.prepare.encoders.cache import FeatureCache, content_key, write_shard
from speeder.prepare.encoders.text import TextEncoder
from speeder.prepare.features import add_features
from speeder.prepare.new_items import encode_items
from speeder.prepare.synthetic import synthetic_world
from speeder.retrieval.shards import TokenShards, write_token_shards
from tests.model.worlds import tiny_model
from tests.prepare.encoders.tiny import save_bert


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def change_a_number(path: Path) -> None:
    """The last number of a safetensors file becomes another finite one: same shape, other bytes."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE = pytest.mark.parametrize("damage", [Path.unlink, cut, empty, change_a_number])


@DAMAGE
@pytest.mark.parametrize(
    "file", ["catalogue/image.safetensors", "catalogue/items.parquet", "interactions.parquet"]
)
def test_prepared_data(tmp_path: Path, damage: Callable, file: str) -> None:
    world = synthetic_world(num_users=20, history=6)
    PreparedData(world.catalogue, world.interactions, world.manifest).save(tmp_path / "data")
    damage(tmp_path / "data" / file)
    with pytest.raises(SpeederError, match=file) as caught:
        PreparedData.load(tmp_path / "data")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    import shutil

    return shutil.copytree(saved, tmp_path / "model")


@DAMAGE
@pytest.mark.parametrize("file", ["catalogue/text.safetensors", "catalogue/items.parquet"])
def test_the_catalogue_of_a_saved_recommender(copy: Path, damage: Callable, file: str) -> None:
    damage(copy / file)
    with pytest.raises(SpeederError, match=file):
        SpeederForCausalLM.from_pretrained(copy)


def test_features_that_were_replaced_with_their_hashes(copy: Path) -> None:
    """A whole other catalogue of the same items and shapes, its own manifest in order: the model knows its own."""
    catalogue = ItemCatalogue.load(copy / "catalogue")
    features = catalogue.features["text"].clone()
    features[0, 0] += 1
    catalogue.with_features("text", features, catalogue.present["text"]).save(copy / "catalogue")
    with pytest.raises(SpeederError, match=r"catalogue.*not the one that this recommender was saved with"):
        SpeederForCausalLM.from_pretrained(copy)
    given = SpeederForCausalLM.from_pretrained(copy, catalogue=ItemCatalogue.load(copy / "catalogue"))
    assert given.catalogue.features["text"][0, 0] == features[0, 0], "who gives one knows what it is"


@pytest.mark.parametrize("damage", [Path.unlink, cut, empty])
def test_the_weights_of_a_saved_recommender(
    copy: Path, damage: Callable, capsys: pytest.CaptureFixture
) -> None:
    damage(copy / "model.safetensors")
    with pytest.raises(SpeederError, match=r"model\.safetensors"):
        SpeederForCausalLM.from_pretrained(copy)
    assert main(["recommend", str(copy), "--history", "id1"]) == 1
    told = capsys.readouterr().err
    assert "model.safetensors" in told and "Traceback" not in told


def test_a_missing_shard_of_the_weights(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(SpeederError, match=lost.name):
        SpeederForCausalLM.from_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    cut(lost)
    with pytest.raises(SpeederError, match=lost.name):
        SpeederForCausalLM.from_pretrained(tmp_path)


def test_weights_that_a_file_lacks(copy: Path) -> None:
    """transformers would draw them at random, with a warning."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["item_head.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpeederError, match=r"lack the weights item_head\.weight"):
        SpeederForCausalLM.from_pretrained(copy)


@DAMAGE
def test_token_shards(tmp_path: Path, damage: Callable) -> None:
    model = tiny_model()
    write_token_shards(model, tmp_path, shard_items=8)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    damage(shard)
    with pytest.raises(SpeederError, match=shard.name):
        TokenShards(tmp_path, verify=True)


@pytest.mark.parametrize("damage", [cut, empty, change_a_number])
def test_a_cache_of_features(tmp_path: Path, damage: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """It only saves work: what is broken is named and encoded again, a changed number included."""
    folder = FeatureCache("toy", tmp_path).folder
    keys = [content_key(text) for text in ("a", "b")]
    shard = write_shard(folder, {key: torch.full((3,), float(n)) for n, key in enumerate(keys)})
    assert all(key in FeatureCache("toy", tmp_path) for key in keys)
    damage(shard)
    cache = FeatureCache("toy", tmp_path)
    assert not any(key in cache for key in keys)
    assert shard.name in caplog.text


class Broken:
    """A text encoder that gives a number that is none."""

    name, identity = "broken", "broken"

    def __init__(self, value: float):
        self.value = value

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.ones(len(texts), 4)
        features[2, 1] = self.value
        return features, torch.ones(len(texts), dtype=torch.bool)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_encoder_that_gives_no_numbers(value: float) -> None:
    world = synthetic_world(num_users=20, history=6)
    ids = world.catalogue.ids
    items = ItemCatalogue(ids, texts=["a text"] * len(ids))
    data = PreparedData(items, world.interactions, {})
    with pytest.raises(SpeederError, match=rf"text features .* item '{ids[2]}'"):
        add_features(data, ["text"], text_encoder=Broken(value))
    with pytest.raises(SpeederError, match=rf"text features .* item '{ids[2]}'"):
        encode_items(items, {"text": 4}, text_encoder=Broken(value))
    features = torch.ones(len(ids), 4)
    features[2, 1] = value
    with pytest.raises(ValueError, match=rf"'text' must be finite, but those of item '{ids[2]}'"):
        items.with_features("text", features)
    with pytest.raises(ValueError, match=rf"'text' must be finite, but those of item '{ids[2]}'"):
        data.with_features("text", features, made_by="hand", training_hash=None)


def test_a_model_that_overflows_on_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The item is named, the other texts stay encoded, and what is no number is in no cache."""
    monkeypatch.setenv("SPEEDER_CACHE", str(tmp_path / "cache"))
    model = save_bert(tmp_path / "bert")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[7] = float("nan")  # "cats"
    model.save_pretrained(tmp_path / "bert")
    world = synthetic_world(num_users=20, history=6)
    ids = world.catalogue.ids
    texts = ["dogs", "bank robbery", "title Heat"] * len(ids)
    texts = texts[: len(ids)]
    texts[4] = texts[6] = "cats dogs"
    data = PreparedData(ItemCatalogue(ids, texts=texts), world.interactions, {})
    encoder = TextEncoder(str(tmp_path / "bert"), batch_size=1)
    with pytest.raises(SpeederError, match=f"text features of item '{ids[4]}' are not finite"):
        add_features(data, ["text"], text_encoder=encoder)
    cache = FeatureCache(encoder.identity)
    kept = [text for text in dict.fromkeys(texts) if content_key(text) in cache]
    assert kept and "cats dogs" not in kept


def test_features_that_are_not_finite_in_a_file(tmp_path: Path) -> None:
    """Someone's own file with a manifest in order: refused on loading, the item named."""
    from safetensors.torch import load_file, save_file

    from speeder.io.files import describe_files

    folder = tmp_path / "catalogue"
    ItemCatalogue(["a", "b"], features={"text": torch.ones(2, 3)}).save(folder)
    tensors = load_file(folder / "text.safetensors")
    tensors["features"] = tensors["features"].clone()
    tensors["features"][1, 2] = float("nan")
    save_file(tensors, folder / "text.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = describe_files(folder, list(manifest["files"]))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SpeederError, match=r"'text' must be finite, but those of item 'b'"):
        ItemCatalogue.load(folder)
