"""Pictures of any kind and depth become 8-bit RGB; whatever a file holds, it is read or refused, never a traceback."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from speeder.io.pictures import endings, formats, read_rgb, small_jpeg
from tests.pictures import encoded, noise

RAMP = np.linspace(0, 1, 48 * 64).reshape(48, 64)


def grey(values: np.ndarray, kind: str, **options: object) -> bytes:
    return encoded(Image.fromarray(values), kind, **options)


def unsigned_tiff(values: np.ndarray) -> bytes:
    """A TIFF of unsigned 32 bits, which Pillow reads and cannot write: a signed one, called unsigned."""
    signed, unsigned = (struct.pack("<HHIHH", 339, 3, 1, form, 0) for form in (2, 1))
    content = grey(values.astype(np.uint32).view(np.int32), "TIFF")
    assert content.count(signed) == 1
    return content.replace(signed, unsigned)


@pytest.mark.parametrize(
    "content",
    [
        grey((RAMP * 65535).astype(np.uint16), "PNG"),
        grey((RAMP * 65535).astype(np.uint16), "TIFF"),
        grey((RAMP * 65535).astype(np.uint16), "PPM"),
        grey((RAMP * 65535).astype(">u2"), "TIFF"),
        grey((RAMP * (2**31 - 1)).astype(np.int32), "TIFF"),
        grey(((RAMP - 0.5) * 2e6).astype(np.int32), "TIFF"),
        grey(np.rint(RAMP * 255).astype(np.int32), "TIFF"),
        unsigned_tiff(RAMP * (2**32 - 1)),
        grey(RAMP.astype(np.float32), "TIFF"),
        grey((RAMP * 255).astype(np.float32), "TIFF"),
        grey((RAMP * 300 - 40).astype(np.float32), "TIFF"),
        grey(RAMP.astype(np.float32), "PPM"),
    ],
    ids=["png16", "tiff16", "pgm16", "tiff16-big-endian", "tiff32", "tiff32-negative", "tiff32-of-bytes",
         "tiff32-unsigned", "float", "float-of-bytes", "float-any", "pfm"],
)  # fmt: skip
def test_other_depths_are_scaled(content: bytes) -> None:
    picture = read_rgb(content)
    assert (picture.mode, picture.size) == ("RGB", (64, 48))
    values = np.asarray(picture).astype(float)
    assert np.abs(values - RAMP[:, :, None] * 255).max() <= 1


def test_a_dark_picture_of_16_bits_stays_dark() -> None:
    for kind in ("PNG", "PPM", "TIFF"):
        assert read_rgb(grey(np.full((4, 4), 250, np.uint16), kind)).getpixel((1, 1)) == (1, 1, 1)


def test_not_a_number_does_not_spoil_a_picture() -> None:
    values = RAMP.astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    found = np.asarray(read_rgb(grey(values, "TIFF")))[:, :, 0]
    assert found[0, :3].tolist() == [0, 255, 0] and found[-1, -1] == 255
    assert not np.asarray(read_rgb(grey(np.full((3, 3), np.nan, np.float32), "TIFF"))).any()


def test_every_usual_kind_of_picture_is_read() -> None:
    red = Image.new("RGB", (20, 30), (255, 0, 0))
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        picture = read_rgb(encoded(red, kind))
        assert (picture.mode, picture.size) == ("RGB", (20, 30))
        pixel = picture.getpixel((10, 10))
        assert pixel[0] > 250 and max(pixel[1:]) < 5
    for mode in ("L", "P", "LA", "1", "I;16"):
        assert read_rgb(encoded(Image.new(mode, (4, 5)), "PNG")).mode == "RGB"
    for mode, white in (("1", 1), ("L", 255), ("LA", (255, 255)), ("CMYK", (0, 0, 0, 0))):
        kind = "JPEG" if mode == "CMYK" else "PNG"
        assert read_rgb(encoded(Image.new(mode, (4, 5), white), kind)).getpixel((1, 1)) == (255, 255, 255)
    assert read_rgb(encoded(red.convert("P"), "PNG")).getpixel((1, 1)) == (255, 0, 0)
    clear = Image.new("RGBA", (4, 5), (0, 0, 0, 0))
    assert read_rgb(encoded(clear, "PNG")).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_data_say(orientation: int) -> None:
    corners = Image.new("RGB", (32, 48), "white")
    corners.paste((255, 0, 0), (0, 0, 16, 16))
    told = Image.Exif()
    told[0x0112] = orientation
    picture = read_rgb(encoded(corners, "PNG", exif=told))
    assert picture.size == ((32, 48) if orientation < 5 else (48, 32))
    width, height = picture.size
    # where the stored picture's first corner is shown, by the standard
    right, below = [(0, 0), (1, 0), (1, 1), (0, 1), (0, 0), (1, 0), (1, 1), (0, 1)][orientation - 1]
    assert picture.getpixel((right * (width - 1), below * (height - 1))) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_half_a_picture_is_refused(kind: str) -> None:
    content = encoded(noise(), kind)
    for damaged in (content[: len(content) // 2], content[:20], b"", b"<html>not found</html>"):
        with pytest.raises(ValueError, match=r"\w") as caught:
            read_rgb(damaged)
        assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_programs_are_not_run_and_common_endings_are_known() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jfif", ".avif"} <= {
        *endings()
    }
    assert "EPS" not in formats() and ".eps" not in endings() and ".pdf" not in endings()
    with pytest.raises(ValueError, match="cannot identify"):
        read_rgb(encoded(noise(), "EPS"))


# a sound block of EXIF data with some of each of its kinds of fields
EXIF = Image.Exif()
EXIF.update({0x0112: 6, 0x010E: "taken at home", 0x011A: 72.0, 0x9003: "2020:01:01 00:00:00"})
EXIF.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
EXIF.get_ifd(0x8769)[0x9000] = b"0230"
SOUND_EXIF = EXIF.tobytes()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_exif_data_never_cost_the_picture(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    """Bytes of the EXIF data are changed; the pixels are sound, so the picture is read, by both of its readers."""
    damaged = bytearray(SOUND_EXIF)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(6, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(6, len(damaged)))])
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    red = Image.new("RGB", (20, 30), (255, 0, 0))
    content = encoded(red, kind, exif=damaged)
    picture = read_rgb(content)
    assert sorted(picture.size) == [20, 30] and picture.getpixel((9, 9))[0] > 250
    path = Path(tmp_path_factory.getbasetemp(), "damaged")
    path.write_bytes(content)
    with Image.open(io.BytesIO(small_jpeg(path, (64, 64), 80))) as small:
        assert sorted(small.size) == [20, 30]


SOUND = [
    encoded(noise((24, 32)), kind)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "TGA", "PCX")
]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_bytes_are_a_picture_or_a_value_error(data) -> None:
    content = bytearray(data.draw(st.sampled_from(SOUND)))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        picture = read_rgb(content, max_pixels=1 << 20)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert picture.mode == "RGB" and picture.width * picture.height <= 1 << 20
