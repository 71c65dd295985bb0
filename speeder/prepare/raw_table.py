"""From raw data to a catalogue and interactions: one pass over the interactions, filters, one pass over the items."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from speeder.data.catalogue import ItemCatalogue
from speeder.data.interactions import SPLIT_RULE, Interactions
from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.io.files import recover_folder, sha256_file
from speeder.prepare.filters import first_of_repeats, k_core, renumber
from speeder.prepare.readers.lines import BadLine, LineCount
from speeder.prepare.readers.raw import NO_INTERACTIONS, RawData
from speeder.prepare.readers.text import MAX_TEXT, MAX_TITLE, ItemText
from speeder.prepare.readers.times import PER_SECOND, hold_dates, nanoseconds
from speeder.prepare.readers.values import identifier, rating
from speeder.prepare.spool import Spool
from speeder.prepare.ties import Ties

REPEATED = "same user and item as another line"


def read_raw(
    raw: RawData,
    scratch: Path,
    *,
    core: int = 1,
    min_rating: float | None = None,
    repeats: bool = False,
    ties: Ties | None = None,
) -> PreparedData:
    """Reads raw data as a stream; the catalogue has the items with interactions, without features.

    Users and items are numbered by their first appearance among the kept interactions.

    Args:
        scratch: an empty folder for intermediate columns (24 bytes per interaction, and the ids).
        core: users and items with fewer interactions are dropped, repeatedly until none is left.
        min_rating: interactions with a lower rating are dropped.
        repeats: keep repeated interactions of a user with an item; else only the earliest.
        ties: how interactions of a user with one time are ordered; None: as in the file.

    Returns:
        Data whose manifest counts every line as kept, or as dropped with its reason. An item's `image` is the name in
        the raw data, unchecked.

    Raises `SpeederError` if a file cannot be read, or nothing is left.
    """
    ties = ties or Ties()
    sources = [raw.interaction_file, *([raw.item_file] if raw.item_file else [])]
    for path in sources:  # the second is read last: check early that it exists
        if not path.is_file():
            raise SpeederError(f"{path} cannot be read: it is {'a folder' if path.is_dir() else 'missing'}")
    count = LineCount(raw.interaction_file)
    spool = Spool(scratch)
    _fill(spool, raw, count, min_rating)
    count.check()
    user, item, time, user_ids, item_ids = _filtered(spool, count, core, repeats)
    if not user_ids:
        raise SpeederError(
            f"{raw.interaction_file}: no interaction is left of {count.read} lines"
            f" ({count.reasons() or 'it is empty'})"
        )
    # by nanoseconds: whole seconds would make ties of them
    order = ties.sort(user, item, time, user_ids, item_ids)
    user = user[order]  # one by one: each old column makes room for the next new one
    item = item[order]
    time = time[order]
    del order
    same_time = _sharing_time(user, time)
    time //= PER_SECOND
    interactions = Interactions(user, item, time, user_ids)
    del user, item, time
    catalogue, items, unused = _read_items(raw, item_ids)
    manifest = {
        "dataset": raw.name,
        "sources": {path.name: sha256_file(path) for path in sources},
        "split": SPLIT_RULE,
        "ties": ties.record,
        "filters": {"k_core": core, "min_rating": min_rating, "repeats": repeats},
        "items": items,
        "interactions": count.summary(),
        "users": len(user_ids),
        "unused_columns": {"interactions": count.unused, "items": unused},
        "same_time": same_time,
    }
    return PreparedData(catalogue, interactions, manifest)


def _sharing_time(user: np.ndarray, time: np.ndarray) -> int:
    """How many rows, sorted by user and time, have their time in common with another row of their user."""
    same = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    return int(np.count_nonzero(np.append(same, False) | np.append(False, same)))


def _fill(spool: Spool, raw: RawData, count: LineCount, min_rating: float | None) -> None:
    dates, rows = hold_dates(raw.interactions(count))
    for row in rows:
        try:
            user, item = identifier(row.user, "user"), identifier(row.item, "item")
            time = nanoseconds(row.time, raw.ticks_per_second, dates=dates)
            rated_low = min_rating is not None and rating(row.rating) < min_rating
        except BadLine as error:
            count.drop(row.number, error)
            continue
        if rated_low:
            count.leave_out("rated lower than the threshold")
        else:
            spool.add(user, item, time)
    spool.close()


def _filtered(
    spool: Spool, count: LineCount, core: int, repeats: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str], list[str]]:
    """Columns user, item and nanoseconds of the kept rows, in the order of the lines, and user and item ids."""
    user, user_hashes = spool.users.codes()
    item, item_hashes = spool.items.codes()
    keep = first_of_repeats(user, item, spool.times(), same_time=repeats)
    reason = "same user, item and time as another line" if repeats else REPEATED
    count.leave_out(reason, len(keep) - int(np.count_nonzero(keep)))
    few_users, few_items = k_core(user, item, keep, core)
    count.leave_out(f"user with fewer than {core} interactions", few_users)
    count.leave_out(f"item with fewer than {core} interactions", few_items)
    user, user_codes = renumber(user[keep])
    item, item_codes = renumber(item[keep])
    names = spool.users.names(user_hashes[user_codes]), spool.items.names(item_hashes[item_codes])
    return user, item, spool.times_of(keep), *names


def _read_items(raw: RawData, ids: list[str]) -> tuple[ItemCatalogue, dict, list[str]]:
    """The catalogue of these items, in this order, the manifest's record of their lines, and the unused columns."""
    place = {external: row for row, external in enumerate(ids)}
    found: list[ItemText | None] = [None] * len(ids)
    cut, summary, unused = np.zeros(len(ids), dtype=bool), {}, []
    if raw.items is not None:
        count = LineCount(raw.item_file)
        for entry in raw.items(count, place):
            try:
                external = identifier(entry.item, "item")
            except BadLine as error:
                count.drop(entry.number, error)
                continue
            row = place.get(external)
            if row is None:
                count.leave_out(NO_INTERACTIONS)
                continue
            earlier = found[row]
            if earlier:
                count.drop(entry.number, "item listed before")
            if earlier and earlier.title:
                continue
            described = raw.describe(entry.record)
            if earlier is None or described.title:  # of an item's lines, the first with a title
                cut[row] = len(described.title) > MAX_TITLE or len(described.text) > MAX_TEXT
                found[row] = described._replace(
                    title=described.title[:MAX_TITLE],
                    text=described.text[:MAX_TEXT],
                    image=described.image or (earlier and earlier.image),
                )
        count.check()
        unused = count.unused
        summary = {
            **count.summary(),
            "cut_short": int(cut.sum()),
            "titles_blanked": sum(entry is not None and entry.blanked for entry in found),
        }
        if not any(found):
            raise SpeederError(
                f"{raw.item_file} lists none of the {len(ids)} items of {raw.interaction_file}:"
                " do they belong together?"
            )
    summary["without_line"] = found.count(None)
    bare = ItemText("", "", columns=(None,) * len(raw.columns))
    titles, texts, images, _, columns = zip(*(entry or bare for entry in found), strict=True)
    summary["without_text"] = texts.count("")
    catalogue = ItemCatalogue(ids, titles, texts, images)
    return (
        catalogue.with_columns(dict(zip(raw.columns, zip(*columns, strict=True), strict=True))),
        summary,
        unused,
    )


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, removed at the end; what an interrupted run left is removed too.

    Raises `SpeederError` if another process is preparing the same folder.
    """
    out = recover_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.reading")
    lock_file = out.with_name(f".{out.name}.lock")
    try:
        with FileLock(lock_file, timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                lock_file.unlink(missing_ok=True)
    except Timeout:
        raise SpeederError(f"{out} is being prepared by another process") from None
