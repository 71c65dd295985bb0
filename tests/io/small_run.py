"""A run folder whose models have learned nothing, over users enough for several parts."""

import functools
from pathlib import Path

import numpy as np
import torch

from speeder.baselines.bsarec.model import BSARec
from speeder.baselines.sasrec.model import SASRec
from speeder.data.fingerprints import training_hash
from speeder.data.prepared import PreparedData
from speeder.io.files import write_json
from speeder.model.modeling import SpeederForCausalLM
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.bsarec import BSARecConfig
from speeder.recipes.sasrec import SASRecConfig
from speeder.studies.evaluate_in_parts import RunAsked
from speeder.studies.evaluate_run import baselines, evaluate_run, measure_for
from tests.model.worlds import tiny_backbone

USERS = 560  # three parts of 256


def save_world(folder: Path) -> PreparedData:
    """Prepared data in `folder/data`."""
    world = synthetic_world(num_users=USERS, history=5)
    world.save(folder / "data")
    return PreparedData.load(folder / "data")


def save_run(folder: Path, data: PreparedData, data_folder: Path) -> SpeederForCausalLM:
    """A run with a recommender, a SASRec and a BSARec of random weights."""
    hashed = training_hash(data.split.training())
    model = SpeederForCausalLM.from_backbone(tiny_backbone(), data.catalogue).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    model.config.training_hash = hashed
    model.save_pretrained(folder / "model")
    for kind, config in ((SASRec, SASRecConfig), (BSARec, BSARecConfig)):
        baseline = kind(len(data.catalogue), config(hidden_size=8, heads=1, layers=1))
        baseline.training_hash = hashed
        baseline.save(folder / "baselines" / kind.name)
    write_json(folder / "recipe.json", {"data": str(data_folder), "split": data.split.hash()})
    return model


def asked(run: Path, data_folder: Path, runner, cold: bool = False) -> RunAsked:
    """Who asks a run's models in parts."""
    return RunAsked(run, run / "model", data_folder, runner, cold, part_users=256)


def evaluated(
    run: Path, model: object, data: PreparedData, protocol: str, *, with_baselines: bool = True, **who
) -> dict[str, str]:
    """The files of the run's evaluations by a protocol."""
    measure = measure_for(run, data, "test", protocol, **who)
    evaluate_run(run, model, measure)
    if with_baselines:
        baselines(run, measure, with_bsarec=True)
    return {file.name: file.read_text() for file in sorted((run / "evaluations" / measure.folder).iterdir())}


class Writer:
    """Writes the title of the candidate that the history's length names, and sometimes something else."""

    def __init__(self, titles: list[str]):
        self.titles = titles

    def generate_titles(self, histories: list[np.ndarray], candidates: np.ndarray) -> list[str]:
        """See `TitleGenerator`."""
        places = [
            sum(map(int, history)) % len(row) for history, row in zip(histories, candidates, strict=True)
        ]
        chosen = [self.titles[row[place]] for place, row in zip(places, candidates, strict=True)]
        return [title if place % 3 else "no such title" for title, place in zip(chosen, places, strict=True)]


def load_writer(titles: list[str]) -> functools.partial:
    """What gives the writer in another process."""
    return functools.partial(Writer, titles)
