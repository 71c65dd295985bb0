"""Recommendations for a Parquet file of user histories, written to another Parquet file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError
from speeder.io.files import atomic_path, sha256_file
from speeder.io.parts import Runner, Work, computed, folder_identity, here
from speeder.model.choice import FALLBACKS, Choice, Where, check_word
from speeder.model.popularity import FILE as COUNTS_FILE

PART_ROWS = 1024  # users per part: the most work that a killed worker or driver loses
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view)
_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def recommend_file(
    model_folder: str | Path,
    histories: str | Path,
    out: str | Path,
    k: int = 10,
    exclude_seen: bool = True,
    *,
    part_rows: int = PART_ROWS,
    runner: Runner = here,
    allow: Sequence[str] | None = None,
    deny: Sequence[str] = (),
    where: Where | None = None,
    unknown: str = "error",
    fallback: str | None = None,
) -> int:
    """Write the `k` best next items of every history.

    Args:
        model_folder: of a saved `SpeederForCausalLM`.
        histories: a Parquet file, or a folder of them, with the columns `user` (strings or integers) and `items`
            (lists of the catalogue's ids, oldest first); other columns are ignored.
        out: the Parquet file to write, whole or not at all: `user`, `items` (lists of `k` ids, best first) and
            `scores` (lists of `k` float32), rows in the order of `histories`.
        k, exclude_seen, allow, deny, where, unknown, fallback: as `SpeederForCausalLM.recommend` takes them.
        part_rows: users per part. Finished parts are kept beside `out`, and the same call goes on after a stop.
        runner: where parts are computed: `here`, or an `OnRay`.

    Returns:
        the number of users.

    Raises:
        SpeederError: there is no such model; a file or column is missing or of another type; a history is empty, has
            an item that the catalogue lacks, or leaves fewer than `k` items; or `out` is among the histories. All of
            it is checked before anything is computed.
    """
    model_folder, histories, out = Path(model_folder), Path(histories), Path(out)
    if part_rows < 1:
        raise ValueError(f"part_rows: expected at least 1, got {part_rows}")
    catalogue = _catalogue(model_folder)
    asked = {"allow": allow, "deny": list(deny), "where": where, "unknown": unknown, "fallback": fallback}
    asked = {name: value for name, value in asked.items() if value and value != "error"}
    try:
        choice = Choice.of(catalogue, allow, deny, where, unknown)
        if fallback is not None:
            check_word("fallback", fallback, FALLBACKS)
    except (KeyError, ValueError, TypeError) as error:
        raise SpeederError(f"recommend: {error.args[0]}") from None
    if fallback is not None and not (model_folder / COUNTS_FILE).is_file():
        raise SpeederError(f"fallback: expected training counts in {model_folder / COUNTS_FILE}, found none")
    if not 1 <= k <= len(catalogue):
        raise SpeederError(f"k: expected 1..{len(catalogue)}, the items of the catalogue, got {k}")
    dataset = _open(histories)
    if out.resolve() == histories.resolve() or out.resolve().parent == histories.resolve():
        raise SpeederError(f"{out}: lies among the histories, and would be read as such; name another file")
    if model_folder.resolve() in out.resolve().parents:
        raise SpeederError(f"{out}: lies in the recommender's folder, and would be taken for a part of it")
    identity = {
        "recommend": {"k": k, "exclude_seen": exclude_seen, "part_rows": part_rows} | asked,
        "model": folder_identity(model_folder),
        "histories": [sha256_file(file) for file in dataset.files],
        "version": version("speeder"),
    }
    tables = _checked(
        dataset, catalogue, choice, k, exclude_seen, part_rows, unknown == "skip", bool(fallback)
    )
    make = partial(_recommender, model_folder.resolve(), k, exclude_seen, asked)
    schema, rows = _schema(dataset.schema.field("user").type), 0
    work = out.with_name(f".{out.name}.parts")
    with (
        computed(work, identity, tables, make, runner, "recommend") as outputs,
        atomic_path(out) as temporary,
        pq.ParquetWriter(temporary, schema) as writer,
    ):
        for table in outputs:
            writer.write_table(table)
            rows += len(table)
    return rows


def _recommender(folder: Path, k: int, exclude_seen: bool, asked: dict[str, Any]) -> Work:
    from speeder.model.modeling import SpeederForCausalLM

    model = SpeederForCausalLM.from_pretrained(folder)

    def recommend(table: pa.Table) -> pa.Table:
        rows = model.recommend(
            [items or [] for items in table["items"].to_pylist()], k, exclude_seen, **asked
        )
        user = table["user"]
        ids, scores = ([[getattr(item, name) for item in row] for row in rows] for name in ("id", "score"))
        return pa.table([user, ids, scores], schema=_schema(user.type))

    return recommend


def _schema(user: pa.DataType) -> pa.Schema:
    return pa.schema([("user", user), ("items", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))])


def _catalogue(model_folder: Path) -> ItemCatalogue:
    if not (model_folder / "catalogue").is_dir():
        raise SpeederError(
            f"recommend: expected a language model with its catalogue, found none in {model_folder}"
        )
    return ItemCatalogue.load(model_folder / "catalogue", verify=False)


def _open(path: Path) -> ds.FileSystemDataset:
    """The histories; `SpeederError` unless columns `user` and `items` have the right types."""
    try:
        dataset = ds.dataset(sorted(path.glob("*.parquet")) if path.is_dir() else path, format="parquet")
    except FileNotFoundError:
        raise SpeederError(f"{path} is missing") from None
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise SpeederError(f"{path}: expected histories as Parquet: {reason}") from error
    if not dataset.files:
        raise SpeederError(f"{path}: expected a folder with *.parquet, found none in it")
    names = dataset.schema.names
    for name in ("user", "items"):
        if names.count(name) != 1:
            raise SpeederError(f"{path}: expected a column {name!r}, got {', '.join(names) or 'none'}")
    user, items = (dataset.schema.field(name).type for name in ("user", "items"))
    if not (pa.types.is_integer(user) or _is(user, _STRINGS)):
        raise SpeederError(f"{path}: expected user to be strings or integers, got {user}")
    if not (_is(items, _LISTS) and _is(items.value_type, _STRINGS)):  # numbers could be ids or places
        raise SpeederError(f"{path}: expected items to be lists of strings, the catalogue's ids, got {items}")
    return dataset


def _is(kind: pa.DataType, tests: Sequence[Callable]) -> bool:
    return any(test(kind) for test in tests)


def _checked(
    dataset: ds.FileSystemDataset,
    catalogue: ItemCatalogue,
    choice: Choice,
    k: int,
    exclude_seen: bool,
    part_rows: int,
    skip: bool,
    may_be_empty: bool,
) -> Iterator[pa.Table]:
    """The histories in parts, in order; a history that the model would refuse is an error with its row."""
    row = 0
    for table in _rows(dataset, part_rows):
        for user, items in zip(table["user"].to_pylist(), table["items"].to_pylist(), strict=True):
            where = f"histories, row {row} (user {user!r})"
            if user is None:
                raise SpeederError(f"{where}: expected a user, got null")
            items = items or []
            if None in items:
                raise SpeederError(f"{where}: expected ids of items, got null")
            items = catalogue.known(items) if skip else items
            if not items and not may_be_empty:
                raise SpeederError(f"{where}: expected at least one item, got none")
            try:
                rows = catalogue.indices_of(items)
            except KeyError as error:
                raise SpeederError(f"{where}: {error.args[0]}") from None
            left = choice.left(choice.hidden(rows if exclude_seen else ()), len(catalogue))
            if left < k:
                raise SpeederError(f"{where}: expected at least {k} unseen items, got {left}")
            row += 1
        yield table


def _rows(dataset: ds.FileSystemDataset, count: int) -> Iterator[pa.Table]:
    """Tables of `count` rows (the last may have fewer), whatever the files' row groups."""
    kept = None
    for batch in dataset.to_batches(columns=["user", "items"]):
        table = pa.Table.from_batches([batch])
        kept = table if kept is None else pa.concat_tables([kept, table])
        while len(kept) >= count:
            yield kept.slice(0, count)
            kept = kept.slice(count)
    if kept is not None and len(kept):
        yield kept
