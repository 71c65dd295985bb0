"""`kill -9` at random moments: no file is corrupt, the work goes on, and its result is the same to the last bit.

Processes are real and are killed by time, at moments drawn from a seed (`SPEEDER_KILL_SEED`, printed on failure) within
what the work takes undisturbed on this machine. Every start begins where the kill before left off; work that comes to
its end is compared, and begun anew until all kills are spent.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from speeder.data import PreparedData
from speeder.evaluation.evaluate import evaluate
from speeder.model.modeling import SpeederForCausalLM
from speeder.prepare.encoders.cache import FeatureCache
from speeder.prepare.encoders.text import TextEncoder
from speeder.prepare.synthetic import synthetic_world
from speeder.training.checkpoints import COMPLETE
from speeder.training.run_folder import stage_logs
from tests.faults import jobs
from tests.faults.processes import killed, run, start
from tests.model.worlds import save_tiny_backbone
from tests.prepare.encoders.tiny import WORDS, save_bert

SEED = int(os.environ.get("SPEEDER_KILL_SEED", "8"))
RECIPE = {
    "precision": "bf16",
    "batch_users": 8,
    "checkpoint_steps": 2,
    "log_steps": 2,
    "ema_decay": 0.8,
    "model": {"item_embedding": True, "dropout": 0.1, "modality_dropout": 0.1, "position_proxy_weight": 0.05},
    "stages": [
        {"name": "text", "open": ["text"], "steps": 6},
        {"name": "+image", "open": ["text", "image"], "steps": 10, "ramp_steps": 4},
        {"name": "joint", "open": ["text", "image", "collaborative", "item"], "steps": 6},
    ],
}
pytestmark = pytest.mark.slow


def kill_often(
    kills: int,
    job: Callable[[Path, str], None],
    folder: Path,
    writes: Path,
    remove: Callable[[], None],
    look: Callable[[], None],
    same: Callable[[], None],
) -> None:
    """Starts a job again and again until it was killed so many times, then lets it come to its end.

    Args:
        job: of `jobs`, given `folder` and "killed"; before, it is run as "whole", which tells how long it takes.
        writes: where it writes as "whole".
        remove: what it wrote as "killed", for it to begin anew.
        look: after a kill, at every file that it left.
        same: whether what it made as "killed" is what it made as "whole".
    """
    assert run(jobs.nothing) == 0  # what the processes are forked from has imported everything by then
    began = time.time()
    assert run(job, folder, "whole") == 0, printed(folder)
    lasts = time.time() - began
    # half of all moments come after the first file, since much of so short a work is its beginning
    first = min(path.stat().st_mtime for path in writes.rglob("*") if path.is_file()) - began
    moments, spent, ends = random.Random(f"{SEED} {job.__name__}"), [], 0
    while len(spent) < kills:
        after = moments.uniform(moments.choice([0.0, first]), lasts)
        if killed(start(job, folder, "killed"), after):
            spent.append(round(after, 3))
            print(
                f"{job.__name__}: seed {SEED}, killed after {after:.3f} of {lasts:.3f} s (first file: {first:.3f} s)"
            )
            look()
        else:
            ends += 1
            same()
            remove()
            assert ends < 10 * kills, "it is never killed in time"
    assert run(job, folder, "killed") == 0, printed(folder)
    same()
    print(f"{job.__name__}: {len(spent)} kills, {ends} ends between them")


def printed(folder: Path) -> str:
    return (folder / "printed.txt").read_text()[-3000:]


def readable(folder: Path) -> int:
    """Reads every file that counts: not what is named as half-written, nor a checkpoint that is not marked."""
    count = 0
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        torn = any(part.endswith((".partial", ".writing", ".tmp", ".lock")) for part in parts)
        checkpoint = next(
            (
                folder / Path(*parts[: n + 1])
                for n, part in enumerate(parts)
                if part.startswith("checkpoint-")
            ),
            None,
        )
        if torn or (checkpoint is not None and not (checkpoint / COMPLETE).exists()):
            continue
        count += 1
        if path.suffix == ".safetensors":
            assert load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".pt", ".pth") and path.name != "rng_state.pth":
            assert torch.load(path, weights_only=True)
        else:
            count -= 1
    return count


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the jobs read."""
    folder = tmp_path_factory.mktemp("kills")
    world = synthetic_world(num_users=40, history=8)
    PreparedData(world.catalogue, world.interactions, world.manifest).save(folder / "data")
    recipe = RECIPE | {"backbone": str(save_tiny_backbone(folder / "backbone"))}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    torch.manual_seed(0)
    save_bert(folder / "bert")
    words, draw = WORDS[4:], random.Random(0)
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(1500)]
    (folder / "texts.txt").write_text("\n".join(texts))
    (folder / "raw").mkdir()
    items = [f"i{number},{text}" for number, text in enumerate(texts[:400])]
    rows = [f"u{user},i{draw.randrange(400)},{time}" for user in range(200) for time in range(8)]
    (folder / "raw" / "items.csv").write_text("\n".join(["item,title", *items]))
    (folder / "raw" / "interactions.csv").write_text("\n".join(["user,item,timestamp", *rows]))
    return folder


def test_training(place: Path) -> None:
    """Every weight, loss and gate; the metrics of the model follow, and are looked at once."""
    whole, broken = place / "whole", place / "killed"

    def look() -> None:
        readable(broken)
        print("  at", *sorted(str(path.relative_to(broken)) for path in broken.glob("stages/*/checkpoint-*")))
        if (broken / "state.json").exists():
            model = json.loads((broken / "state.json").read_text())["model"]
            assert SpeederForCausalLM.from_pretrained(broken / model).catalogue is not None

    def same() -> None:
        assert files(broken / "model") == files(whole / "model")
        for stage, log in stage_logs(whole).items():
            found = stage_logs(broken)[stage]
            for key in ("loss", "grad_norm", "eval_NDCG@10", "gate/text"):
                curves = [[(e["step"], e[key]) for e in entries if key in e] for entries in (log, found)]
                assert curves[0] == curves[1] and curves[0], f"{key} of {stage}"
        assert not list(broken.glob("stages/*/checkpoint-*")) and not list(broken.rglob("*.partial"))

    kill_often(9, jobs.train_run, place, whole, lambda: shutil.rmtree(broken), look, same)
    split = PreparedData.load(place / "data").split
    found = [
        evaluate(SpeederForCausalLM.from_pretrained(run / "model"), split, "test", resamples=20).metrics
        for run in (whole, broken)
    ]
    assert found[0] == found[1]


def test_preparation(place: Path) -> None:
    """Reading, encoding, fitting collaborative features, saving: the prepared files are the same bytes."""
    whole, broken = (place / name for name in ("prepared-whole", "prepared-killed"))

    def remove() -> None:
        for folder in (broken, place / "cache-killed"):
            shutil.rmtree(folder)

    def look() -> None:
        readable(place / "cache-killed")
        assert not broken.exists() or files(broken) == files(whole), "it is there whole, or not at all"

    def same() -> None:
        assert files(broken) == files(whole)
        PreparedData.load(broken)
        left = [path.name for path in place.iterdir() if "prepared-killed" in path.name and path != broken]
        assert left == [], "what kills left is cleared"

    kill_often(6, jobs.prepare_data, place, place / "cache-whole", remove, look, same)


def test_encoding(place: Path) -> None:
    whole, broken = (place / f"encoded-{name}" for name in ("whole", "killed"))

    def look() -> None:
        readable(broken)

    def same() -> None:
        """The features of every text; shards are the same files."""
        shards = [
            {
                name: content
                for name, content in files(run).items()
                if not name.endswith((".partial", ".writing"))
            }
            for run in (whole, broken)
        ]
        assert shards[0] == shards[1] and len(shards[0]) > 5

    kill_often(5, jobs.encode_texts, place, whole, lambda: shutil.rmtree(broken), look, same)
    texts = (place / "texts.txt").read_text().splitlines()
    encoder = TextEncoder(str(place / "bert"), batch_size=4)
    assert (
        FeatureCache(encoder.identity, broken)._places.keys()
        == FeatureCache(encoder.identity, whole)._places.keys()
    )
    first, second = (encoder.encode(texts, cache=run, progress=False) for run in (whole, broken))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
