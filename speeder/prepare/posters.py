"""Pictures and plots for titles, from a folder of posters with or without a list of their titles."""

import json
import logging
import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from speeder.data.titles import split_year, title_keys
from speeder.errors import SpeederError
from speeder.io.pictures import endings

log = logging.getLogger(__name__)

LIST = "items.jsonl"


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
            by title and year; or else pictures named by item id, joined by `ids`. Any ending that Pillow opens, in
            any case, is a picture's; of several pictures of an item the most usual ending is taken, with a warning.
        titles: such as `"The Usual Suspects (1995)"`, or `"Usual Suspects, The (1995)"`.
        ids: external item ids, needed for a folder without `items.jsonl`.

    Raises `SpeederError` for a folder or a list that cannot be read. Pictures are not checked here.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SpeederError(f"{folder} is not a folder of posters")
    if (folder / LIST).is_file():
        return _match_titles(_read_list(folder), titles)
    if ids is None:
        raise SpeederError(f"{folder} has no {LIST} to match titles with")
    pictures = _pictures_by_stem(folder)
    found = [pictures.get(_spelled(external)) for external in ids]
    several = [(external, names) for external, names in zip(ids, found, strict=True) if names and names[1:]]
    if several:
        external, (taken, *others) = several[0]
        log.warning(
            "%s: %d items have several pictures; of item %r, %s is taken and not %s",
            folder,
            len(several),
            external,
            taken,
            ", ".join(others),
        )
    return [Poster(image=str(folder / names[0])) if names else None for names in found]


def is_file(path: Path) -> bool:
    """Whether there is a file of that name; False for a name that the file system does not take."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _pictures_by_stem(folder: Path) -> dict[str, list[str]]:
    """The names of a folder's picture files, under their names without the ending; usual endings come first."""
    places = {ending: place for place, ending in enumerate(endings())}
    found: dict[str, list[tuple]] = defaultdict(list)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                stem, ending = os.path.splitext(entry.name)
                place = places.get(ending.lower())
                if place is not None and entry.is_file():
                    found[_spelled(stem)].append((place, ending != ending.lower(), entry.name))
    except OSError as error:
        raise SpeederError(f"{folder} cannot be read: {error.strerror or error}") from error
    return {stem: [name for *_, name in sorted(names)] for stem, names in found.items()}


def _spelled(name: str) -> str:
    """The one spelling of accents: some systems store `é` in file names as two characters."""
    return unicodedata.normalize("NFC", name)


def _read_list(folder: Path) -> list[tuple[str, Poster]]:
    """Titles with their posters; a picture that is not in the folder is ignored."""
    entries = []
    try:
        lines = (folder / LIST).read_text(encoding="utf-8").splitlines()
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
            image=str(path) if path and is_file(path) else None,
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
