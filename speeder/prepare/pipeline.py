"""From raw files to a prepared data folder: items, pictures, interactions and frozen features."""

import logging
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from speeder.data.prepared import PreparedData, check_replaceable, saved_split
from speeder.errors import SpeederError
from speeder.io.disk_full import writing
from speeder.prepare.features import EncodesImages, EncodesTexts, add_features, add_images
from speeder.prepare.raw_table import read_raw, scratch_folder
from speeder.prepare.readers import READERS
from speeder.prepare.readers.ml100k import read_ml100k
from speeder.prepare.readers.plain import IMAGE, ITEM, TEXT, TITLE, plain, sequences
from speeder.prepare.readers.times import TIME_UNITS
from speeder.prepare.splits import check_rules, with_split
from speeder.prepare.ties import Ties
from speeder.recipes.schema import MODALITIES

if TYPE_CHECKING:
    from speeder.io.parts import Runner

log = logging.getLogger(__name__)


def prepare(
    name: str,
    path: str | Path,
    out: str | Path,
    *,
    items: str | Path | None = None,
    images: str | Path | None = None,
    core: int | None = None,
    min_rating: float | None = None,
    repeats: bool = False,
    time_unit: str = "s",
    modalities: Collection[str] = MODALITIES,
    text_encoder: EncodesTexts | None = None,
    image_encoder: EncodesImages | None = None,
    runner: "Runner | None" = None,
    require: Collection[str] = (),
    columns: Sequence[str] = (),
    ties: str = "file",
    ties_seed: int | None = None,
    split: str = "leave-one-out",
    split_time: Sequence[float | str] | None = None,
) -> PreparedData:
    """Reads raw files, filters, encodes texts and pictures, and saves the result, whole or not at all.

    After an interruption it reads the files again, but keeps the texts and pictures that were encoded.

    Args:
        name: a name of [`READERS`].
        path: the file of interactions, or a folder, depending on the reader.
        out: folder to write.
        items: the file of items, if it is not in the folder.
        images: folder of pictures named by item id (or by the item table's `image` column); None takes the data's own,
            if any. Nothing is downloaded. A folder given here that has nothing for any item is refused.
        core: k of the k-core filter; None takes the format's default, 1 filters nothing.
        min_rating: interactions with a lower rating are dropped.
        repeats: keep repeated interactions of a user with an item; else only the earliest.
        time_unit: unit of `"plain"` data's times.
        modalities: features to add.
        text_encoder, image_encoder: None loads the defaults (all-MiniLM-L6-v2, EfficientNet-Lite0).
        runner: runs these defaults elsewhere, such as an `OnRay`; None: in this process.
        require: of `"text"` and `"image"`: items that have none of these are left out, with their interactions. It is
            the last filter, so users and items may then have fewer than `core` interactions.
        columns: further columns of `"plain"` and `"sequences"` items, such as a category, by which recommendations
            can be filtered.
        ties, ties_seed: how interactions of a user with one time are ordered; see `Ties`.
        split: `"leave-one-out"` or `"temporal"`.
        split_time: dates or shares of a temporal split; see `with_split`.

    Returns:
        The saved data. The manifest has neither time nor machine: the same input gives the same manifest.

    Raises `SpeederError` for files that cannot be read, or a wrong setting.
    """
    if name not in READERS:
        raise SpeederError(f"expected one of {', '.join(READERS)}, got {name!r}")
    if core is not None and core < 1:
        raise SpeederError(f"k-core: expected at least 1, got {core}")
    if time_unit not in TIME_UNITS or (time_unit != "s" and name != "plain"):
        raise SpeederError(
            f"time unit: expected one of {', '.join(TIME_UNITS)}, for plain data, got {time_unit!r}"
        )
    if columns and name not in ("plain", "sequences"):
        raise SpeederError(
            f"columns: expected none for {name}, got {', '.join(columns)}; plain data can have them"
        )
    taken = {*ITEM, "id", *TITLE, *TEXT, *IMAGE} & {column.lower() for column in columns}
    if taken or len(set(columns)) < len(columns):
        raise SpeederError(f"columns: expected further columns of items, each once, got {', '.join(columns)}")
    rule = Ties(ties, ties_seed)
    check_replaceable(out)
    path, items = Path(path), Path(items) if items else None
    if not path.exists():
        raise SpeederError(f"{path} is missing")
    earlier = saved_split(out)
    if name == "plain":
        raw = plain(path, items, time_unit, columns)
    elif name == "sequences":
        raw = sequences(path, items, columns)
    else:
        raw = READERS[name].open(path, items)
    check_rules(rule, split, split_time, raw.has_times)
    with writing(out), scratch_folder(Path(out)) as scratch:
        data = read_raw(
            raw,
            scratch,
            core=READERS[name].core if core is None else core,
            min_rating=min_rating,
            repeats=repeats,
            ties=rule,
        )
    data = with_split(data, split, split_time)
    data = add_images(data, images or raw.images, by_name=raw.images_by_name, must_match=images is not None)
    return _encode_and_save(data, out, modalities, text_encoder, image_encoder, runner, require, earlier)


def prepare_ml100k(
    out: str | Path,
    *,
    source: str | Path | None = None,
    posters: str | Path | None = None,
    include_plot: bool = True,
    text_encoder: EncodesTexts | None = None,
    image_encoder: EncodesImages | None = None,
    modalities: Collection[str] = MODALITIES,
    runner: "Runner | None" = None,
    require: Collection[str] = (),
    on_text: Callable[[PreparedData], None] | None = None,
    ties: str = "file",
    ties_seed: int | None = None,
    split: str = "leave-one-out",
    split_time: Sequence[float | str] | None = None,
) -> PreparedData:
    """Prepares MovieLens-100K from the package index, whole: every rating counts, every film is in the catalogue.

    Args:
        out: folder to write, whole or not at all.
        source: folder with the raw files (RecBole's atomic ones); None fetches the `ml-100k` asset.
        posters: as in `match_posters`; None: no pictures.
        include_plot: whether the plots of `posters` are added to the films' texts.
        text_encoder, image_encoder, modalities, runner, require, ties, ties_seed, split, split_time: as in `prepare`.
        on_text: called with the data once their texts are encoded, before the slower steps.

    Returns:
        The saved data, as from `prepare`.
    """
    rule = Ties(ties, ties_seed)
    check_rules(rule, split, split_time, has_times=True)
    check_replaceable(out)
    earlier = saved_split(out)
    data = with_split(read_ml100k(source, rule), split, split_time)
    data = add_images(data, posters, include_plot=include_plot)
    if on_text is not None:
        data = add_features(data, ["text"], text_encoder, runner=runner)
        on_text(data)
        modalities = [name for name in modalities if name != "text"]
    return _encode_and_save(data, out, modalities, text_encoder, image_encoder, runner, require, earlier)


def _encode_and_save(
    data: PreparedData,
    out: str | Path,
    modalities: Collection[str],
    text_encoder: EncodesTexts | None,
    image_encoder: EncodesImages | None,
    runner: "Runner | None",
    require: Collection[str],
    earlier: str | None,
) -> PreparedData:
    """The saved data, with features; `earlier` is the split that was in `out` before."""
    data = add_features(data, modalities, text_encoder, image_encoder, runner, require)
    data.manifest["versions"] = {
        name: version(name) for name in ("torch", "transformers", "pyarrow", "pillow")
    }
    data.save(out)
    if earlier not in (None, data.split.hash()):
        log.warning("%s: replaced; runs trained on the earlier data can no longer be evaluated", out)
    return data
