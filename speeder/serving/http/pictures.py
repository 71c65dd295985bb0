"""Small pictures of items, made from the files that the catalogue names; only pixels leave the server."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

from speeder.data.catalogue import ItemCatalogue
from speeder.io.pictures import small_jpeg

log = logging.getLogger(__name__)

SIZE = (320, 480)
QUALITY = 84
KEPT = 1024  # pictures in memory, some 20 KB each


class Pictures:
    """Pictures of a catalogue's items.

    Args:
        shown: whether to serve any.
    """

    def __init__(self, catalogue: ItemCatalogue, shown: bool = True):
        self._paths = catalogue.images if shown else [None] * len(catalogue)
        self.jpeg = lru_cache(maxsize=KEPT)(self._jpeg)
        self.there = lru_cache(maxsize=1 << 16)(self._there)

    def any(self) -> bool:
        """Whether one of the first 20 items that name a picture has it."""
        named = (row for row, path in enumerate(self._paths) if path)
        return any(self.there(row) for row, _ in zip(named, range(20), strict=False))

    def _there(self, row: int) -> bool:
        path = self._paths[row]
        try:
            return path is not None and Path(path).is_file()
        except (OSError, ValueError):  # an impossible file name
            return False

    def _jpeg(self, row: int) -> bytes | None:
        """An item's picture as JPEG of at most `SIZE`; None if there is no readable one."""
        if not self.there(row):
            return None
        try:
            return small_jpeg(self._paths[row], SIZE, QUALITY)
        except (OSError, ValueError) as error:
            log.warning("%s cannot be shown: %s", self._paths[row], error)
            return None
