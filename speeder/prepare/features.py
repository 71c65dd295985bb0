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
from speeder.io.pictures import endings
from speeder.prepare.encoders.cache import NotFinite
from speeder.prepare.encoders.collaborative import collaborative_features
from speeder.prepare.leave_out import leave_out_bare
from speeder.prepare.posters import LIST, Poster, is_file, match_posters
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
    require: Collection[str] = (),
) -> PreparedData:
    """The data with features, and the manifest's record of the encoders.

    Args:
        data: its catalogue's images are paths.
        modalities: the modalities to add, of [`MODALITIES`]; `"image"` only if an item has a picture.
        text_encoder, image_encoder: None loads the defaults (all-MiniLM-L6-v2, EfficientNet-Lite0).
        runner: runs these defaults elsewhere; None: in this process.
        require: of `"text"` and `"image"`: items that have none of these are left out; see `leave_out_bare`.

    Raises `SpeederError` if an encoder cannot be loaded, or the text modality is wanted and no item has a text.
    """
    catalogue, manifest, encoders = data.catalogue, dict(data.manifest), {}
    if "text" in modalities:
        if not any(catalogue.texts):
            raise SpeederError(
                "no item has a text: expected items.csv (item, title, and perhaps text) in the folder, or --items FILE;"
                " or leave out the text modality (--without text)"
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
        if not present.any():
            path, reason = next(iter(broken.items()))
            raise SpeederError(
                f"none of {len(broken)} pictures can be read (the first is {path}: {reason}); leave out the image "
                "modality (--without image), or mend them"
            )
        with naming_item("image", catalogue.ids):
            catalogue = catalogue.with_features("image", features, present)
        encoders["image"] = _encoder_record(image_encoder)
        broken = {Path(path).name: reason for path, reason in sorted(broken.items())}
        manifest["images"] = {**manifest.get("images", {}), "broken": broken}
    if require:
        data = leave_out_bare(PreparedData(catalogue, data.interactions, manifest), require)
        catalogue, manifest = data.catalogue, data.manifest
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
    data: PreparedData,
    folder: str | Path | None,
    *,
    by_name: bool = False,
    include_plot: bool = True,
    must_match: bool = True,
) -> PreparedData:
    """The data with paths of pictures, and with plots in the texts if the folder has them.

    Args:
        folder: as in `match_posters`; None drops all names of pictures.
        by_name: whether the catalogue's images are names of files in the folder. A name that leads out of it is
            refused, and listed in the manifest.
        include_plot: whether the folder's plots are added to the items' texts.
        must_match: whether a folder that has nothing for any item is refused.

    Raises `SpeederError` for a folder that cannot be read, or has nothing for any item.
    """
    catalogue, refused, manifest = data.catalogue, [], dict(data.manifest)
    named = sum(name is not None for name in catalogue.images)
    if folder is None:
        if named:
            log.warning(
                "pictures named in the table: %d; without --images, the folder of the pictures, none is read",
                named,
            )
            manifest["images"] = {"matched": 0, "names_without_folder": named}
        bare = ItemCatalogue(catalogue.ids, catalogue.titles, catalogue.texts).with_columns(catalogue.columns)
        return PreparedData(bare, data.interactions, manifest)
    if by_name and named:
        posters, refused = _named(Path(folder), catalogue)
    else:
        posters = match_posters(folder, catalogue.titles, catalogue.ids)
    _tell_unmatched(Path(folder), catalogue, posters, bool(by_name and named), must_match)
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
    described = ItemCatalogue(catalogue.ids, catalogue.titles, texts, images).with_columns(catalogue.columns)
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
        posters.append(Poster(str(folder / name) if inside and is_file(folder / name) else None))
    return posters, refused


def _tell_unmatched(
    folder: Path, catalogue: ItemCatalogue, posters: Sequence[Poster | None], by_name: bool, must_match: bool
) -> None:
    """Warn of items without a picture; if there is nothing at all for them, raise `SpeederError` or warn."""
    without = [
        id_ for id_, poster in zip(catalogue.ids, posters, strict=True) if not (poster and poster.image)
    ]
    if any(poster is not None and poster != Poster() for poster in posters):
        if without:
            log.warning(
                "%d of %d items have no picture in %s, the first: %r",
                len(without),
                len(catalogue),
                folder,
                without[0],
            )
        return
    if by_name:
        name = next(name for name in catalogue.images if name)
        looked_for = f"the files that the items name, such as {name!r}"
    elif (folder / LIST).is_file():
        title = next((title for title in catalogue.titles if title), "")
        looked_for = f"the items' titles in {LIST}, such as {title!r}"
    else:
        names = f"{catalogue.ids[0]}{endings()[0]}" if catalogue.ids else f"ID{endings()[0]}"
        looked_for = (
            f"files named by item id, such as {names!r}, with any of the endings {' '.join(endings())}"
        )
    there = next((entry.name for entry in folder.iterdir()), None)
    holds = "it is empty" if there is None else f"it holds such as {there!r}"
    message = f"{folder}: no picture matches an item: looked for {looked_for}; {holds}"
    if must_match:
        raise SpeederError(message)
    log.warning("%s", message)


def _hash_all(paths: Sequence[str | None]) -> str:
    """One hash over all pictures' hashes, in catalogue order."""
    return hashlib.sha256("\n".join(map(_hash, paths)).encode()).hexdigest()


def _hash(path: str | None) -> str:
    try:
        return sha256_file(path) if path else ""
    except OSError:  # the encoder names it as broken
        return "not readable"


def _encoder_record(encoder: EncodesTexts | EncodesImages) -> dict[str, str]:
    return {"name": encoder.name, "identity": encoder.identity, "fitted_on": FITTED_ON_NOTHING}
