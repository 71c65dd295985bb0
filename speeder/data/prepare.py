"""From raw files to a folder that training reads: descriptions, plots, pictures and their frozen features."""

import hashlib
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from torch import Tensor

from speeder.data.catalogue import ItemCatalogue
from speeder.data.files import sha256_file
from speeder.data.interactions import LeaveOneOut
from speeder.data.posters import Poster, match_posters
from speeder.data.prepared import PreparedData
from speeder.data.readers.ml100k import read_ml100k
from speeder.encoders.collaborative import collaborative_features

log = logging.getLogger(__name__)


class EncodesTexts(Protocol):
    """What `prepare` needs of a text encoder; `speeder.encoders.text.TextEncoder` is one."""

    name: str
    identity: str

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`(N, F)` float32 and `(N,)` bool."""


class EncodesImages(Protocol):
    """What `prepare` needs of an image encoder; `speeder.encoders.image.ImageEncoder` is one."""

    name: str
    identity: str

    def encode(self, images: Sequence[str | None]) -> tuple[Tensor, Tensor, dict[str, str]]:
        """`(N, F)` float32, `(N,)` bool, and `{path: reason}` of broken pictures."""


def prepare_ml100k(
    out: str | Path,
    *,
    source: str | Path | None = None,
    posters: str | Path | None = None,
    include_plot: bool = True,
    text_encoder: EncodesTexts | None = None,
    image_encoder: EncodesImages | None = None,
    collaborative: bool = True,
) -> PreparedData:
    """Reads MovieLens-100K, encodes texts and, given `posters`, pictures, fits collaborative features, saves all.

    Args:
        out: folder to write, whole or not at all.
        source: folder with the raw files; None fetches the `ml-100k` asset.
        posters: as `match_posters` takes it; None prepares texts alone.
        include_plot: whether a plot that `posters` knows of is added to the film's text.
        text_encoder, image_encoder: None loads the defaults (all-MiniLM-L6-v2, EfficientNet-Lite0).

        collaborative: whether features fitted on the training part of the interactions are added.

    Returns:
        The saved data: modality `"text"`, `"image"` where there are posters, and `"collaborative"`. The manifest
        holds nothing of the time or the machine: the same input gives the same manifest.
    """
    data = read_ml100k(source)
    catalogue, manifest = data.catalogue, dict(data.manifest)
    if posters is not None:
        found = match_posters(posters, catalogue.titles, catalogue.ids)
        catalogue, manifest["posters"] = _with_posters(catalogue, found, include_plot)
    if text_encoder is None:
        from speeder.encoders.text import TextEncoder

        text_encoder = TextEncoder()
    features, present = text_encoder.encode(catalogue.texts)
    catalogue = catalogue.with_features("text", features, present)
    manifest["encoders"] = {"text": _encoder_record(text_encoder)}
    if posters is not None:
        if image_encoder is None:
            from speeder.encoders.image import ImageEncoder

            image_encoder = ImageEncoder()
        features, present, broken = image_encoder.encode(catalogue.images)
        for path, reason in broken.items():
            log.warning("%s is no picture that can be read: %s", path, reason)
        catalogue = catalogue.with_features("image", features, present)
        manifest["encoders"]["image"] = _encoder_record(image_encoder)
        manifest["posters"]["broken"] = {Path(path).name: reason for path, reason in sorted(broken.items())}
    if collaborative:
        fitted = collaborative_features(LeaveOneOut(data.interactions).training(), len(catalogue))
        catalogue = catalogue.with_features("collaborative", fitted.features, fitted.present)
        # what they were fitted on: evaluation refuses them beside another training part
        manifest["encoders"]["collaborative"] = {"name": "sasrec", "training_hash": fitted.training_hash}
    manifest["versions"] = {name: version(name) for name in ("torch", "transformers", "pyarrow", "pillow")}
    prepared = PreparedData(catalogue, data.interactions, manifest)
    prepared.save(out)
    return prepared


def _with_posters(
    catalogue: ItemCatalogue, posters: Sequence[Poster | None], include_plot: bool
) -> tuple[ItemCatalogue, dict]:
    """The catalogue with pictures, and plots in its texts where wanted; and the manifest's record of both."""
    posters = [poster or Poster() for poster in posters]
    plots = [poster.plot if include_plot else None for poster in posters]
    texts = [
        f"{text} {plot}".strip() if plot else text for text, plot in zip(catalogue.texts, plots, strict=True)
    ]
    images = [poster.image for poster in posters]
    record = {
        "matched": sum(image is not None for image in images),
        "missing": [id_ for id_, image in zip(catalogue.ids, images, strict=True) if image is None],
        "plots": sum(plot is not None for plot in plots),
        "sha256": _hash_all(images),
    }
    return ItemCatalogue(catalogue.ids, catalogue.titles, texts, images), record


def _hash_all(paths: Sequence[str | None]) -> str:
    """One hash over every picture's, in catalogue order."""
    return hashlib.sha256("\n".join(sha256_file(path) if path else "" for path in paths).encode()).hexdigest()


def _encoder_record(encoder: EncodesTexts | EncodesImages) -> dict[str, str]:
    return {"name": encoder.name, "identity": encoder.identity}
