"""New items for a finished recommender: a table of them is read, encoded as `prepare` encodes, and added untrained.

A new item has a text or a picture, and neither collaborative features nor a learned embedding: those modalities are
absent, and the gate weighs the others alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from speeder.data.catalogue import ItemCatalogue, saved_hash
from speeder.errors import SpeederError
from speeder.io.files import atomic_folder, check_owned, read_json, recover_folder, write_json
from speeder.model.config import SpeederConfig
from speeder.model.loading import CATALOGUE_FOLDER
from speeder.prepare.features import EncodesImages, EncodesTexts, naming_item
from speeder.prepare.readers.lines import BLANK, BadLine, LineCount
from speeder.prepare.readers.plain import describe, item_rows
from speeder.prepare.readers.text import MAX_TEXT, MAX_TITLE
from speeder.prepare.readers.values import identifier

_PROBES = (
    2  # items of the recommender that are encoded again, to see whether the encoder is the one that it knows
)


class StrictCount(LineCount):
    """A count that takes no broken line: of a few new items none may get lost."""

    def drop(self, number: int, reason: str) -> None:
        """Raises `SpeederError`, but for blank lines."""
        if reason != BLANK:
            raise SpeederError(f"{row_name(self.path, number)}: {reason}")


def row_name(file: Path, number: int) -> str:
    """How a message names a row: a text file's by its line."""
    parquet = file.name.lower().endswith((".parquet", ".pq"))
    return f"{file} {'row' if parquet else 'line'} {number}"


def read_items(
    file: str | Path, images: str | Path | None = None, known: ItemCatalogue | None = None
) -> tuple[ItemCatalogue, list[str]]:
    """Read a table of items (CSV, TSV, Parquet, JSON lines) with columns `id`, and of `title`, `text`, `image` some.

    Args:
        images: the folder that `image` names files in; by default the table's own.
        known: a catalogue that has none of these items yet.

    Returns:
        the items, without features, and what messages call the row of each.

    Raises:
        SpeederError: naming the first row whose id is missing, taken, or twice there, whose picture is not there or
            lies outside the folder, or that is broken; or the columns are others, or there is no row.
    """
    file = Path(file)
    folder = Path(images) if images else file.parent
    if images and not folder.is_dir():
        raise SpeederError(f"{folder} is not a folder of pictures")
    rows: dict[str, str] = {}
    columns: tuple[list, list, list] = ([], [], [])
    described, taken = False, set(known.ids if known is not None else ())
    for entry in item_rows(file, StrictCount(file), ()):
        where = row_name(file, entry.number)
        try:
            external = identifier(entry.item, "item")
        except BadLine as error:
            raise SpeederError(f"{where}: {error}") from None
        if external in rows:
            raise SpeederError(f"{where}: the id {external!r} is that of {rows[external]} too")
        if external in taken:
            raise SpeederError(f"{where}: the recommender has an item of the id {external!r} already")
        described |= any(field is not None for field in entry.record)
        if not isinstance(entry.record[2], str | None):
            raise SpeederError(f"{where}: image: expected a file's name, got {entry.record[2]!r}")
        found = describe(entry.record)
        image = _picture(folder, found.image, where) if found.image else None
        rows[external] = where
        for column, value in zip(
            columns, (found.title[:MAX_TITLE], found.text[:MAX_TEXT], image), strict=True
        ):
            column.append(value)
    if not rows:
        raise SpeederError(f"{file} lists no item")
    if not described:
        raise SpeederError(
            f"{file}: expected a column title, text or image beside the ids, found nothing in any"
        )
    return ItemCatalogue(list(rows), *columns), list(rows.values())


def _picture(folder: Path, name: str, where: str) -> str:
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise SpeederError(f"{where}: the picture {name!r} lies outside the folder {folder}")
    try:
        there = (folder / name).is_file()
    except OSError:  # a name longer than the file system takes
        there = False
    if not there:
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
    """The items with features of their texts and pictures, as far as the recommender reads such.

    Args:
        items: without features, as `read_items` gives them.
        modalities: the recommender's, `config.modalities`: name -> number of features.
        text_encoder, image_encoder: encoders, or names as `prepare` takes them; None loads its defaults. Loaded only
            where there is something to encode.
        known: the recommender's catalogue, of which some items are encoded again: an encoder of the same width may
            still be another one.
        rows: what messages call each item; by default its id.

    Raises:
        SpeederError: an item has nothing that the recommender reads, a picture is broken, or an encoder is not the
            one that the recommender was trained with.
    """
    rows = rows or [f"item {external!r}" for external in items.ids]
    read = [name for name in ("text", "image") if name in modalities]
    if not read:
        raise SpeederError(
            f"the recommender reads {', '.join(modalities) or 'nothing'}: no text and no pictures, so that nothing "
            "can be known of a new item"
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
                raise SpeederError(f"{where}: {path} is no picture that can be read: {broken[path]}")
        with naming_item("image", items.ids):
            encoded = encoded.with_features("image", features, present)
    usable = torch.zeros(len(items), dtype=torch.bool)
    for present in encoded.present.values():
        usable |= present
    bare = (~usable).nonzero().flatten().tolist()
    if bare:
        what = " nor ".join({"text": "title or text", "image": "picture"}[name] for name in read)
        raise SpeederError(
            f"{rows[bare[0]]}: the item has no {what}, and the recommender reads nothing else that a new item can "
            f"have ({len(bare)} such row(s))"
        )
    return encoded


def _check_encoder(
    modality: str, encoder: EncodesTexts | EncodesImages, width: int, known: ItemCatalogue | None
) -> None:
    """Hold an encoder to the features that it must have made of items that the recommender knows."""
    inputs: list[str] = []
    wanted: list[torch.Tensor] = []
    column = [] if known is None else known.texts if modality == "text" else known.images
    for row, content in enumerate(column):
        if content and known.present[modality][row] and (modality == "text" or Path(content).is_file()):
            inputs.append(content)
            wanted.append(known.features[modality][row])
        if len(inputs) == _PROBES:
            break
    if not inputs:  # such as pictures that were moved: then their number of features must do
        return
    features = encoder.encode(inputs)[0]
    _check_width(modality, encoder, features, width)
    if not torch.allclose(features, torch.stack(wanted), rtol=1e-2, atol=1e-3):
        raise SpeederError(
            f"the {modality} encoder {encoder.name!r} gives other features than the recommender has; {_hint(modality)}"
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
    return f"name the encoder that its data were prepared with by --{modality}-encoder"


def add_items(
    folder: str | Path,
    file: str | Path,
    *,
    out: str | Path | None = None,
    images: str | Path | None = None,
    text_encoder: EncodesTexts | str | None = None,
    image_encoder: EncodesImages | str | None = None,
) -> ItemCatalogue:
    """Add a table's items to a saved recommender, all or none. Its weights are not touched, nor read.

    In place, the catalogue is replaced whole and the number of items in `config.json` after it: a process that is
    killed in between leaves a recommender that loads, with the items or without them.

    Args:
        folder: the saved recommender's.
        file, images: as `read_items` takes them.
        out: a new folder for the recommender with the items; the old one then stays as it is.
        text_encoder, image_encoder: as `encode_items` takes them.

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
        # killed between the two, the catalogue shall load beside either configuration
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
    """What a configuration tells of the catalogue that was saved in a folder."""
    return {"num_items": len(catalogue), "catalogue_hash": saved_hash(folder)}


def without_added(model: object, catalogue: ItemCatalogue) -> int:
    """Take out of a recommender the items that were added to those it was trained over; how many there were.

    An evaluation is over the data's own items; what was added later is in no split.

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
    """The names of the encoders of a run's data, by modality, as far as the run and its data tell."""
    try:
        data = Path(read_json(run / "recipe.json")["data"])
        records = read_json(data / "manifest.json")["content"]["encoders"]
        return {name: record["name"] for name, record in records.items() if name in ("text", "image")}
    except (SpeederError, KeyError, TypeError):  # no run, or its data are gone: then the defaults are tried
        return {}
