"""Pictures and plots for titles, from a folder of posters with or without a list of their titles."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from speeder.data.titles import split_year, title_keys
from speeder.errors import SpeederError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Poster:
    """An item's picture path and plot in a folder; either may be missing."""

    image: str | None = None
    plot: str | None = None


def match_posters(
    folder: str | Path, titles: Sequence[str], ids: Sequence[str] | None = None
) -> list[Poster | None]:
    """One entry per title; None if the folder has nothing for it.

    Args:
        folder: holds `items.jsonl` (an object a line: `title`, and `plot`, `image` or null), which is joined
            by title and year; or else pictures named `{item_id}.jpg|jpeg|png|webp`, joined by `ids`.
        titles: such as `"The Usual Suspects (1995)"`, or `"Usual Suspects, The (1995)"`.
        ids: external item ids, needed for a folder without `items.jsonl`.

    Raises `SpeederError` for a folder or a list that cannot be read. Pictures are not checked here.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SpeederError(f"{folder} is not a folder of posters")
    if (folder / "items.jsonl").is_file():
        return _match_titles(_read_list(folder), titles)
    if ids is None:
        raise SpeederError(f"{folder} has no items.jsonl to match titles with")
    return [_picture_of(folder, external_id) for external_id in ids]


def _picture_of(folder: Path, external_id: str) -> Poster | None:
    if Path(external_id).name != external_id:  # an id such as "../x" names no file of this folder
        return None
    for suffix in _SUFFIXES:
        path = folder / f"{external_id}{suffix}"
        if path.is_file():
            return Poster(image=str(path))
    return None


def _read_list(folder: Path) -> list[tuple[str, Poster]]:
    """Titles with their posters; a picture that is not in the folder is ignored."""
    entries = []
    try:
        lines = (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpeederError(f"{folder / 'items.jsonl'} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            title, image, plot = record["title"], record.get("image"), record.get("plot")
            if (
                not isinstance(title, str)
                or not isinstance(image, str | None)
                or not isinstance(plot, str | None)
            ):
                raise TypeError("title, image and plot must be strings")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SpeederError(f"{folder / 'items.jsonl'} line {number} is not an item: {error!r}") from error
        if image and (Path(image).is_absolute() or ".." in Path(image).parts):
            raise SpeederError(
                f"{folder / 'items.jsonl'} line {number}: the image {image!r} lies outside the folder"
            )
        path = folder / image if image else None
        plot = (plot or "").strip()
        poster = Poster(
            image=str(path) if path and path.is_file() else None,
            plot=plot if plot not in ("", "N/A") else None,
        )
        entries.append((title, poster))
    return entries


def _match_titles(entries: list[tuple[str, Poster]], titles: Sequence[str]) -> list[Poster | None]:
    # (key, year) -> [(specificity of the key for the entry, entry)]
    index: dict[tuple[str, str | None], list[tuple[int, int]]] = defaultdict(list)
    for number, (title, _) in enumerate(entries):
        name, year = split_year(title)
        for rank, key in enumerate(title_keys(name)):
            index[key, year].append((rank, number))
    matches: list[Poster | None] = []
    for title in titles:
        name, year = split_year(title)
        found = [
            (rank + other_rank, number)
            for rank, key in enumerate(title_keys(name))
            for other_rank, number in index.get((key, year), ())
        ]
        matches.append(entries[min(found)[1]][1] if found else None)
    return matches
