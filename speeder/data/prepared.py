"""A prepared data set: a catalogue, its interactions, and a manifest of their sources."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from speeder.data.catalogue import ItemCatalogue
from speeder.data.fingerprints import FITTED_ON_NOTHING, features_hash
from speeder.data.interactions import Interactions, Split
from speeder.data.temporal_split import recorded_split
from speeder.errors import SpeederError
from speeder.io.files import (
    atomic_folder,
    check_files,
    check_owned,
    describe_files,
    read_json,
    recover_folder,
    write_json,
)

FORMAT = "speeder-prepared-1"
_FILES = ["interactions.parquet", "catalogue/manifest.json"]
_ENTRIES = {"interactions.parquet", "catalogue", "manifest.json"}


@dataclass(frozen=True)
class PreparedData:
    """What `speeder prepare` writes and `speeder train` reads.

    `manifest` is any JSON object: source hashes, counts of kept and dropped lines with reasons, the rules of split and
    ties, which `split` follows. Raises `ValueError` if an interaction has an item that the catalogue lacks.
    """

    catalogue: ItemCatalogue
    interactions: Interactions
    manifest: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.interactions) and self.interactions.item.max() >= len(self.catalogue):
            raise ValueError(
                f"interactions name item {self.interactions.item.max()}, but the catalogue has"
                f" {len(self.catalogue)} items"
            )

    @cached_property
    def split(self) -> Split:
        """The split of the interactions that the manifest records; leave one out by default."""
        return recorded_split(self.interactions, self.manifest)

    def with_features(
        self,
        name: str,
        features: torch.Tensor,
        present: torch.Tensor | None = None,
        *,
        made_by: str,
        training_hash: str | None,
    ) -> "PreparedData":
        """The data with one modality added or replaced, and its record, which training requires.

        Args:
            name, features, present: as in `ItemCatalogue.with_features`.
            made_by: what made the features, for the record.
            training_hash: hash of the interactions that they were fitted on (`fingerprints.training_hash`). It must be
                that of the split's training part. None declares that they were made without any interactions.
        """
        catalogue = self.catalogue.with_features(name, features, present)
        record: dict = {"name": made_by}
        record["features_hash"] = features_hash(catalogue.features[name], catalogue.present[name])
        if training_hash is None:
            record["fitted_on"] = FITTED_ON_NOTHING
        else:
            record["training_hash"] = training_hash
        encoders = {**self.manifest.get("encoders", {}), name: record}
        return PreparedData(catalogue, self.interactions, {**self.manifest, "encoders": encoders})

    def save(self, folder: str | Path) -> None:
        """Writes `interactions.parquet`, `catalogue/` and `manifest.json`, whole or not at all.

        An earlier prepared set there is replaced. Raises `SpeederError` if the folder has anything else.
        """
        with atomic_folder(folder, check_replaceable(folder)) as temporary:
            self.interactions.save(temporary / "interactions.parquet")
            self.catalogue.save(temporary / "catalogue")
            content = {"format": FORMAT, "content": self.manifest, "files": describe_files(temporary, _FILES)}
            write_json(temporary / "manifest.json", content)

    @classmethod
    def load(cls, folder: str | Path, *, verify: bool = True) -> "PreparedData":
        """Reads what `save` wrote, features memory-mapped; raises `SpeederError` if anything is wrong."""
        folder = recover_folder(folder)
        if not _is_prepared(folder):
            raise SpeederError(f"{folder} does not hold a prepared data set ({FORMAT})")
        manifest = read_json(folder / "manifest.json")
        check_files(folder, manifest.get("files"), verify=verify)
        catalogue = ItemCatalogue.load(folder / "catalogue", verify=verify)
        interactions = Interactions.load(folder / "interactions.parquet")
        try:
            return cls(catalogue, interactions, manifest.get("content", {}))
        except ValueError as error:
            raise SpeederError(f"{folder} does not fit together: {error}") from error


def saved_split(folder: str | Path) -> str | None:
    """The hash of the split of the data in a folder; None if it has no readable ones."""
    folder = recover_folder(folder)
    try:
        if not _is_prepared(folder):
            return None
        manifest = read_json(folder / "manifest.json").get("content", {})
        return recorded_split(Interactions.load(folder / _FILES[0]), manifest).hash()
    except SpeederError:  # damaged: no run can be evaluated with them anyway
        return None


def check_replaceable(folder: str | Path) -> set[str]:
    """The entries of a folder that `PreparedData.save` may replace; it need not exist.

    Raises `SpeederError` if it has anything else. Called first, so that hours of work are not lost.
    """
    folder = recover_folder(folder)
    owned = _ENTRIES if _is_prepared(folder) else set()
    check_owned(folder, owned)
    return owned


def _is_prepared(folder: Path) -> bool:
    path = folder / "manifest.json"
    return path.is_file() and read_json(path).get("format") == FORMAT
