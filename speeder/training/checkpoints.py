"""Checkpoints: marked when complete, checked before they are read, and never read as code."""

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
    """Mark a checkpoint as complete, after all its files are written."""
    with writing(folder):
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        write_json(folder / COMPLETE, sizes)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; it counts as incomplete from its first removed file on."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def last_checkpoint(folder: Path, steps: int | None = None) -> Path | None:
    """The newest complete checkpoint of a stage's folder; incomplete ones are removed.

    Args:
        steps: steps of the stage. A checkpoint of the last step, from a run that was killed before the stage's end, is
            removed too: `Trainer` would make one step too many from it. From the one before, it makes the same last
            steps.

    Raises:
        SpeederError: it was complete, and has since lost a file or a part of one.
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
                problem = "is missing" if found is None else f"has {found} bytes, and had {size}"
                raise SpeederError(f"{newest / name} {problem}; {_REMEDY}")
    return newest


_REMEDY = "remove this checkpoint's folder to go on from the one before, or from the stage's start"


@contextmanager
def reading(folder: str | Path | None) -> Iterator[None]:
    """Turns what is raised on damaged checkpoint files, or on files with code, into one `SpeederError`."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise SpeederError(
            f"{folder}: a file holds something other than tensors, and is not read; {_REMEDY}"
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
