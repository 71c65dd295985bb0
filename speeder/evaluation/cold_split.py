"""Cold items: some of a prepared set's items are held out, as if they did not exist during training.

The rest is an ordinary prepared set, with a catalogue without them: training, features fitted on interactions, and leak
checks have no access to a cold item. Beside it are the cold items, with features of their texts and pictures only, and
the users who interacted with one of them after their training part.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from speeder.data.catalogue import ItemCatalogue
from speeder.data.fingerprints import FITTED_ON_NOTHING, features_hash
from speeder.data.interactions import Interactions
from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.evaluation.candidates import draw_items
from speeder.evaluation.leaks import check_features, check_split
from speeder.io.files import (
    atomic_folder,
    check_files,
    check_owned,
    describe_files,
    read_json,
    recover_folder,
    write_json,
)

FORMAT = "speeder-cold-items-1"
WARM, COLD = "warm", "cold"  # the two parts of the folder
_STREAM = "cold items"
_FILES = ["targets.parquet", "catalogue/manifest.json"]


@dataclass
class ColdItems:
    """Held-out items, and the users who have one of them as a target.

    Attributes:
        catalogue: the `C` items, without features that were fitted on interactions.
        users: `(n,)` int64, users of the warm interactions.
        lengths: `(n,)` int64; a user's history is this many of the user's oldest warm interactions.
        targets: `(n,)` int64 indices into `catalogue`.
        record: share, seed and hashes, for the manifest.
    """

    catalogue: ItemCatalogue
    users: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    record: dict = field(default_factory=dict)

    def histories(self, warm: PreparedData) -> list[np.ndarray]:
        """Each user's history before the target: indices of warm items, oldest first."""
        sequences = warm.interactions.sequences()
        pairs = zip(self.users, self.lengths, strict=True)
        return [sequences[user][:length] for user, length in pairs]

    def hash(self, warm: PreparedData) -> str:
        """SHA-256 over the task: the warm split, the cold items' ids, users, histories and targets."""
        digest = hashlib.sha256(warm.split.hash().encode())
        digest.update("\0".join(self.catalogue.ids).encode())
        for part in (self.users, self.lengths, self.targets):
            digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
        return digest.hexdigest()

    def save(self, folder: Path, warm: PreparedData) -> None:
        """Writes `warm/` and `cold/` into a folder, both or neither; an earlier hold-out there is replaced."""
        with atomic_folder(folder, check_replaceable(folder)) as temporary:
            warm.save(temporary / WARM)
            cold = temporary / COLD
            self.catalogue.save(cold / "catalogue")
            columns = {
                "user_id": [warm.interactions.user_ids[user] for user in self.users],
                "history_length": self.lengths,
                "target": [self.catalogue.ids[target] for target in self.targets],
            }
            pq.write_table(pa.table(columns), cold / "targets.parquet")
            content = {**self.record, "hash": self.hash(warm)}
            files = describe_files(cold, _FILES)
            write_json(cold / "manifest.json", {"format": FORMAT, "content": content, "files": files})

    @classmethod
    def beside(cls, data_folder: str | Path, warm: PreparedData) -> "ColdItems":
        """Load the cold items beside a warm prepared set.

        Raises:
            SpeederError: there are none, they are damaged, or belong to another warm set.
        """
        folder = Path(data_folder).resolve().parent / COLD
        if not (folder / "manifest.json").is_file():
            raise SpeederError(
                f"{data_folder}: expected data with held-out items, found none; make them with "
                "`speeder items hold-out`, and train on the warm part"
            )
        manifest = read_json(folder / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise SpeederError(f"{folder} holds {manifest.get('format')!r}, and {FORMAT!r} was expected")
        check_files(folder, manifest.get("files"), verify=True)
        catalogue = ItemCatalogue.load(folder / "catalogue")
        record = dict(manifest.get("content", {}))
        expected = record.pop("hash", None)
        try:
            columns = pq.read_table(folder / "targets.parquet").to_pydict()
            place = {name: user for user, name in enumerate(warm.interactions.user_ids)}
            users = np.array([place[name] for name in columns["user_id"]], dtype=np.int64)
            targets = np.array(catalogue.indices_of(columns["target"]), dtype=np.int64)
            cold = cls(catalogue, users, np.array(columns["history_length"], dtype=np.int64), targets, record)
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise SpeederError(f"{folder} does not fit {data_folder}: {error}") from error
        if cold.hash(warm) != expected:
            raise SpeederError(f"{folder}: was held out from other data than {data_folder} holds")
        return cold


def check_replaceable(folder: str | Path) -> set[str]:
    """The entries that `ColdItems.save` may replace; the folder need not exist.

    Raises `SpeederError` if it has anything but an earlier hold-out. Called before the work, so that it fails early.
    """
    folder = recover_folder(folder)
    manifest = folder / COLD / "manifest.json"
    known = manifest.is_file() and read_json(manifest).get("format") == FORMAT
    owned = {WARM, COLD} if known else set()
    check_owned(folder, owned)
    return owned


def hold_out(data: PreparedData, share: float = 0.1, seed: int = 0) -> tuple[PreparedData, ColdItems]:
    """Holds out a share of the items, drawn uniformly among those that have interactions and content features.

    A user's target is the newest cold item after the user's whole (warm) training part, and the history is all warm
    items before it. So no model is trained on anything of the user's that is later; in a temporal split, on nothing
    later of anybody. Earlier cold items are in no history, as if new items
    had just been added.

    Args:
        data: a prepared set with records of its features.
        share: share of the items, between 0 and 1.
        seed: of the draw.

    Returns:
        the warm set, without features that were fitted on interactions (fit them again with `add_features`), and the
        cold items.

    Raises:
        SpeederError: no item would be held out, or none left; no item has content features; or no user has a target.
        LeakError: the data's features are not those of their records.
    """
    if not 0.0 < share < 1.0:
        raise SpeederError(f"share: expected a number between 0 and 1, got {share}")
    check_features(data)
    catalogue, taken = data.catalogue, data.interactions
    encoders = data.manifest.get("encoders", {})
    content = [name for name in catalogue.features if encoders[name].get("fitted_on") == FITTED_ON_NOTHING]
    eligible = torch.zeros(len(catalogue), dtype=torch.bool)
    for name in content:
        eligible |= catalogue.present[name]
    eligible = eligible.numpy() & (np.bincount(taken.item, minlength=len(catalogue)) > 0)
    count = round(share * int(eligible.sum()))
    if not 0 < count < len(catalogue):
        raise SpeederError(
            f"share: expected to hold out at least one item and to leave one, got {count} of the "
            f"{int(eligible.sum())} items with interactions and content features ({share})"
        )
    drawn = draw_items(seed, _STREAM, 0, count, len(catalogue), np.flatnonzero(~eligible).tolist())
    is_cold = np.zeros(len(catalogue), dtype=bool)
    is_cold[drawn] = True
    record = {"share": share, "seed": seed, "items": count, "source_split": data.split.hash()}
    warm = _part(data, ~is_cold, content, record)
    users, lengths, targets = _targets(data, warm, is_cold)
    cold_catalogue = _with_features(catalogue, content).select(np.flatnonzero(is_cold))
    if not len(users):
        raise SpeederError("no user has a cold item after the training part; hold out more items")
    return warm, ColdItems(cold_catalogue, users, lengths, targets, record)


def _with_features(catalogue: ItemCatalogue, names: list[str]) -> ItemCatalogue:
    """The catalogue with only these modalities."""
    features = {name: catalogue.features[name] for name in names}
    present = {name: catalogue.present[name] for name in names}
    return ItemCatalogue(
        catalogue.ids, catalogue.titles, catalogue.texts, catalogue.images, features, present
    ).with_columns(catalogue.columns)


def _part(data: PreparedData, is_warm: np.ndarray, content: list[str], record: dict) -> PreparedData:
    """The prepared set of only the warm items."""
    catalogue = _with_features(data.catalogue, content).select(np.flatnonzero(is_warm))
    place, taken = np.cumsum(is_warm) - 1, data.interactions
    kept = is_warm[taken.item]
    interactions = Interactions(taken.user[kept], place[taken.item[kept]], taken.time[kept], taken.user_ids)
    encoders = {
        name: data.manifest["encoders"][name]
        | {"features_hash": features_hash(catalogue.features[name], catalogue.present[name])}
        for name in content
    }
    warm = PreparedData(
        catalogue, interactions, {**data.manifest, "encoders": encoders, "held_out_items": record}
    )
    check_split(warm.split, interactions)
    return warm


def _targets(
    data: PreparedData, warm: PreparedData, is_cold: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users, lengths of their warm histories, and their targets as indices among the cold items."""
    place = np.cumsum(is_cold) - 1
    rows = []
    columns = zip(
        data.interactions.sequences(), data.interactions.times(), warm.split.training(), strict=True
    )
    for user, (sequence, times, training) in enumerate(columns):
        cold = is_cold[sequence] & warm.split.may_be_targets(times)
        before = np.cumsum(~is_cold[sequence])  # warm items up to each place
        late = np.flatnonzero(cold & (before >= max(len(training), 1)))
        if len(late):
            rows.append((user, before[late[-1]], place[sequence[late[-1]]]))
    return tuple(np.array(rows, dtype=np.int64).reshape(-1, 3).T)
