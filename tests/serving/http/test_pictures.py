"""Pictures are made small and anew, and nothing but pictures leaves."""

import io

import pytest
from PIL import Image

from speeder.data.catalogue import ItemCatalogue
from speeder.serving.http.pictures import SIZE, Pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("pictures")

    def saved(name, picture, **options):
        picture.save(tmp_path / name, **options)
        return str(tmp_path / name)

    big = Image.effect_noise((500, 750), 50).convert("RGB")
    told = Image.Exif()
    told[0x010E] = "taken at home"
    clear = Image.new("RGBA", (60, 90), (200, 0, 0, 128))
    secret = tmp_path / "secret.png"
    secret.write_text("root:x:0:0")
    broken = tmp_path / "broken.jpg"
    big.save(broken)
    broken.write_bytes(broken.read_bytes()[:500])
    bomb = Image.new("1", (9000, 9000))
    vector = tmp_path / "vector.svg"
    vector.write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    paths = [
        saved("big.jpg", big, exif=told), saved("clear.png", clear),
        saved("small.webp", clear), str(secret), str(broken), saved("bomb.png", bomb), str(vector), None,
        str(tmp_path / "gone.png"), str(tmp_path), "nul\0byte", saved("list.gif", clear.convert("P")),
    ]  # fmt: skip
    return ItemCatalogue([f"i{n}" for n in range(len(paths))], images=paths)


def test_pictures_become_small_jpegs_without_what_else_their_files_hold(pictures):
    served = Pictures(pictures)
    for row, bounds in ((0, SIZE), (1, (60, 90)), (2, (60, 90))):
        jpeg = served.jpeg(row)
        with Image.open(io.BytesIO(jpeg)) as shown:
            assert shown.format == "JPEG" and shown.mode == "RGB" and not shown.getexif()
            assert shown.width <= bounds[0] and shown.height <= bounds[1]
            assert abs(shown.width / shown.height - 2 / 3) < 0.02
    assert served.any()


def test_what_is_no_picture_is_not_shown(pictures):
    served = Pictures(pictures)
    assert [served.jpeg(row) for row in range(3, 11)] == [None] * 8
    assert served.jpeg(11) is not None  # a GIF, and `prepare` takes its features from it
    assert not any(served.there(row) for row in (7, 8, 9, 10))


def test_none_are_shown_where_none_shall_be(pictures):
    served = Pictures(pictures, shown=False)
    assert not served.any() and not served.there(0) and served.jpeg(0) is None


def test_what_a_camera_held_sideways_is_shown_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (90, 60)).save(tmp_path / "turned.jpg", exif=exif)
    served = Pictures(ItemCatalogue(["i0"], images=[str(tmp_path / "turned.jpg")]))
    with Image.open(io.BytesIO(served.jpeg(0))) as shown:
        assert shown.size == (60, 90) and not shown.getexif()


def test_damaged_exif_data_end_nothing(tmp_path, damaged_exif):
    Image.new("RGB", (20, 30), "red").save(tmp_path / "x.jpg", exif=damaged_exif)
    served = Pictures(ItemCatalogue(["i0"], images=[str(tmp_path / "x.jpg")]))
    with Image.open(io.BytesIO(served.jpeg(0))) as shown:
        assert shown.size == (30, 20)  # how it is turned could still be read
