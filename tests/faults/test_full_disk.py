"""A full disk: one line that names the file, what was there stays whole, and with room again the work goes on."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from speeder.data import PreparedData
from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError
from speeder.evaluation.evaluate import evaluate
from speeder.evaluation.result import Evaluation
from speeder.io.disk_full import WriteError, writing
from speeder.model.modeling import SpeederForCausalLM
from speeder.prepare.encoders.cache import FeatureCache, content_key, encode_cached
from speeder.prepare.pipeline import prepare
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.load import load_recipe
from speeder.training.train import train
from speeder.training.trainer import SpeederTrainer
from tests.faults.disks import SmallDisk, small_disk
from tests.model.worlds import save_tiny_backbone, tiny_model

REASON = "(No space left on device|File too large|the disk takes no more)"
RECIPE = {
    "precision": "fp32",
    "batch_users": 8,
    "checkpoint_steps": 2,
    "log_steps": 1,
    "ema_decay": 0.5,
    "model": {"dropout": 0.1},
    "stages": [{"name": "text", "open": ["text"], "steps": 6}],
}


@pytest.fixture(params=["full", "limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(request.param, tmp_path) as disk:
        yield disk


def refused(disk: SmallDisk, work: Callable[[], object], path: Path, keep: int = 0) -> None:
    """The work fails for want of room, in one line that names a file."""
    disk.fill(keep)
    try:
        with pytest.raises(
            SpeederError, match=re.escape(str(path)) + f".* cannot be written: {REASON}"
        ) as caught:
            work()
    finally:
        disk.empty()
    assert "\n" not in str(caught.value) and ".partial" not in str(caught.value)
    left = [path for path in disk.folder.rglob("*") if path.name.endswith((".partial", ".writing"))]
    assert not left, "what is half written goes at once: there is no room for it"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_prepared_data(disk: SmallDisk) -> None:
    folder = disk.folder / "data"
    old, new = synthetic_world(num_users=20, history=6), synthetic_world(num_users=60, history=12, seed=2)
    PreparedData(old.catalogue, old.interactions, old.manifest).save(folder)
    before = files(folder)
    wide = new.catalogue.with_features("wide", torch.rand(len(new.catalogue), 2048))
    data = PreparedData(wide, new.interactions, new.manifest)
    refused(disk, lambda: data.save(folder), folder, keep=20_000)
    assert files(folder) == before
    data.save(folder)
    assert len(PreparedData.load(folder).interactions) == len(new.interactions)


def test_prepare_while_it_reads(disk: SmallDisk) -> None:
    """What does not fit into memory is sorted on the disk."""
    raw = disk.folder / "raw"
    raw.mkdir()
    rows = [f"u{user},i{user * 7 % 50 + item},{item}" for user in range(400) for item in range(6)]
    (raw / "interactions.csv").write_text("\n".join(["user,item,timestamp", *rows]))
    out = disk.folder / "out"
    refused(disk, lambda: prepare("plain", raw, out, modalities=()), out)
    assert not out.exists()
    assert len(prepare("plain", raw, out, modalities=()).interactions) == len(rows)


def test_encoded_features(disk: SmallDisk) -> None:
    """What was encoded before stays encoded."""
    width, asked = 64, []

    def encode() -> torch.Tensor:
        texts = [f"text {number}" for number in range(600)]

        def compute(places: list[int]) -> list[torch.Tensor]:
            asked.extend(places)
            if len(asked) == 304:  # after the first write, which is after 256
                disk.fill()
            return [torch.full((width,), float(place)) for place in places]

        cache = FeatureCache("toy", disk.folder / "cache")
        keys = [content_key(text) for text in texts]
        features, present = encode_cached(
            cache, keys, [0] * 600, compute, width=width, batch_size=16, description="toy", progress=False
        )
        assert present.all()
        return features

    try:
        with pytest.raises(WriteError, match=rf"cache/.*/.*\.safetensors cannot be written: {REASON}"):
            encode()
    finally:
        disk.empty()
    done = len(asked)
    assert done == 512
    features = encode()
    assert len(asked) == done + 600 - 256
    assert torch.equal(features[:, 0], torch.arange(600.0))


def test_a_matrix_of_features_that_has_no_room(disk: SmallDisk) -> None:
    cache = FeatureCache("toy", disk.folder)
    keys = [content_key("a")] * 3000
    cache.add({keys[0]: torch.ones(8)})

    def encode() -> torch.Tensor:
        return encode_cached(
            cache,
            keys,
            [0] * 3000,
            lambda places: [],
            width=8,
            batch_size=4,
            description="toy",
            progress=False,
        )[0]

    refused(disk, encode, cache.folder)
    assert torch.equal(encode(), torch.ones(3000, 8))


def test_an_evaluations_result(disk: SmallDisk) -> None:
    split = synthetic_world(num_users=600, history=6).split

    class Scorer:
        def score(self, histories: object) -> torch.Tensor:
            return torch.rand(len(histories), 200, generator=torch.Generator().manual_seed(0))

    path = disk.folder / "evaluation.json"
    found = evaluate(Scorer(), split, "test", resamples=10)
    found.save(path)
    before = path.read_bytes()
    refused(disk, lambda: found.save(path), path)
    assert path.read_bytes() == before
    assert np.array_equal(Evaluation.load(path).ranks["masked"], found.ranks["masked"])


@pytest.mark.exact
@pytest.mark.parametrize(
    "keep", [0, 60_000]
)  # room for nothing; for the configuration, but not for the weights
def test_a_saved_recommender(disk: SmallDisk, keep: int) -> None:
    folder = disk.folder / "model"
    old, new = tiny_model(), tiny_model(stir=False)
    old.save_pretrained(folder)
    before = files(folder)
    refused(disk, lambda: new.save_pretrained(folder), folder, keep)
    assert files(folder) == before
    new.save_pretrained(folder)
    loaded = SpeederForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.score([[1, 2]]), new.score([[1, 2]]))
    assert sorted(files(folder)) == sorted(before)


@pytest.mark.exact
def test_shards_of_an_earlier_save_do_not_stay(tmp_path: Path) -> None:
    """They would be read in place of the new weights."""
    old, new = tiny_model(), tiny_model(stir=False)
    old.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    new.save_pretrained(tmp_path)
    names = [path.name for path in tmp_path.glob("model*")]
    assert names == ["model.safetensors"]
    assert torch.equal(SpeederForCausalLM.from_pretrained(tmp_path).score([[1]]), new.score([[1]]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full-disk")
    world = synthetic_world(num_users=24, history=6)
    PreparedData(world.catalogue, world.interactions, world.manifest).save(folder / "data")
    recipe = RECIPE | {"backbone": str(save_tiny_backbone(folder / "backbone"))}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(load_recipe(folder / "recipe.yaml"), PreparedData.load(folder / "data"), folder / "whole")
    return folder


@pytest.mark.exact
@pytest.mark.parametrize("when", ["checkpoint", "model"])
def test_training(disk: SmallDisk, place: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full before the second checkpoint, or before the finished stage's model; resumed to the same last bit."""
    recipe, data, run = (
        load_recipe(place / "recipe.yaml"),
        PreparedData.load(place / "data"),
        disk.folder / "run",
    )

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4 and when == "checkpoint":
                disk.fill(keep=30_000)

        def on_train_end(self, args, state, control, **kwargs):
            if when == "model":
                disk.fill(keep=30_000)

    make = SpeederTrainer.__init__

    def make_filling(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.add_callback(Fill())

    with monkeypatch.context() as patch:
        patch.setattr(SpeederTrainer, "__init__", make_filling)
        name = "checkpoint-4" if when == "checkpoint" else "model"
        try:
            with pytest.raises(WriteError, match=rf"{name} cannot be written: {REASON}"):
                train(recipe, data, run)
        finally:
            disk.empty()
    left = sorted(path.parent.name for path in run.glob("stages/*/checkpoint-*/model.safetensors"))
    assert left and "checkpoint-4" not in left[: len(left) if when == "checkpoint" else 0]
    for path in run.rglob("*.safetensors"):
        load_file(path)
    train(recipe, data, run, resume=True)
    assert files(run / "model") == files(place / "whole" / "model")
    assert not list(run.rglob("*.partial"))


def test_other_errors_keep_their_kind(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes differ"), OSError(2, "No such file"), ValueError("no")):
        with pytest.raises(type(error)) as caught, writing(tmp_path):
            raise error
        assert not isinstance(caught.value, SpeederError)
    with pytest.raises(WriteError, match="inner"), writing(tmp_path), writing(tmp_path / "inner"):
        raise OSError(28, "No space left on device")


def test_a_catalogue_beside_others(disk: SmallDisk) -> None:
    """Added items, say: the catalogue with them does not fit, and the old one serves on."""
    folder = disk.folder / "catalogue"
    small = ItemCatalogue(["a", "b"], features={"text": torch.ones(2, 3)})
    small.save(folder)
    large = ItemCatalogue([f"i{n}" for n in range(3000)], features={"text": torch.rand(3000, 64)})
    refused(disk, lambda: large.save(folder), folder)
    assert ItemCatalogue.load(folder).ids == ["a", "b"]
    shutil.rmtree(folder)
