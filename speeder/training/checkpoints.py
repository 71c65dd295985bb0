"""Checkpoints that count: marked when whole, looked at before they are read, and never read as code."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from speeder.errors import SpeederError
from speeder.io.disk_full import writing
from speeder.io.files import read_json, write_json

COMPLETE = "COMPLETE"  # written last: the sizes of a checkpoint's files, by their names


def mark_whole(folder: Path) -> None:
    """Mark a checkpoint all of whose files are written."""
    with writing(folder):
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        write_json(folder / COMPLETE, sizes)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, which no longer counts as whole from the first file on that goes."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def last_checkpoint(folder: Path, steps: int | None = None) -> Path | None:
    """The newest whole checkpoint of a stage's folder; what kills left half-written is removed.

    Args:
        steps: of the stage. A checkpoint of the last one, after which a kill came before the stage's end, is removed
            too: `Trainer` would make one step more from it, and makes the same last steps again from the one before.

    Raises:
        SpeederError: it was whole, and has lost a file or a part of one since.
    """
    found_at = {}
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            found_at[int(path.name.rsplit("-", 1)[1])] = path
        else:
            shutil.rmtree(path)
    if steps is not None and steps in found_at:
        remove_checkpoint(found_at.pop(steps))
    if not found_at:
        return None
    newest = found_at[max(found_at)]
    if (newest / COMPLETE).stat().st_size:  # earlier versions wrote no sizes
        for name, size in read_json(newest / COMPLETE).items():
            found = (newest / name).stat().st_size if (newest / name).is_file() else None
            if found != size:
                told = "is missing" if found is None else f"has {found} bytes, and had {size}"
                raise SpeederError(f"{newest / name} {told}; {_REMEDY}")
    return newest


_REMEDY = "remove this checkpoint's folder to go on from the one before, or from the stage's start"


@contextmanager
def reading(folder: str | Path | None) -> Iterator[None]:
    """Makes one `SpeederError` of what is raised on files of a checkpoint that are damaged, or hold code."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise SpeederError(
            f"{folder}: a file holds something else than tensors, and is not read; {_REMEDY}"
        ) from error
    except (
        OSError,
        EOFError,
        RuntimeError,
        KeyError,
        ValueError,
        json.JSONDecodeError,
        SafetensorError,
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SpeederError(f"{folder}: cannot be read: {reason}; {_REMEDY}") from error
