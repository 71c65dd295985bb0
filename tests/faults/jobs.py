"""What processes are killed at: training, preparing, encoding; each small, and the same every time."""

import os
import sys
import threading
from pathlib import Path

import torch
from tqdm import tqdm

from speeder.data import PreparedData
from speeder.errors import SpeederError
from speeder.prepare.encoders.text import TextEncoder
from speeder.prepare.pipeline import prepare
from speeder.recipes.load import load_recipe
from speeder.training.train import train
from speeder.training.trainer import SpeederTrainer


def begin(log: Path) -> None:
    """One thread, and what is printed goes into a file."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # else a semaphore that outlives a killed process
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)


def nothing() -> None:
    """Is done at once."""


def train_run(folder: Path, name: str) -> None:
    """Trains FOLDER's recipe into FOLDER/name, or goes on with what is there."""
    begin(folder / "printed.txt")
    run = folder / name
    data, recipe = PreparedData.load(folder / "data"), load_recipe(folder / "recipe.yaml")
    train(recipe, data, run, resume=(run / "recipe.json").exists())


def prepare_data(folder: Path, name: str) -> None:
    """Prepares FOLDER/raw into FOLDER/prepared-name, texts by FOLDER/bert, encoded ones in FOLDER/cache-name."""
    begin(folder / "printed.txt")
    os.environ["SPEEDER_CACHE"] = str(folder / f"cache-{name}")
    encoder = TextEncoder(str(folder / "bert"), batch_size=4)
    prepare("plain", folder / "raw", folder / f"prepared-{name}", text_encoder=encoder)


def encode_texts(folder: Path, name: str) -> None:
    """Encodes FOLDER/texts.txt, a line each, by FOLDER/bert into the cache FOLDER/encoded-name."""
    begin(folder / "printed.txt")
    texts = (folder / "texts.txt").read_text().splitlines()
    TextEncoder(str(folder / "bert"), batch_size=4).encode(
        texts, cache=folder / f"encoded-{name}", progress=False
    )


def spoil(steps: dict[int, str], per_step: int = 1, rank: int = 0) -> None:
    """Makes losses or gradients NaN.

    Args:
        steps: number of a batch, counted from 1 over all -> "loss" or "gradient".
        rank: of the process that does so; the others compute as ever.
    """
    compute, calls = SpeederTrainer.compute_loss, 0

    def spoiled(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        nonlocal calls
        calls += 1
        loss = compute(self, model, inputs, False, num_items_in_batch)
        how = steps.get(calls) if self.args.process_index == rank else None
        weight = next(weight for weight in model.parameters() if weight.requires_grad)
        if how == "loss":
            loss = loss * float("nan")
        elif how == "gradient":  # the root of 0 is 0, its slope infinite, and 0 times that is NaN
            loss = loss + (weight * 0).sum().sqrt()
        return loss

    SpeederTrainer.compute_loss = spoiled


def train_spoiled(folder: Path, name: str, steps: dict[int, str], rank: int, ranks: int, port: int) -> None:
    """`train_run` as one of several processes, of which the last has bad batches; exit status 3 for a clear error."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    spoil(steps, rank=ranks - 1)
    try:
        train_run(folder, name)
    except SpeederError as error:
        (folder / f"error-{name}-{rank}.txt").write_text(str(error))
        sys.stdout.flush()
        os._exit(3)
