"""Frozen features of a catalogue's items, from texts, pictures and interactions."""

import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from speeder.data.catalogue import ItemCatalogue
from speeder.data.fingerprints import FITTED_ON_NOTHING, features_hash
from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.io.files import sha256_file
from speeder.prepare.encoders.cache import NotFinite
from speeder.prepare.encoders.collaborative import collaborative_features
from speeder.prepare.posters import Poster, match_posters
from speeder.recipes.load import settings_for
from speeder.recipes.schema import MODALITIES

if TYPE_CHECKING:
    from speeder.io.parts import Runner

log = logging.getLogger(__name__)


class EncodesTexts(Protocol):
    """A text encoder for `prepare`, such as `speeder.prepare.encoders.text.TextEncoder`."""

    name: str
    identity: str

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`(N, F)` float32 and `(N,)` bool."""


class EncodesImages(Protocol):
    """An image encoder for `prepare`, such as `speeder.prepare.encoders.image.ImageEncoder`."""

    name: str
    identity: str

    def encode(self, images: Sequence[str | None]) -> tuple[Tensor, Tensor, dict[str, str]]:
        """`(N, F)` float32, `(N,)` bool, and `{path: reason}` of broken pictures."""


def add_features(
    data: PreparedData,
    modalities: Collection[str] = MODALITIES,
    text_encoder: EncodesTexts | None = None,
    image_encoder: EncodesImages | None = None,
    runner: "Runner | None" = None,
) -> PreparedData:
    """The data with features, and the manifest's record of the encoders.

    Args:
        data: its catalogue's images are paths.
        modalities: the modalities to add, of [`MODALITIES`]; `"image"` only if an item has a picture.
        text_encoder, image_encoder: None loads the defaults (all-MiniLM-L6-v2, EfficientNet-Lite0).
        runner: runs these defaults elsewhere; None: in this process.

    Raises `SpeederError` if an encoder cannot be loaded, or the text modality is wanted and no item has a text.
    """
    catalogue, manifest, encoders = data.catalogue, dict(data.manifest), {}
    if "text" in modalities:
        if not any(catalogue.texts):
            raise SpeederError(
                "no item has a text: give a file of items, or leave out the text modality (--without text)"
            )
        if text_encoder is None:
            from speeder.prepare.encoders.text import TextEncoder

            text_encoder = TextEncoder(runner=runner)
        with naming_item("text", catalogue.ids):
            features, present = text_encoder.encode(catalogue.texts)
            catalogue = catalogue.with_features("text", features, present)
        encoders["text"] = _encoder_record(text_encoder)
    if "image" in modalities and any(catalogue.images):
        if image_encoder is None:
            from speeder.prepare.encoders.image import ImageEncoder

            image_encoder = ImageEncoder(runner=runner)
        with naming_item("image", catalogue.ids):
            features, present, broken = image_encoder.encode(catalogue.images)
        for path, reason in broken.items():
            log.warning("%s is not a readable picture: %s", path, reason)
        with naming_item("image", catalogue.ids):
            catalogue = catalogue.with_features("image", features, present)
        encoders["image"] = _encoder_record(image_encoder)
        broken = {Path(path).name: reason for path, reason in sorted(broken.items())}
        manifest["images"] = {**manifest.get("images", {}), "broken": broken}
    if "collaborative" in modalities:
        try:
            training = data.split.training()
            config = settings_for(training)
            fitted = collaborative_features(training, len(catalogue), config=config)
            catalogue = catalogue.with_features("collaborative", fitted.features, fitted.present)
        except ValueError as error:  # such as no training sequence of two items
            raise SpeederError(f"collaborative features cannot be fitted: {error}") from error
        # what they were fitted on: evaluation refuses them with another training part
        encoders["collaborative"] = {
            "name": "sasrec",
            "settings": asdict(config),
            "training_hash": fitted.training_hash,
        }
    for name, record in encoders.items():  # evaluation refuses any other features with this record
        record["features_hash"] = features_hash(catalogue.features[name], catalogue.present[name])
    manifest["encoders"] = {**manifest.get("encoders", {}), **encoders}
    return PreparedData(catalogue, data.interactions, manifest)


@contextmanager
def naming_item(modality: str, ids: Sequence[str]) -> Iterator[None]:
    """Turns errors on features into a `SpeederError` that names the modality and, if not finite, the item."""
    try:
        yield
    except NotFinite as error:
        raise SpeederError(
            f"{modality} features of item {ids[error.position]!r} are not finite: the encoder gives NaN or infinity"
        ) from error
    except ValueError as error:
        raise SpeederError(f"{modality} features cannot be used: {error}") from error


def add_images(
    data: PreparedData, folder: str | Path | None, *, by_name: bool = False, include_plot: bool = True
) -> PreparedData:
    """The data with paths of pictures, and with plots in the texts if the folder has them.

    Args:
        folder: as in `match_posters`; None drops all names of pictures.
        by_name: whether the catalogue's images are names of files in the folder. A name that leads out of it is
            refused, and listed in the manifest.
        include_plot: whether the folder's plots are added to the items' texts.
    """
    catalogue, refused, manifest = data.catalogue, [], dict(data.manifest)
    named = sum(name is not None for name in catalogue.images)
    if folder is None:
        if named:
            log.warning("%d items name a picture, but no folder of pictures is given: they have none", named)
            manifest["images"] = {"matched": 0, "names_without_folder": named}
        bare = ItemCatalogue(catalogue.ids, catalogue.titles, catalogue.texts)
        return PreparedData(bare, data.interactions, manifest)
    if by_name and named:
        posters, refused = _named(Path(folder), catalogue)
    else:
        posters = match_posters(folder, catalogue.titles, catalogue.ids)
    posters = [poster or Poster() for poster in posters]
    plots = [poster.plot if include_plot else None for poster in posters]
    texts = [
        f"{text} {plot}".strip() if plot else text for text, plot in zip(catalogue.texts, plots, strict=True)
    ]
    images = [poster.image for poster in posters]
    record = {
        "matched": sum(image is not None for image in images),
        "missing": [id_ for id_, image in zip(catalogue.ids, images, strict=True) if image is None],
        "refused": refused,
        "plots": sum(plot is not None for plot in plots),
        "sha256": _hash_all(images),
    }
    if named and not by_name:
        log.warning("%d items name a picture, but these pictures are found by item id", named)
        record["names_unused"] = named
    described = ItemCatalogue(catalogue.ids, catalogue.titles, texts, images)
    return PreparedData(described, data.interactions, {**manifest, "images": record})


def _named(folder: Path, catalogue: ItemCatalogue) -> tuple[list[Poster], list[str]]:
    """Pictures by the catalogue's names, and the ids of items whose name leads out of the folder."""
    if not folder.is_dir():
        raise SpeederError(f"{folder} is not a folder of pictures")
    posters, refused = [], []
    for id_, name in zip(catalogue.ids, catalogue.images, strict=True):
        inside = name and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
        if name and not inside:
            refused.append(id_)
        posters.append(Poster(str(folder / name) if inside and _is_file(folder / name) else None))
    return posters, refused


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name longer than the file system takes
        return False


def _hash_all(paths: Sequence[str | None]) -> str:
    """One hash over all pictures' hashes, in catalogue order."""
    return hashlib.sha256("\n".join(sha256_file(path) if path else "" for path in paths).encode()).hexdigest()


def _encoder_record(encoder: EncodesTexts | EncodesImages) -> dict[str, str]:
    return {"name": encoder.name, "identity": encoder.identity, "fitted_on": FITTED_ON_NOTHING}
