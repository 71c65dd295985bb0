"""Evaluation in parts, by models that workers load: the `UserMap` of `speeder evaluate --ray`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa

from speeder.baselines.auto import load_recommender
from speeder.baselines.neighbours import Neighbours
from speeder.baselines.popularity import Popularity
from speeder.baselines.sequential.base import SequentialModel
from speeder.data.prepared import PreparedData
from speeder.evaluation.cold_ranking import with_cold_items
from speeder.evaluation.cold_split import ColdItems
from speeder.evaluation.users import Columns, Rank, UserMap, Users
from speeder.io.files import sha256_file
from speeder.io.parts import Runner, Work, computed, folder_identity
from speeder.model.title_writer import TitleWriter
from speeder.prepare.new_items import without_added
from speeder.studies.cold_start import baselines_for

PART_USERS = 1024  # what a killed worker or driver costs at most


@dataclass(frozen=True)
class AskedInParts:
    """The `UserMap` that shares users among a runner's workers, each of which loads the model once.

    Batches are the same as in this process, so ranks are the same too (but see docs/ray.md).

    Attributes:
        load: loads the model, in any process.
        folder: folder of the parts; after a stop, the same call computes only the missing ones.
        identity: JSON that identifies the model.
        runner: such as an `OnRay`.
        part_users: approximate users per part, in whole batches.
    """

    load: Callable[[], object]
    folder: Path
    identity: dict
    runner: Runner
    part_users: int = PART_USERS

    def __call__(self, rank: Rank, model: object, users: Users, batch_size: int, description: str) -> Columns:
        """See `UserMap`; `model` itself is not sent to workers.

        Raises:
            SpeederError: see `computed`.
        """
        size = max(1, self.part_users // batch_size) * batch_size
        identity = {
            "evaluate": {"model": self.identity, "rank": getattr(rank, "func", rank).__name__},
            "users": users_hash(users),
            "sizes": [batch_size, size],
            "version": version("speeder"),
        }
        make = partial(_asked, self.load, rank, batch_size)
        tables = map(users_table, users.parts(size))
        with computed(self.folder, identity, tables, make, self.runner, description) as outputs:
            table = pa.concat_tables(outputs)
        return {name: table[name].to_numpy() for name in table.column_names}


@dataclass(frozen=True)
class RunAsked:
    """Gives the `UserMap` of each model of a run: workers load it from its folder.

    Attributes:
        run: the run's folder.
        model_folder: the folder of the run's model.
        data_folder: the folder of the prepared data.
        runner: such as an `OnRay`.
        cold: whether cold items are ranked.
        part_users: as in `AskedInParts`.
    """

    run: Path
    model_folder: Path
    data_folder: Path
    runner: Runner
    cold: bool = False
    part_users: int = PART_USERS

    def __call__(self, file: Path, model: object) -> UserMap:
        """The map of a model whose evaluation is written to `file`; unfinished parts are kept beside it."""
        data, folder = self.data_folder.resolve(), self.model_folder.resolve()
        if self.cold and not hasattr(model, "add_items"):
            load = partial(load_cold_baseline, data, type(model).__name__)
        elif self.cold:
            load = partial(load_cold, folder, data)
        elif isinstance(model, Popularity):
            load = partial(load_popularity, data)
        elif (
            isinstance(model, SequentialModel | Neighbours) and file.stem != "model"
        ):  # a baseline, not the run's own model
            folder = (self.run / "baselines" / type(model).__name__.lower()).resolve()
            load = partial(load_recommender, folder)
        else:
            load = partial(load_model, folder, data, isinstance(model, TitleWriter))
        identity = {
            "data": sha256_file(data / "manifest.json"),
            "cold": self.cold,
            "kind": type(model).__name__,
        }
        if folder in load.args:
            identity["model"] = folder_identity(folder)
        parts = file.with_name(f".{file.name}.parts")
        return AskedInParts(load, parts, identity, self.runner, self.part_users)


def users_table(users: Users) -> pa.Table:
    """One row per user: `history`, `target`, and `listed` if there are candidates."""
    lists = pa.list_(pa.int64())
    columns = {"history": pa.array(list(users.histories), lists), "target": pa.array(users.targets)}
    if users.listed is not None:
        columns["listed"] = pa.array(list(users.listed), lists)
    return pa.table(columns)


def table_users(table: pa.Table) -> Users:
    """The users of a table of `users_table`."""
    listed = None
    if "listed" in table.column_names:
        listed = np.stack([row.values.to_numpy() for row in table["listed"]])
    targets = table["target"].to_numpy().copy()  # torch wants to be able to write
    return Users([row.values.to_numpy().copy() for row in table["history"]], targets, listed)


def users_hash(users: Users) -> str:
    """SHA-256 over all of them, in order."""
    digest = hashlib.sha256()
    for history in users.histories:
        digest.update(np.int64(len(history)).tobytes())
        digest.update(np.ascontiguousarray(history, dtype="<i8"))
    for rows in (users.targets, users.listed):
        digest.update(b"-" if rows is None else np.ascontiguousarray(rows, dtype="<i8"))
    return digest.hexdigest()


def _asked(load: Callable[[], object], rank: Rank, batch_size: int) -> Work:
    model = load()

    def ask(table: pa.Table) -> pa.Table:
        made = [rank(model, batch) for batch in table_users(table).parts(batch_size)]
        columns = {name: np.concatenate([batch[name] for batch in made]) for name in made[0]}
        return pa.table({name: column.astype(np.int64) for name, column in columns.items()})

    return ask


# Functions that workers call to load a model. Arguments are folders, which every machine of a cluster sees.


def load_model(model_folder: Path, data_folder: Path, titles: bool = False) -> object:
    """A run's model over the data's own items, or its title writer."""
    model = load_recommender(model_folder)
    without_added(model, PreparedData.load(data_folder).catalogue)
    return TitleWriter.of_run(model_folder.parent, model) if titles else model


def load_popularity(data_folder: Path) -> object:
    """Popularity of the training part."""
    data = PreparedData.load(data_folder)
    return Popularity(data.split.training(), len(data.catalogue))


def load_cold(model_folder: Path, data_folder: Path) -> object:
    """A run's model with the held-out items added."""
    data = PreparedData.load(data_folder)
    return with_cold_items(load_model(model_folder, data_folder), ColdItems.beside(data_folder, data), data)


def load_cold_baseline(data_folder: Path, kind: str) -> object:
    """A baseline, by the name of its class, that ranks the held-out items too."""
    data = PreparedData.load(data_folder)
    rows = baselines_for(ColdItems.beside(data_folder, data), data).values()
    return next(model for model in rows if type(model).__name__ == kind)
