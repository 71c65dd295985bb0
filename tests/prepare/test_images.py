"""`prepare --images`: pictures by item id or by name, what is missing is said, and nothing at all is an error."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from speeder.cli.main import main
from speeder.data import PreparedData
from tests.prepare.encoders.tiny import save_clip


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Four items, a folder `pictures` that is still empty, and a tiny encoder."""
    monkeypatch.setenv("SPEEDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_clip(tmp_path / "clip")
    Path("raw").mkdir()
    Path("pictures").mkdir()
    rows = "".join(f"u{n % 2},i{n},{n}\n" for n in range(4))
    Path("raw/interactions.csv").write_text(f"user,item,timestamp\n{rows}")
    without = ["--without", "text", "collaborative", "--image-encoder", "clip"]
    return ["prepare", "plain", "raw", "--out", "out", "--images", "pictures", *without]


def test_other_endings_and_depths_become_features(command: list[str], capfd: pytest.CaptureFixture) -> None:
    ramp = np.linspace(0, 1, 4096).reshape(64, 64)
    Image.fromarray((ramp * 255).astype(np.uint8)).save("pictures/i0.PNG")
    Image.fromarray((ramp * 65535).astype(np.uint16)).save("pictures/i1.png")
    Image.fromarray(ramp.astype(np.float32)).save("pictures/i2.tif")
    assert main(command) == 0
    catalogue = PreparedData.load("out").catalogue
    assert catalogue.present["image"].tolist() == [True, True, True, False]
    first, *others = catalogue.features["image"][:3].numpy()
    for other in others:  # the same picture, but for rounding
        assert np.abs(other - first).max() < 0.02 * np.abs(first).max()
    told = capfd.readouterr()
    assert "image (3 of 4 items)" in told.out


def test_what_is_missing_is_counted(command: list[str], caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (9, 9)).save("pictures/i1.BMP")
    Image.new("RGB", (9, 9)).save("pictures/other.jpg")
    assert main(command) == 0
    assert "3 of 4 items have no picture in pictures, the first: 'i0'" in caplog.text


@pytest.mark.parametrize("items", [None, "item,title,image\ni0,A,a.jpg\n", "item,title\ni0,A\n"])
def test_nothing_that_matches_is_an_error(
    command: list[str], items: str | None, capsys: pytest.CaptureFixture
) -> None:
    if items:
        Path("raw/items.csv").write_text(items)
    Path("pictures/i0.heic").write_bytes(b"x")
    assert main(command) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    expected = (
        "the files that the items name, such as 'a.jpg'" if items and "image" in items else "such as 'i0.jpg'"
    )
    assert "pictures: no picture matches an item: looked for" in line and expected in line
    assert "it holds such as 'i0.heic'" in line and not Path("out").exists()


def test_no_title_that_matches_is_an_error(command: list[str], capsys: pytest.CaptureFixture) -> None:
    Path("raw/items.csv").write_text("item,title\ni0,Heat (1995)\n")
    Path("pictures/items.jsonl").write_text('{"title": "Alien (1979)", "plot": "In space."}\n')
    assert main(command) == 1
    assert "looked for the items' titles in items.jsonl, such as 'Heat (1995)'" in capsys.readouterr().err


def test_no_picture_that_can_be_read_is_an_error(command: list[str], capsys: pytest.CaptureFixture) -> None:
    Path("pictures/i0.jpg").write_bytes(b"no picture")
    Path("pictures/i1.jpg").write_bytes(b"")
    assert main(command) == 1
    message = "none of 2 pictures can be read (the first is pictures/i0.jpg: cannot identify image file)"
    assert message in capsys.readouterr().err


def test_ids_of_any_length_and_characters(command: list[str]) -> None:
    long, odd = "猫" * 90, "a/b:c?*|é"
    rows = f"u,{long},1\nu,{odd},2\nu,../secret,3\nu,ok,4\n"
    Path("raw/interactions.csv").write_text(f"user,item,timestamp\n{rows}")
    for name in ("pictures/ok.jpg", "secret.jpg"):
        Image.new("RGB", (9, 9)).save(name)
    assert main(command) == 0
    catalogue = PreparedData.load("out").catalogue
    present = dict(zip(catalogue.ids, catalogue.present["image"].tolist(), strict=True))
    assert present == {long: False, odd: False, "../secret": False, "ok": True}
