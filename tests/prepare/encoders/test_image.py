"""Image encoders: decoding, EfficientNet against its published code, broken files."""

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from speeder.errors import SpeederError
from speeder.prepare.encoders.efficientnet_lite import EfficientNetLite0
from speeder.prepare.encoders.image import ImageEncoder, efficientnet_pixels
from tests.pictures import encoded, noise


@pytest.fixture(scope="module")
def encoder(efficientnet_folder: Path) -> ImageEncoder:
    return ImageEncoder(str(efficientnet_folder))


def test_the_network_gives_the_numbers_of_its_published_implementation(efficientnet_folder: Path) -> None:
    """Logits of a made-up picture, as the code that the weights were released with computes them."""
    model = EfficientNetLite0.load(efficientnet_folder)
    pixels = torch.sin(torch.arange(3 * 224 * 224, dtype=torch.float32).reshape(1, 3, 224, 224) * 0.001) * 0.9
    with torch.no_grad():
        best = model(pixels).topk(5)
    assert best.indices.tolist() == [[905, 753, 811, 807, 754]]
    expected = torch.tensor([[7.7259, 7.0114, 6.5834, 6.2286, 6.1998]])
    torch.testing.assert_close(best.values, expected, atol=2e-3, rtol=0)


def test_odd_sizes_are_padded_as_tensorflow_does(efficientnet_folder: Path) -> None:
    """SAME padding: the output has ceil(size / stride) places, and an odd remainder lies right and below."""
    stem = EfficientNetLite0.load(efficientnet_folder).stem[0]
    pixels = torch.randn(1, 3, 9, 12)
    with torch.no_grad():
        output = stem(pixels)
        padded = torch.nn.functional.pad(pixels, (0, 1, 1, 1))  # 12 wide: 1 to the right; 9 high: 1 and 1
        expected = torch.nn.functional.conv2d(padded, stem.weight, stride=2)
    assert output.shape[2:] == (5, 6)
    torch.testing.assert_close(output, expected)


def test_pixels_are_normalised_and_the_centre_is_kept() -> None:
    picture = Image.new("RGB", (100, 300), (127, 255, 0))
    pixels = efficientnet_pixels(picture)
    assert pixels.shape == (3, 224, 224)
    assert pixels[:, 100, 100].tolist() == pytest.approx([0.0, 1.0, -127 / 128])
    ImageDraw.Draw(picture).rectangle((0, 0, 100, 90), fill="white")  # above the central square
    assert torch.equal(efficientnet_pixels(picture), pixels)


def test_missing_and_broken_pictures_are_absent_and_named(encoder: ImageEncoder, tmp_path: Path) -> None:
    paths = {name: str(tmp_path / name) for name in ("good.png", "cut.jpg", "copy.jpg", "none.png")}
    noise().save(paths["good.png"])
    cut = encoded(noise(), "JPEG")
    for name in ("cut.jpg", "copy.jpg"):
        Path(paths[name]).write_bytes(cut[: len(cut) // 2])
    images = [paths["good.png"], None, paths["cut.jpg"], paths["copy.jpg"], paths["none.png"]]
    for _ in range(2):  # the second time from the cache
        features, present, broken = encoder.encode(images, cache=tmp_path / "cache", progress=False)
        assert present.tolist() == [True, False, False, False, False]
        assert features.shape == (5, 1280) and features[0].any() and not features[1:].any()
        assert set(broken) == {paths["cut.jpg"], paths["copy.jpg"], paths["none.png"]}
        assert "truncated" in broken[paths["cut.jpg"]] and broken[paths["none.png"]].startswith(
            "No such file"
        )


def test_features_do_not_depend_on_the_batch_and_tell_pictures_apart(
    encoder: ImageEncoder, tmp_path: Path
) -> None:
    paths = []
    for number, (colour, x) in enumerate(
        [("red", 20), ("red", 40), ("blue", 20), ("blue", 40), ("green", 30)]
    ):
        picture = Image.new("RGB", (96, 96), "white")
        ImageDraw.Draw(picture).ellipse((x, 20, x + 40, 60), fill=colour)
        paths.append(str(tmp_path / f"{number}.png"))
        picture.save(paths[-1])
    together, _, _ = encoder.encode(paths, cache=tmp_path / "together", progress=False)
    alone = [
        encoder.encode([path], cache=tmp_path / f"{n}", progress=False)[0] for n, path in enumerate(paths)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-3, rtol=1e-3)
    near = torch.nn.functional.normalize(together, dim=1) @ torch.nn.functional.normalize(together, dim=1).T
    assert near[0, 1] > max(near[0, 2], near[0, 3]) and near[2, 3] > max(near[2, 0], near[2, 1])


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpeederError, match=r"image encoder '.*nowhere' cannot be loaded") as caught:
        ImageEncoder(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)
