"""The item catalogue: ids, titles, texts, pictures, and frozen features per modality."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from speeder.data.item_indices import as_index, check_ordered, item_array
from speeder.errors import SpeederError
from speeder.io.files import (
    atomic_folder,
    check_files,
    describe_files,
    read_json,
    recover_folder,
    sha256_file,
    write_json,
)

FORMAT = "speeder-catalogue-1"
_ROW_GROUP = 1 << 16
_COLUMNS = ("id", "title", "text", "image")  # that every catalogue has
_MODALITY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class ItemCatalogue:
    """`I` items: ids, titles, texts, pictures and features. Rows are item indices `0..I-1`; treat it as read-only.

    Attributes:
        ids: external ids, unique.
        titles: one title per item, `""` if none.
        texts: the text that encoders read, `""` if none.
        images: a picture's path, or None.
        columns: further columns, such as a genre: name -> one text or None per item.
        features: modality -> `(I, F_m)` float32, zeros where absent.
        present: modality -> `(I,)` bool.
    """

    def __init__(
        self,
        ids: Sequence[str],
        titles: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
        images: Sequence[str | None] | None = None,
        features: Mapping[str, torch.Tensor] | None = None,
        present: Mapping[str, torch.Tensor] | None = None,
    ):
        """Raises `TypeError` or `ValueError`, naming the argument, if a column or matrix does not fit."""
        self.ids = _strings("ids", ids)
        count = len(self.ids)
        self.titles = [""] * count if titles is None else _strings("titles", titles, count)
        self.texts = [""] * count if texts is None else _strings("texts", texts, count)
        self.images = [None] * count if images is None else _strings("images", images, count, optional=True)
        self.columns: dict[str, list[str | None]] = {}
        self._index = {external: row for row, external in enumerate(self.ids)}
        if len(self._index) != count:
            twice = next(external for row, external in enumerate(self.ids) if self._index[external] != row)
            raise ValueError(f"ids must be unique, but {twice!r} occurs more than once")
        present = dict(present or {})
        self.features: dict[str, torch.Tensor] = {}
        self.present: dict[str, torch.Tensor] = {}
        for name, matrix in (features or {}).items():
            self.features[name], self.present[name] = _checked(
                name, matrix, present.pop(name, None), self.ids
            )
        if present:
            raise ValueError(f"present names modalities that have no features: {sorted(present)}")

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"ItemCatalogue({len(self)} items, modalities={self.modalities})"

    @property
    def modalities(self) -> dict[str, int]:
        """Modality -> number of features `F_m`, in the order of addition."""
        return {name: matrix.shape[1] for name, matrix in self.features.items()}

    def readable_texts(self) -> list[str]:
        """Each item's text; its title, if it has no text."""
        return [text or title for text, title in zip(self.texts, self.titles, strict=True)]

    @property
    def readable(self) -> list[str]:
        """What a recipe's stages can open: the modalities, and "words" if an item has a text or title."""
        return [*self.modalities, *(["words"] if any(self.readable_texts()) else [])]

    def index_of(self, external_id: str) -> int:
        """The row of an external id; `KeyError` if there is no such item."""
        try:
            return self._index[external_id]
        except KeyError:
            examples = ", ".join(map(repr, self.ids[:3]))
            raise KeyError(
                f"no item has the id {external_id!r} among {len(self)} items (ids are such as {examples})"
            ) from None

    def indices_of(self, entries: Sequence[int | str]) -> list[int]:
        """Item indices (integers of Python, numpy or torch) and external ids (str), also mixed, as item indices.

        Raises `ValueError` for an index out of range, `KeyError` for an unknown id, `TypeError` for anything else, such
        as 1.0, True or b"1".
        """
        check_ordered("items", entries)
        if isinstance(entries, torch.Tensor) or (
            isinstance(entries, np.ndarray) and entries.dtype.kind not in "OUT"
        ):
            rows = item_array("items", entries).tolist()
        elif set(map(type, entries)) <= {int}:
            rows = list(entries)
        else:
            rows = [
                self.index_of(entry) if isinstance(entry, str) else as_index("items", entry)
                for entry in entries
            ]
        count = len(self)
        if rows and (min(rows) < 0 or max(rows) >= count):
            wrong = next(row for row in rows if not 0 <= row < count)
            raise ValueError(f"expected item indices in 0..{count - 1}, got {wrong}")
        return rows

    def known(self, entries: Sequence[int | str]) -> list[int | str]:
        """The entries without ids (str) that no item has; raises `TypeError` for what is no list."""
        check_ordered("items", entries)
        return [entry for entry in entries if not isinstance(entry, str) or entry in self._index]

    def with_columns(self, columns: Mapping[str, Sequence[str | None]]) -> "ItemCatalogue":
        """A catalogue with columns added or replaced, by which recommendations can be filtered; the rest is shared.

        Args:
            columns: name -> one text or None per item.

        Raises `TypeError` or `ValueError` if a column does not fit, or has a name of the catalogue's own.
        """
        added = {name: _strings(name, values, len(self), optional=True) for name, values in columns.items()}
        for name in added:
            if not isinstance(name, str) or not name or name in _COLUMNS:
                raise ValueError(f"columns: expected other names than {', '.join(_COLUMNS)}, got {name!r}")
        other = object.__new__(ItemCatalogue)
        other.__dict__.update(self.__dict__)
        other.columns = {**self.columns, **added}
        return other

    def rows_where(self, column: str, values: Sequence[str]) -> np.ndarray:
        """The rows with one of the values in a column, `(n,)` int64, rising; `ValueError` without such a column."""
        if column not in self.columns:
            known = ", ".join(self.columns) or "none"
            raise ValueError(f"where: expected a column of the catalogue ({known}), got {column!r}")
        check_ordered(f"where: {column}", values)
        wanted = {*_strings(f"where: {column}", values)}
        return np.array(
            [row for row, value in enumerate(self.columns[column]) if value in wanted], dtype=np.int64
        )

    def with_features(
        self, name: str, features: torch.Tensor, present: torch.Tensor | None = None
    ) -> "ItemCatalogue":
        """A catalogue with one modality added or replaced; the rest is shared.

        Args:
            name: letters, digits, `-` and `_`, since it names a file.
            features: `(I, F)`, any floating dtype; stored as float32. Rows of absent items become zeros.
            present: `(I,)` bool; None: every item has it.
        """
        checked, mask = _checked(name, features, present, self.ids)
        other = object.__new__(ItemCatalogue)
        other.__dict__.update(self.__dict__)
        other.features = {**self.features, name: checked}
        other.present = {**self.present, name: mask}
        return other

    def concat(self, other: "ItemCatalogue") -> "ItemCatalogue":
        """This catalogue's items followed by `other`'s. A modality that one of them lacks is absent for its items.

        Raises `ValueError` for an id in both, or a modality with different numbers of features.
        """
        features, present = {}, {}
        for name in [*self.features, *(name for name in other.features if name not in self.features)]:
            widths = {side.modalities[name] for side in (self, other) if name in side.features}
            if len(widths) > 1:
                raise ValueError(
                    f"modality {name!r} has {self.modalities[name]} features here, but {widths} in other"
                )
            width = widths.pop()
            features[name] = torch.cat([side._features_or_zeros(name, width) for side in (self, other)])
            present[name] = torch.cat([side._present_or_false(name) for side in (self, other)])
        columns = zip(self._columns(), other._columns(), strict=True)
        whole = ItemCatalogue(
            *(first + second for first, second in columns), features=features, present=present
        )
        further = dict.fromkeys([*self.columns, *other.columns])
        return whole.with_columns({name: self._column(name) + other._column(name) for name in further})

    def select(self, rows: Sequence[int]) -> "ItemCatalogue":
        """The items of these rows, in this order; raises `IndexError`, `TypeError` or `ValueError` for invalid rows."""
        rows = torch.tensor(item_array("rows", rows))
        if len(rows) and int(rows.min()) < 0:
            raise ValueError(f"rows must lie in 0..{len(self) - 1}, but hold {int(rows.min())}")
        columns = ([column[row] for row in rows.tolist()] for column in self._columns())
        features = {name: matrix[rows] for name, matrix in self.features.items()}
        part = ItemCatalogue(
            *columns, features=features, present={name: mask[rows] for name, mask in self.present.items()}
        )
        return part.with_columns(
            {name: [column[row] for row in rows.tolist()] for name, column in self.columns.items()}
        )

    def _columns(self) -> tuple[list, list, list, list]:
        return self.ids, self.titles, self.texts, self.images

    def _column(self, name: str) -> list[str | None]:
        return self.columns.get(name, [None] * len(self))

    def _features_or_zeros(self, name: str, width: int) -> torch.Tensor:
        return self.features.get(name, torch.zeros(len(self), width))

    def _present_or_false(self, name: str) -> torch.Tensor:
        return self.present.get(name, torch.zeros(len(self), dtype=torch.bool))

    def save(self, folder: str | Path) -> None:
        """Writes a flat folder, whole or not at all.

        It holds `items.parquet`, one `{modality}.safetensors` per modality, and `manifest.json` with the size
        and the SHA-256 of each.

        An earlier catalogue there is replaced. Raises `SpeederError` if the folder has anything else.
        """
        with atomic_folder(folder, _owned_names(recover_folder(folder))) as temporary:
            self._write_items(temporary / "items.parquet")
            names = ["items.parquet"]
            for name, matrix in self.features.items():
                names.append(f"{name}.safetensors")
                tensors = {"features": matrix.contiguous(), "present": self.present[name].contiguous()}
                save_file(tensors, temporary / names[-1])
            manifest = {
                "format": FORMAT,
                "items": len(self),
                # A list, since the order of the modalities matters and keys are sorted.
                "modalities": [{"name": name, "features": width} for name, width in self.modalities.items()],
                "files": describe_files(temporary, names),
            }
            write_json(temporary / "manifest.json", manifest)

    def _write_items(self, path: Path) -> None:
        """One row group after another: a table of all items would copy every text."""
        import pyarrow as pa  # slow to import, and not needed by a model
        import pyarrow.parquet as pq

        schema = pa.schema([(name, pa.string()) for name in (*_COLUMNS, *self.columns)])
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(0, len(self) or 1, _ROW_GROUP):
                columns = (*self._columns(), *self.columns.values())
                rows = [column[start : start + _ROW_GROUP] for column in columns]
                writer.write_table(pa.table(rows, schema=schema))

    @classmethod
    def load(cls, folder: str | Path, *, verify: bool = True) -> "ItemCatalogue":
        """Reads what `save` wrote; feature matrices stay on disk, memory-mapped, until they are used.

        Sizes are always compared with the manifest; hashes only with `verify`. Raises `SpeederError` if a file is
        missing, truncated or changed.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = recover_folder(folder)
        manifest = read_json(folder / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise SpeederError(f"{folder} holds {manifest.get('format')!r}, and {FORMAT!r} was expected")
        check_files(folder, manifest.get("files"), verify=verify)
        try:
            # not read_table, which goes through pyarrow.dataset and imports pandas wherever it is installed
            with pq.ParquetFile(folder / "items.parquet") as file:
                columns = file.read().to_pydict()
            catalogue = cls(*(columns.pop(name) for name in _COLUMNS)).with_columns(columns)
            for entry in manifest["modalities"]:
                with safe_open(folder / f"{entry['name']}.safetensors", framework="pt") as file:
                    matrix, mask = file.get_tensor("features"), file.get_tensor("present")
                if verify:
                    catalogue = catalogue.with_features(entry["name"], matrix, mask)
                else:  # A full check would read every page of the file.
                    _check_shapes(entry["name"], matrix, mask, len(catalogue))
                    catalogue.features[entry["name"]], catalogue.present[entry["name"]] = matrix, mask
        except (pa.ArrowException, SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise SpeederError(f"{folder} does not hold a readable catalogue: {error}") from error
        expected = {entry["name"]: entry["features"] for entry in manifest["modalities"]}
        if len(catalogue) != manifest.get("items") or catalogue.modalities != expected:
            raise SpeederError(f"{folder} holds {catalogue}, which is not what its manifest says")
        return catalogue


def saved_hash(folder: str | Path) -> str:
    """SHA-256 of a saved catalogue's manifest. It covers the whole catalogue, since the manifest has all files' hashes.

    Raises `SpeederError` if there is no manifest.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise SpeederError(f"{path} is missing")
    return sha256_file(path)


def move_catalogue(source: Path, folder: Path) -> None:
    """Moves a saved catalogue to a folder, replacing another catalogue there; needs no disk space.

    Raises `SpeederError` if the folder has anything else.
    """
    with atomic_folder(folder, _owned_names(recover_folder(folder))) as temporary:
        for file in source.iterdir():
            os.replace(file, temporary / file.name)
    source.rmdir()


def _owned_names(folder: Path) -> set[str]:
    """Names in a folder that an earlier `save` wrote; none if it is not a catalogue."""
    if not (folder / "manifest.json").is_file():
        return set()
    manifest = read_json(folder / "manifest.json")
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("files"), dict):
        return set()
    return {"manifest.json", *manifest["files"]}


def _strings(argument: str, values: Sequence, count: int | None = None, optional: bool = False) -> list:
    if isinstance(values, str):
        raise TypeError(f"{argument} must be a list of strings, but got one string")
    values = list(values)
    if count is not None and len(values) != count:
        raise ValueError(f"{argument} must have one entry an item ({count}), but has {len(values)}")
    for row, value in enumerate(values):
        if not isinstance(value, str) and not (optional and value is None):
            raise TypeError(f"{argument}[{row}] must be a string, but is a {type(value).__name__}")
    return values


def _check_shapes(name: str, features: torch.Tensor, present: torch.Tensor, count: int) -> None:
    if not isinstance(name, str) or not _MODALITY_NAME.fullmatch(name):
        raise ValueError(f"a modality's name must be letters, digits, '-' and '_', but got {name!r}")
    for argument, tensor in (("features", features), ("present", present)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{argument} of {name!r} must be a tensor, but is a {type(tensor).__name__}")
    if features.dim() != 2 or features.shape[0] != count or features.shape[1] == 0:
        shape = tuple(features.shape)
        raise ValueError(
            f"features of {name!r} must be (I, F) with I = {count} and F > 0, but have shape {shape}"
        )
    if not features.dtype.is_floating_point:
        raise TypeError(f"features of {name!r} must be floating point, but are {features.dtype}")
    if tuple(present.shape) != (count,) or present.dtype != torch.bool:
        raise ValueError(
            f"present of {name!r} must be ({count},) bool, but is {tuple(present.shape)} {present.dtype}"
        )


def _checked(
    name: str, features: torch.Tensor, present: torch.Tensor | None, ids: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(I, F)` float32 with zeros where absent and `(I,)` bool, both on the CPU and outside autograd."""
    count = len(ids)
    present = torch.ones(count, dtype=torch.bool) if present is None else present
    _check_shapes(name, features, present, count)
    features, present = features.detach().to("cpu", torch.float32), present.cpu()
    # The sum is not finite if any number is not, and needs no mask in memory; it may also overflow: then look
    # closely.
    if not torch.isfinite(features.sum()) and not torch.isfinite(features).all():
        row = int((~torch.isfinite(features).all(dim=1)).nonzero()[0])
        raise ValueError(
            f"features of {name!r} must be finite, but those of item {ids[row]!r} (row {row}) hold NaN or infinity"
        )
    if bool(present.all()) or not bool(features.any(dim=1)[~present].any()):
        return features, present
    return features.masked_fill(~present[:, None], 0.0), present
