"""New items for a finished recommender: reads a table of them, encodes it as `prepare` does, and adds it, untrained.

A new item has a text or a picture, and neither collaborative features nor a learned embedding. Those modalities are
absent, and the gate weights only the others.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from speeder.data.catalogue import ItemCatalogue, saved_hash
from speeder.data.find_run import recorded_data
from speeder.errors import SpeederError
from speeder.io.files import atomic_folder, check_owned, read_json, recover_folder, write_json
from speeder.model.config import SpeederConfig
from speeder.model.loading import CATALOGUE_FOLDER
from speeder.prepare.features import EncodesImages, EncodesTexts, naming_item
from speeder.prepare.posters import is_file
from speeder.prepare.readers.lines import BLANK, BadLine, LineCount
from speeder.prepare.readers.plain import describe, item_rows
from speeder.prepare.readers.text import MAX_TEXT, MAX_TITLE
from speeder.prepare.readers.values import identifier

_PROBES = (
    2  # items of the recommender that are encoded again, to see whether the encoder is the one that it knows
)


class StrictCount(LineCount):
    """A count that allows no broken line: of a few new items none may be lost."""

    def drop(self, number: int, error: BadLine | str) -> None:
        """Raises `SpeederError`, except for blank lines."""
        if str(error) != BLANK:
            told = error.told if isinstance(error, BadLine) else error
            raise SpeederError(f"{row_name(self.path, number)}: {told}")


def row_name(file: Path, number: int) -> str:
    """A row's name in messages; in a text file, its line."""
    parquet = file.name.lower().endswith((".parquet", ".pq"))
    return f"{file} {'row' if parquet else 'line'} {number}"


def read_items(
    file: str | Path, images: str | Path | None = None, known: ItemCatalogue | None = None
) -> tuple[ItemCatalogue, list[str]]:
    """Read a table of items (CSV, TSV, Parquet, JSON lines) with the column `id`, and any of `title`, `text`, `image`.

    Args:
        images: the folder of the files in `image`; by default the table's folder.
        known: a catalogue that must not have these items yet; its further columns are read where the table has them.

    Returns:
        the items, without features, and the name of each one's row in messages.

    Raises:
        SpeederError: naming the first broken row, or the first whose id is missing, exists already or is repeated, or
            whose picture is missing or outside the folder; or columns are missing, or there is no row.
    """
    file = Path(file)
    folder = Path(images) if images else file.parent
    if images and not folder.is_dir():
        raise SpeederError(f"{folder} is not a folder of pictures")
    rows: dict[str, str] = {}
    further = tuple(known.columns) if known is not None else ()
    columns: tuple[list, list, list, list] = ([], [], [], [])
    described, taken = False, set(known.ids if known is not None else ())
    for entry in item_rows(file, StrictCount(file), (), further, must_have_columns=False):
        where = row_name(file, entry.number)
        try:
            external = identifier(entry.item, "item")
        except BadLine as error:
            raise SpeederError(f"{where}: {error}") from None
        if external in rows:
            raise SpeederError(f"{where}: the id {external!r} is also in {rows[external]}")
        if external in taken:
            raise SpeederError(f"{where}: the recommender has an item of the id {external!r} already")
        described |= any(field is not None for field in entry.record[:3])
        if not isinstance(entry.record[2], str | None):
            raise SpeederError(f"{where}: image: expected a file's name, got {entry.record[2]!r}")
        found = describe(entry.record)
        image = _picture(folder, found.image, where) if found.image else None
        rows[external] = where
        for column, value in zip(
            columns, (found.title[:MAX_TITLE], found.text[:MAX_TEXT], image, found.columns), strict=True
        ):
            column.append(value)
    if not rows:
        raise SpeederError(f"{file} lists no item")
    if not described:
        raise SpeederError(
            f"{file}: expected a column title, text or image beside the ids, found nothing in any"
        )
    catalogue = ItemCatalogue(list(rows), *columns[:3])
    values = dict(zip(further, map(list, zip(*columns[3], strict=True)), strict=True))
    return catalogue.with_columns(values), list(rows.values())


def _picture(folder: Path, name: str, where: str) -> str:
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise SpeederError(f"{where}: the picture {name!r} lies outside the folder {folder}")
    if not is_file(folder / name):
        raise SpeederError(f"{where}: there is no picture {folder / name}")
    return str(folder / name)


def encode_items(
    items: ItemCatalogue,
    modalities: Mapping[str, int],
    text_encoder: EncodesTexts | str | None = None,
    image_encoder: EncodesImages | str | None = None,
    *,
    known: ItemCatalogue | None = None,
    rows: list[str] | None = None,
) -> ItemCatalogue:
    """The items with features of their texts and pictures, for the modalities that the recommender reads.

    Args:
        items: without features, as from `read_items`.
        modalities: the recommender's `config.modalities`: name -> number of features.
        text_encoder, image_encoder: encoders, or names as in `prepare`; None loads its defaults. Loaded only if there
            is something to encode.
        known: the recommender's catalogue. Some of its items are encoded again, since another encoder may have the same
            width.
        rows: the name of each item in messages; by default its id.

    Raises:
        SpeederError: an item has nothing that the recommender reads, a picture is broken, or an encoder is not the one
            of the recommender's training.
    """
    rows = rows or [f"item {external!r}" for external in items.ids]
    read = [name for name in ("text", "image") if name in modalities]
    if not read:
        raise SpeederError(
            f"the recommender reads {', '.join(modalities) or 'no modality'}, and neither texts nor pictures, so it "
            "cannot recommend new items"
        )
    encoded = items
    if "text" in read and any(text.strip() for text in items.texts):
        if text_encoder is None or isinstance(text_encoder, str):
            from speeder.prepare.encoders.text import TextEncoder

            text_encoder = TextEncoder(*([text_encoder] if text_encoder else []))
        _check_encoder("text", text_encoder, modalities["text"], known)
        with naming_item("text", items.ids):
            features, present = text_encoder.encode(items.texts)
        _check_width("text", text_encoder, features, modalities["text"])
        with naming_item("text", items.ids):
            encoded = encoded.with_features("text", features, present)
    if "image" in read and any(items.images):
        if image_encoder is None or isinstance(image_encoder, str):
            from speeder.prepare.encoders.image import ImageEncoder

            image_encoder = ImageEncoder(*([image_encoder] if image_encoder else []))
        _check_encoder("image", image_encoder, modalities["image"], known)
        with naming_item("image", items.ids):
            features, present, broken = image_encoder.encode(items.images)
        _check_width("image", image_encoder, features, modalities["image"])
        for where, path in zip(rows, items.images, strict=True):
            if path in broken:
                raise SpeederError(f"{where}: {path} is not a readable picture: {broken[path]}")
        with naming_item("image", items.ids):
            encoded = encoded.with_features("image", features, present)
    usable = torch.zeros(len(items), dtype=torch.bool)
    for present in encoded.present.values():
        usable |= present
    bare = (~usable).nonzero().flatten().tolist()
    if bare:
        what = " nor ".join({"text": "title or text", "image": "picture"}[name] for name in read)
        raise SpeederError(
            f"{rows[bare[0]]}: the item has no {what}, and the recommender reads nothing else of a new item "
            f"({len(bare)} such row(s))"
        )
    return encoded


def _check_encoder(
    modality: str, encoder: EncodesTexts | EncodesImages, width: int, known: ItemCatalogue | None
) -> None:
    """Check that an encoder gives the recommender's features for some of its own items."""
    inputs: list[str] = []
    wanted: list[torch.Tensor] = []
    column = [] if known is None else known.texts if modality == "text" else known.images
    for row, content in enumerate(column):
        if content and known.present[modality][row] and (modality == "text" or is_file(Path(content))):
            inputs.append(content)
            wanted.append(known.features[modality][row])
        if len(inputs) == _PROBES:
            break
    if not inputs:  # such as pictures that were moved: then only the number of features is checked
        return
    features = encoder.encode(inputs)[0]
    _check_width(modality, encoder, features, width)
    if not torch.allclose(features, torch.stack(wanted), rtol=1e-2, atol=1e-3):
        raise SpeederError(
            f"the {modality} encoder {encoder.name!r} gives other features than the recommender's; {_hint(modality)}"
        )


def _check_width(
    modality: str, encoder: EncodesTexts | EncodesImages, features: torch.Tensor, width: int
) -> None:
    if features.shape[1] != width:
        raise SpeederError(
            f"the {modality} encoder {encoder.name!r} gives {features.shape[1]} features, but the recommender reads "
            f"{width}; {_hint(modality)}"
        )


def _hint(modality: str) -> str:
    return f"use --{modality}-encoder with the encoder of its data"


def add_items(
    folder: str | Path,
    file: str | Path,
    *,
    out: str | Path | None = None,
    images: str | Path | None = None,
    text_encoder: EncodesTexts | str | None = None,
    image_encoder: EncodesImages | str | None = None,
) -> ItemCatalogue:
    """Add a table's items to a saved recommender, all or none. Its weights are neither read nor changed.

    In place, the catalogue is replaced first, and then the number of items in `config.json`. A process that is killed
    in between leaves a recommender that loads, with the items or without them.

    Args:
        folder: the saved recommender's.
        file, images: as in `read_items`.
        out: a new folder for the recommender with the items; the old one is then not changed.
        text_encoder, image_encoder: as in `encode_items`.

    Returns:
        the items that were added.

    Raises:
        SpeederError: see `read_items` and `encode_items`; or another process is adding items.
    """
    folder = Path(folder).resolve()
    if out is not None:
        check_owned(recover_folder(out), set())
    lock = folder.with_name(f".{folder.name}.items.lock")
    try:
        with FileLock(lock, timeout=0):
            try:
                return _add_items(folder, Path(file), out, images, text_encoder, image_encoder)
            finally:
                lock.unlink(missing_ok=True)
    except Timeout:
        raise SpeederError(f"{folder}: another process is adding items to it") from None


def _add_items(folder, file, out, images, text_encoder, image_encoder) -> ItemCatalogue:
    config = read_json(folder / "config.json")
    if config.get("model_type") != SpeederConfig.model_type:
        raise SpeederError(
            f"{folder}: expected a Speeder recommender, got one of type {config.get('model_type')!r}"
        )
    known = ItemCatalogue.load(folder / CATALOGUE_FOLDER)
    items, rows = read_items(file, images, known)
    encoders = {"text_encoder": text_encoder, "image_encoder": image_encoder}
    items = encode_items(items, config["modalities"], **encoders, known=known, rows=rows)
    whole = known.concat(items)
    if out is None:
        # if killed between the two, the catalogue must load with either configuration
        write_json(folder / "config.json", config | {"catalogue_hash": None})
        whole.save(folder / CATALOGUE_FOLDER)
        write_json(folder / "config.json", config | _described(folder / CATALOGUE_FOLDER, whole))
        return items
    with atomic_folder(out, set()) as temporary:
        shutil.copytree(
            folder, temporary, ignore=shutil.ignore_patterns(CATALOGUE_FOLDER, ".*"), dirs_exist_ok=True
        )
        whole.save(temporary / CATALOGUE_FOLDER)
        write_json(temporary / "config.json", config | _described(temporary / CATALOGUE_FOLDER, whole))
    return items


def _described(folder: Path, catalogue: ItemCatalogue) -> dict:
    """The entries of a configuration that depend on the catalogue saved in a folder."""
    return {"num_items": len(catalogue), "catalogue_hash": saved_hash(folder)}


def without_added(model: object, catalogue: ItemCatalogue) -> int:
    """Remove the items that were added after training from a recommender; return their number.

    An evaluation is over the data's own items; items added later are in no split.

    Args:
        catalogue: the data's.
    """
    own = getattr(model, "catalogue", None)
    count = 0 if own is None else len(own) - len(catalogue)
    if count <= 0 or not hasattr(model, "set_catalogue") or own.ids[: len(catalogue)] != catalogue.ids:
        return 0
    model.set_catalogue(own.select(range(len(catalogue))))
    return count


def prepared_encoders(run: Path) -> dict[str, str]:
    """The names of the encoders of a run's data, by modality, as far as they are recorded."""
    try:
        records = read_json(recorded_data(run) / "manifest.json")["content"]["encoders"]
        return {name: record["name"] for name, record in records.items() if name in ("text", "image")}
    except (SpeederError, KeyError, TypeError):  # no run, or its data are gone: the defaults are tried
        return {}
