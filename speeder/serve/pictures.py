"""Small pictures of items, made from the files that the catalogue names.

Only pixels leave the server: a file is decoded and written anew, so that a catalogue which names something else than a
picture shows nothing of it.
"""

from __future__ import annotations

import io
import logging
import warnings
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps

from speeder.data.catalogue import ItemCatalogue

log = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP")
SIZE = (320, 480)
MAX_PIXELS = 50_000_000
KEPT = 1024  # pictures in memory, some 20 KB each


class Pictures:
    """Pictures of a catalogue's items.

    Args:
        shown: False serves none, whatever the catalogue names.
    """

    def __init__(self, catalogue: ItemCatalogue, shown: bool = True):
        self._paths = catalogue.images if shown else [None] * len(catalogue)
        self.jpeg = lru_cache(maxsize=KEPT)(self._jpeg)
        self.there = lru_cache(maxsize=1 << 16)(self._there)

    def any(self) -> bool:
        """Whether one of the first items that name a picture has it."""
        named = (row for row, path in enumerate(self._paths) if path)
        return any(self.there(row) for row, _ in zip(named, range(20), strict=False))

    def _there(self, row: int) -> bool:
        path = self._paths[row]
        try:
            return path is not None and Path(path).is_file()
        except (OSError, ValueError):  # a name that no file can have
            return False

    def _jpeg(self, row: int) -> bytes | None:
        """An item's picture as JPEG of at most `SIZE`; None where there is none that can be read."""
        if not self.there(row):
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is stricter
                with Image.open(self._paths[row], formats=FORMATS) as picture:
                    if picture.width * picture.height > MAX_PIXELS:
                        raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
                    picture.draft("RGB", SIZE)
                    small = ImageOps.exif_transpose(picture).convert("RGB")
            small.thumbnail(SIZE)
            out = io.BytesIO()
            small.save(out, "JPEG", quality=84, optimize=True)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            log.warning("%s cannot be shown: %s", self._paths[row], error)
            return None
        return out.getvalue()
