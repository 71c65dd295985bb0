"""Picture files of any kind that Pillow opens: which they are, their pixels, and small ones for display."""

from __future__ import annotations

import io
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

MAX_PIXELS = 50_000_000

# Pillow names these too, but they hold no pixels that it could decode by itself (EPS runs Ghostscript).
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_FIRST = (".jpg", ".jpeg", ".png", ".webp")  # the usual endings come first where an item has several files
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@cache
def formats() -> tuple[str, ...]:
    """The formats of picture files that are read, as Pillow names them."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NOT_DECODED)


@cache
def endings() -> tuple[str, ...]:
    """The endings of picture files that are read, in lower case, the usual ones first."""
    known = {ending for ending, name in Image.registered_extensions().items() if name in formats()}
    return (*_FIRST, *sorted(known - set(_FIRST)))


def read_rgb(
    source: bytes | str | Path, *, max_pixels: int | None = None, about: tuple[int, int] | None = None
) -> Image.Image:
    """A picture as RGB of 8 bits: upright, transparency on white, greater depths scaled.

    16 bits are scaled from 0..65535. 32-bit integers count as 8 or 16 bits if they all fit; floats as 0..1 if
    they all fit. Any other values are stretched, the lowest to black and the highest to white. Damaged EXIF data, which
    only say how to turn the picture, are ignored.

    Args:
        source: the file's bytes, or its path.
        max_pixels: the most pixels that are decoded; None: Pillow's own limit.
        about: a size from which the caller will go on to a smaller one; it may save work.

    Raises:
        OSError: the file cannot be opened. ValueError: it is no complete picture, or has too many pixels.
    """
    with (
        io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file,
        warnings.catch_warnings(),
    ):
        # of sizes that max_pixels refuses, and of damaged EXIF data
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=formats()) as picture:
                if max_pixels is not None and picture.width * picture.height > max_pixels:
                    raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
                if about is not None:
                    picture.draft("RGB", about)
                picture.load()
                return _rgb(_turned(_eight_bits(picture), _orientation(picture)))
        except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(reason.partition(" <")[0]) from error


def small_jpeg(path: str | Path, size: tuple[int, int], quality: int) -> bytes:
    """A file's picture as JPEG, upright, of at most `size` pixels (width, height).

    The file is decoded and encoded again, so nothing but pixels is shown, whatever the file is.

    Args:
        quality: of the JPEG, 1 to 95.

    Raises:
        OSError, ValueError: the file cannot be read as a picture, or has more than `MAX_PIXELS`.
    """
    small = read_rgb(path, max_pixels=MAX_PIXELS, about=size)
    small.thumbnail(size)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=quality, optimize=True)
    return out.getvalue()


def _orientation(picture: Image.Image) -> int | None:
    try:
        return picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # any bytes can be there; the pixels are sound all the same
        return None


def _turned(picture: Image.Image, orientation: object) -> Image.Image:
    turn = _TURN.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of another depth, which Pillow would cut off at 255, as 8 bits; any other picture as it is."""
    if picture.mode != "F" and not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture)
    if picture.mode == "I" and _is_unsigned(picture):
        values = values.view(np.uint32)
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    ranges = [1.0] if picture.mode == "F" else [255.0, 65535.0]
    if picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM"):  # their values are of 16 bits
        ranges = [65535.0] if picture.mode != "F" else ranges
    white = next((white for white in ranges if low >= 0 and high <= white), None)
    black, white = (0.0, white) if white is not None else (low, high)
    values = np.nan_to_num(values, nan=black, posinf=white, neginf=black)
    scaled = (values.clip(black, white) - black) * (255.0 / (white - black or 1.0))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _is_unsigned(picture: Image.Image) -> bool:
    """Whether the integers are a TIFF's unsigned 32 bits, which Pillow reads as signed ones."""
    tags = getattr(picture, "tag_v2", {})
    return tags.get(258) == (32,) and tags.get(339, (1,)) == (1,)
