"""Small pictures of items for display, encoded again from their pixels."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from PIL import Image, ImageOps

MAX_PIXELS = 50_000_000


def small_jpeg(path: str | Path, size: tuple[int, int], quality: int, formats: tuple[str, ...]) -> bytes:
    """A file's picture as JPEG, upright, of at most `size` pixels (width, height).

    The file is decoded and encoded again, so nothing but pixels is shown, whatever the file is.

    Args:
        quality: of the JPEG, 1 to 95.
        formats: allowed formats of the file, as Pillow names them.

    Raises:
        OSError, ValueError: the file cannot be read as such a picture, or has more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is stricter
            with Image.open(path, formats=formats) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
                picture.draft("RGB", size)
                small = ImageOps.exif_transpose(picture).convert("RGB")
        small.thumbnail(size)
        out = io.BytesIO()
        small.save(out, "JPEG", quality=quality, optimize=True)
    except (SyntaxError, Image.DecompressionBombError) as error:  # as Pillow calls some damages
        raise ValueError(str(error) or type(error).__name__) from error
    return out.getvalue()
