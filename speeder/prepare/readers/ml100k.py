"""MovieLens-100K from RecBole's atomic files (tab-separated, with `name:type` headers)."""

import re
from pathlib import Path

import numpy as np

from speeder.data.catalogue import ItemCatalogue
from speeder.data.interactions import SPLIT_RULE, Interactions
from speeder.data.prepared import PreparedData
from speeder.data.titles import split_year
from speeder.io.assets import fetch
from speeder.io.files import sha256_file
from speeder.prepare.readers.lines import BadLine, LineCount
from speeder.prepare.readers.movielens import film_text
from speeder.prepare.readers.tables import csv_rows
from speeder.prepare.readers.text import ItemText
from speeder.prepare.readers.times import PER_SECOND, nanoseconds
from speeder.prepare.readers.values import identifier
from speeder.prepare.ties import Ties

# MovieLens' film 267 is "unknown"; the atomic files spell it so.
_UNKNOWN = {"unkonwn", "unknown", ""}


def read_ml100k(folder: str | Path | None = None, ties: Ties | None = None) -> PreparedData:
    """The 943 users, 1,682 films and 100,000 ratings as implicit interactions, without features.

    Every rating counts, with any number of stars. Titles read `"The Usual Suspects (1995)"`, texts
    `"The Usual Suspects (1995). Genres: Crime, Thriller."`; a film without a title has no text.

    Args:
        folder: holds `ml-100k.inter` and `ml-100k.item`; None fetches the `ml-100k` asset.
        ties: how ratings of a user with one time are ordered; None: as in the file.

    Lines that cannot be read are dropped, counted by reason in the manifest and logged by number. Raises
    `SpeederError` if a file is missing or is something else.
    """
    ties = ties or Ties()
    folder = fetch("ml-100k") if folder is None else Path(folder)
    item_file, interaction_file = folder / "ml-100k.item", folder / "ml-100k.inter"
    catalogue, item_count = _read_items(item_file)
    interactions, count = _read_interactions(interaction_file, catalogue, ties)
    manifest = {
        "dataset": "ml-100k",
        "sources": {path.name: sha256_file(path) for path in (item_file, interaction_file)},
        "split": SPLIT_RULE,
        "ties": ties.record,
        "items": {**item_count.summary(), "without_text": catalogue.texts.count("")},
        "interactions": count.summary(),
        "users": len(interactions.user_ids),
    }
    return PreparedData(catalogue, interactions, manifest)


def _read_items(path: Path) -> tuple[ItemCatalogue, LineCount]:
    count = LineCount(path)
    items: dict[str, ItemText] = {}
    columns = [["item_id:token"], ["movie_title:token_seq"], ["release_year:token"], ["class:token_seq"]]
    for number, (item, title, year, genres) in csv_rows(path, count, columns, 4, separator="\t"):
        try:
            item = identifier(item, "item")
        except BadLine as error:
            count.drop(number, error)
            continue
        if item in items:
            count.drop(number, "item listed before")
        else:
            items[item] = _describe(title, year, genres)
    titles, texts = ([entry[part] for entry in items.values()] for part in (0, 1))
    return ItemCatalogue(list(items), titles, texts), count


def _describe(title: str, year: str, genres: str) -> ItemText:
    if title.strip().casefold() in _UNKNOWN:
        return ItemText("", "")
    if not re.fullmatch(r"\d{4}", year):  # one film has "V" (straight to video), and its year in the title
        title, year = split_year(title)
    return film_text(title, year, genres.split())


def _read_interactions(path: Path, catalogue: ItemCatalogue, ties: Ties) -> tuple[Interactions, LineCount]:
    count = LineCount(path)
    rows: dict[tuple[str, str], int] = {}  # in the order of the lines
    known = set(catalogue.ids)
    columns = [["user_id:token"], ["item_id:token"], ["timestamp:float"]]
    for number, (user, item, time) in csv_rows(path, count, columns, 3, separator="\t"):
        try:
            pair = identifier(user, "user"), identifier(item, "item")
            time = nanoseconds(time, 1)
        except BadLine as error:
            count.drop(number, error)
            continue
        if pair[1] not in known:
            count.drop(number, "item not in the item file")
        elif pair in rows:
            count.drop(number, "same user and item as an earlier line")
        else:
            rows[pair] = time
    user_ids = sorted({user for user, _ in rows}, key=_numbers_in_order)
    user_index = {user: index for index, user in enumerate(user_ids)}
    users = np.array([user_index[user] for user, _ in rows], dtype=np.int64)
    items = np.array([catalogue.index_of(item) for _, item in rows], dtype=np.int64)
    times = np.array([*rows.values()], dtype=np.int64)
    # by nanoseconds: whole seconds would make ties of them
    order = ties.sort(users, items, times, user_ids, catalogue.ids)
    return Interactions(users[order], items[order], times[order] // PER_SECOND, user_ids), count


def _numbers_in_order(text: str) -> tuple[int, int, str]:
    return (0, int(text), "") if text.isdecimal() else (1, 0, text)
