"""Models from strangers: no code of theirs runs, whatever the folder holds; archives unpack in their place alone."""

import json
import pickle
import shutil
import stat
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from speeder.baselines.auto import load_recommender
from speeder.cli.main import main
from speeder.data import PreparedData
from speeder.errors import SpeederError
from speeder.io.assets import unpack
from speeder.model.loading import load_backbone, load_tokenizer
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.processor import SpeederProcessor
from speeder.prepare.encoders.image import ImageEncoder
from speeder.prepare.encoders.text import TextEncoder
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.load import recipe_from_dict
from speeder.training.callbacks import CheckpointMarker
from speeder.training.train import train
from tests.model.worlds import save_tiny_backbone, tiny_model
from tests.prepare.encoders.tiny import save_bert, save_clip

AUTO = {
    name: f"evil.Evil{name.removeprefix('Auto')}"
    for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoImageProcessor")
}
MAKES = [
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
]


class Trap:
    """A folder is spoilt with it; `sprung` tells whether anything of it ran."""

    def __init__(self, folder: Path):
        self.marker = folder / "ran"

    def __reduce__(self) -> tuple:
        return open, (str(self.marker), "w")

    def pickle_into(self, path: Path, torch_format: bool) -> None:
        """A file that runs code when it is unpickled."""
        if torch_format:
            torch.save({"weight": self}, path)
        else:
            path.write_bytes(pickle.dumps(self))

    def spoil(self, folder: Path) -> None:
        """Everything that has ever led a library to run a model folder's code."""
        classes = [name.partition(".")[2] for name in AUTO.values()] + ["EvilTokenizer"]
        source = f"open({str(self.marker)!r}, 'w').close()\n" + "".join(f"class {c}: pass\n" for c in classes)
        (folder / "custom_generate").mkdir()
        for name in ("evil.py", "modeling_speeder.py", "__init__.py", "custom_generate/generate.py"):
            (folder / name).write_text(source)
        for name in filter(lambda name: (folder / name).exists(), MAKES):
            content = json.loads((folder / name).read_text())
            content["auto_map"] = AUTO | {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
            content["trust_remote_code"] = True
            if "text_config" in content:
                content["text_config"] |= {"auto_map": AUTO, "trust_remote_code": True}
            if name == "tokenizer_config.json":
                content["tokenizer_class"] = "EvilTokenizer"
            (folder / name).write_text(json.dumps(content))
        self.pickle_into(folder / "pytorch_model.bin", torch_format=True)
        for name in (
            "adapter_model.bin",
            "training_args.bin",
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
        ):
            self.pickle_into(folder / name, torch_format=False)

    @property
    def sprung(self) -> bool:
        return self.marker.exists()


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trap:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks whether code may run"))
    return Trap(tmp_path)


def test_the_trap_works(trap: Trap, tmp_path: Path) -> None:
    trap.pickle_into(tmp_path / "x.bin", torch_format=True)
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert trap.sprung


@pytest.mark.exact
def test_a_recommender(trap: Trap, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "model"
    model = tiny_model()
    save_tiny_backbone(folder)  # for its tokenizer
    SpeederProcessor(load_tokenizer(folder), model.config, model.catalogue).save_pretrained(folder)
    model.save_pretrained(folder)
    trap.spoil(folder)
    expected = model.score([[1, 2]])
    for load in (
        SpeederForCausalLM.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        load_recommender,
        lambda folder: SpeederForCausalLM.from_pretrained(folder, trust_remote_code=True),
    ):
        assert torch.equal(load(folder).score([[1, 2]]), expected)
    for load in (SpeederProcessor.from_pretrained, AutoProcessor.from_pretrained, load_tokenizer):
        try:  # a tokenizer of a class that nobody has may be read as a plain one, or refused
            load(folder)
        except SpeederError as error:
            assert "EvilTokenizer" in str(error) or "custom code" in str(error)
    assert main(["recommend", str(folder), "--history", "id1", "-k", "2"]) == 0
    assert not trap.sprung
    (folder / "model.safetensors").unlink()
    for load in (SpeederForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained, load_recommender):
        with pytest.raises(
            SpeederError, match=r"model\.safetensors is missing \(pickled weights are not read\)"
        ):
            load(folder)
    assert main(["recommend", str(folder), "--history", "id1"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert not trap.sprung


def test_a_recommender_of_an_unknown_kind(trap: Trap, tmp_path: Path) -> None:
    """A `model_type` that only the folder's own code knows, in place of Speeder's or of its backbone's."""
    tiny_model().save_pretrained(tmp_path / "model")
    trap.spoil(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    for wrong in (
        config | {"model_type": "evil"},
        config | {"text_config": config["text_config"] | {"model_type": "evil"}},
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises((SpeederError, ValueError, KeyError), match="evil"):
            SpeederForCausalLM.from_pretrained(tmp_path / "model")
        assert main(["recommend", str(tmp_path / "model"), "--history", "id1"]) == 1
    assert not trap.sprung


def test_a_backbone_and_encoders(trap: Trap, tmp_path: Path) -> None:
    save_tiny_backbone(tmp_path / "backbone")
    save_bert(tmp_path / "bert")
    save_clip(tmp_path / "clip")
    for name in ("backbone", "bert", "clip"):
        trap.spoil(tmp_path / name)
    jobs = [
        lambda: load_backbone(tmp_path / "backbone"),
        lambda: load_tokenizer(tmp_path / "backbone"),
        lambda: TextEncoder(str(tmp_path / "bert")),
        lambda: TextEncoder(f"backbone:{tmp_path / 'backbone'}"),
        lambda: ImageEncoder(str(tmp_path / "clip")),
    ]
    for job in jobs:
        try:
            job()
        except SpeederError as error:
            assert "\n" not in str(error)
    for path in tmp_path.glob("*/model.safetensors"):
        path.unlink()
    for job in (jobs[0], *jobs[2:]):
        with pytest.raises(SpeederError):
            job()
    assert not trap.sprung


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
@pytest.mark.parametrize("how", ["pickle", "missing", "cut"])
def test_a_checkpoint(
    trap: Trap, tmp_path: Path, file: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming runs no pickle, and takes no lost optimizer for a new one, as the `Trainer` by itself would."""
    world = synthetic_world(num_users=20, history=6)
    data = PreparedData(world.catalogue, world.interactions, world.manifest)
    recipe = recipe_from_dict(
        {
            "backbone": str(save_tiny_backbone(tmp_path / "backbone")),
            "precision": "fp32",
            "checkpoint_steps": 2,
            "stages": [{"name": "text", "open": ["text"], "steps": 4}],
        }
    )

    class Stop(Exception):
        pass

    mark = CheckpointMarker.on_save

    def mark_and_stop(self, *arguments, **kwargs):
        mark(self, *arguments, **kwargs)
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(CheckpointMarker, "on_save", mark_and_stop)
        train(recipe, data, tmp_path / "run")
    path = tmp_path / "run" / "stages" / "01-text" / "checkpoint-2" / file
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        trap.pickle_into(path, torch_format=file != "rng_state.pth")
        sizes = path.with_name("COMPLETE")
        sizes.write_text(json.dumps(json.loads(sizes.read_text()) | {file: path.stat().st_size}))
    with pytest.raises(SpeederError, match="checkpoint-2") as caught:
        train(recipe, data, tmp_path / "run", resume=True)
    assert not trap.sprung
    assert (file in str(caught.value) or how == "pickle") and "remove this checkpoint's folder" in str(
        caught.value
    )
    if file == "optimizer.pt":  # what the message says helps
        shutil.rmtree(path.parent)
        train(recipe, data, tmp_path / "run", resume=True)


def test_recipes_and_studies_are_plain_yaml(
    trap: Trap, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"stages: !!python/object/apply:builtins.open ['{trap.marker}', 'w']")
    for command in (
        ["train", "--recipe", str(path)],
        ["ablate", str(path)],
    ):
        world = synthetic_world(num_users=20, history=6)
        PreparedData(world.catalogue, world.interactions, world.manifest).save(tmp_path / "data")
        assert main([*command, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 1
        assert "not valid YAML" in capsys.readouterr().err
    assert not trap.sprung


def test_archives_with_members_that_lead_out(tmp_path: Path) -> None:
    """Members are taken by name to names of our own: what else an archive holds, and how it is called, is nothing."""
    archive, place = tmp_path / "a.zip", tmp_path / "deep" / "place"
    with zipfile.ZipFile(archive, "w") as source:
        for name in (
            "../up.txt",
            "../../up.txt",
            str(tmp_path / "absolute.txt"),
            "wanted/data.txt",
            "..\\up.txt",
        ):
            source.writestr(name, "content")
        link = zipfile.ZipInfo("wanted/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        source.writestr(link, "../..")
        source.writestr("wanted/link/through.txt", "content")
    unpack(
        archive,
        {"wanted/data.txt": "data.txt", "../up.txt": "inside.txt", "wanted/link/through.txt": "x"},
        place,
    )
    assert sorted(path.name for path in place.iterdir()) == ["data.txt", "inside.txt", "x"]
    assert not any(path.is_symlink() for path in place.iterdir())
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "a.zip",
        "data.txt",
        "inside.txt",
        "x",
    ]
