"""Paths that a folder's own files record: found again after the folder was moved, with what they name or without."""

from __future__ import annotations

import os
from pathlib import Path


def path_from(folder: str | Path, target: str | Path) -> str:
    """The way from a folder to another, to be recorded beside the absolute path."""
    return os.path.relpath(Path(target).resolve(), Path(folder).resolve())


def find_recorded(folder: str | Path, absolute: str, way: str | None) -> Path:
    """The folder that a file in `folder` names.

    What lies inside `folder` is found there, wherever that now is. Anything else is at its absolute path, or else at
    the end of the recorded way, if both were moved together. The caller must check that the content is the right one.

    Args:
        absolute: the path of that time.
        way: as from `path_from`; None, as in files of version 0.1.0: a folder of the same name beside `folder`.

    Returns:
        the folder found, else the absolute path.
    """
    way = way or os.path.join(os.pardir, Path(absolute).name)
    near = Path(os.path.normpath(Path(folder).resolve() / way))
    inside = not way.startswith(os.pardir)
    first, second = (near, Path(absolute)) if inside else (Path(absolute), near)
    return next((place for place in (first, second) if place.exists()), Path(absolute))
