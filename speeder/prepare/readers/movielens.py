"""MovieLens as GroupLens publishes it: 100K (`u.data`), 1M and 10M (`ratings.dat`), 20M and later (`ratings.csv`)."""

import re
from collections.abc import Container, Iterator, Sequence
from functools import partial
from pathlib import Path

from speeder.data.titles import natural_title, split_year
from speeder.errors import SpeederError
from speeder.prepare.readers.lines import LineCount
from speeder.prepare.readers.raw import Entry, RawData, Row
from speeder.prepare.readers.tables import csv_rows, split_rows
from speeder.prepare.readers.text import ItemText, clean

# u.item has a column of 0 or 1 for each, in this order
_GENRES_100K = ["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
                "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War",
                "Western"]  # fmt: skip
_FIELDS_100K = 5 + len(_GENRES_100K)
_FILES = {"u.data": "u.item", "ratings.dat": "movies.dat", "ratings.csv": "movies.csv"}
_RATINGS = {
    "ml-100k": "u.data",
    "ml-1m": "ratings.dat",
    "ml-10m": "ratings.dat",
    "ml-20m": "ratings.csv",
    "ml-latest": "ratings.csv",
}


def movielens(name: str, path: Path, item_file: Path | None = None) -> RawData:
    """Raw data of a MovieLens release.

    Args:
        name: the release's.
        path: the folder, or its file of ratings.
        item_file: the file of films, if it is not beside the ratings.

    Raises `SpeederError` if the folder does not have the ratings of that release.
    """
    folder = path if path.is_dir() else path.parent
    found = [kind for kind in _FILES if (folder / kind).is_file() and path in (folder, folder / kind)]
    expected = _RATINGS[name]
    if expected not in found:
        others = [f"{kind} ({' or '.join(n for n in _RATINGS if _RATINGS[n] == kind)})" for kind in found]
        raise SpeederError(
            f"{path}: expected {expected} of {name}, found {', '.join(others) or 'no ratings'}"
        )
    ratings = folder / expected
    item_file = item_file or folder / _FILES[expected]
    read_ratings, read_films = {
        "u.data": (partial(_separated_ratings, "\t"), _films_100k),
        "ratings.dat": (partial(_separated_ratings, "::"), _films_dat),
        "ratings.csv": (_csv_ratings, _films_csv),
    }[expected]
    return RawData(
        name=name,
        interaction_file=ratings,
        interactions=partial(read_ratings, ratings),
        item_file=item_file,
        items=partial(read_films, item_file),
        describe=describe_film,
    )


def _separated_ratings(separator: str, path: Path, count: LineCount) -> Iterator[Row]:
    for number, (user, film, stars, time) in split_rows(path, count, separator, 4):
        yield Row(number, user, film, time, stars)


def _csv_ratings(path: Path, count: LineCount) -> Iterator[Row]:
    for number, fields in csv_rows(path, count, [["userid"], ["movieid"], ["timestamp"], ["rating"]], 3):
        yield Row(number, *fields)


def _films_100k(path: Path, count: LineCount, wanted: Container[str]) -> Iterator[Entry]:
    for number, fields in split_rows(path, count, "|", _FIELDS_100K, encoding="latin-1"):
        genres = [name for name, flag in zip(_GENRES_100K, fields[5:], strict=True) if flag == "1"]
        yield Entry(number, fields[0], (fields[1], genres))


def _films_dat(path: Path, count: LineCount, wanted: Container[str]) -> Iterator[Entry]:
    # 1M is in Latin-1 and 10M in UTF-8; neither says so
    encoding = "utf-8" if _is_utf8(path) else "latin-1"
    for number, (film, title, genres) in split_rows(path, count, "::", 3, encoding=encoding):
        yield Entry(number, film, (title, genres.split("|")))


def _films_csv(path: Path, count: LineCount, wanted: Container[str]) -> Iterator[Entry]:
    for number, (film, title, genres) in csv_rows(path, count, [["movieid"], ["title"], ["genres"]], 3):
        yield Entry(number, film, (title, genres.split("|")))


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # the next reader of the file reports why it cannot be read
        return False
    return True


def describe_film(record: tuple[str, list[str]]) -> ItemText:
    """`("Heat (1995)", ["Action"])` -> title `"Heat (1995)"`, text `"Heat (1995). Genres: Action."`."""
    title, year = split_year(clean(record[0]))
    if title.casefold() in ("", "unknown"):
        return ItemText("", "")
    genres = [
        genre for genre in map(clean, record[1]) if genre and not re.match(r"\(no genres|unknown", genre)
    ]
    return film_text(title, year, genres)


def film_text(title: str, year: str | None, genres: Sequence[str]) -> ItemText:
    """A film's title and text in the catalogue, as in `describe_film`, from the title without its year."""
    full = f"{natural_title(title)} ({year})" if year else natural_title(title)
    return ItemText(full, f"{full}. Genres: {', '.join(genres)}." if genres else f"{full}.")
