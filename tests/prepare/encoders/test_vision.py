"""Hugging Face vision models as image encoders: each family's own picture embedding, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from speeder.errors import SpeederError
from speeder.prepare.encoders.image import ImageEncoder
from tests.prepare.encoders.tiny import SIZES, TEXT_TOWER, VISION_TOWER, write

SQUARE = {"height": 32, "width": 32}


def clip() -> PreTrainedModel:
    return CLIPModel(CLIPConfig(text_config=TEXT_TOWER, vision_config=VISION_TOWER, projection_dim=12))


def clip_tower() -> PreTrainedModel:
    model = clip()
    model.config.vision_config.projection_dim = 12
    tower = CLIPVisionModelWithProjection(model.config.vision_config)
    tower.load_state_dict(model.state_dict(), strict=False)
    return tower


def siglip() -> PreTrainedModel:
    text = {**TEXT_TOWER, "projection_size": 16}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=VISION_TOWER))


def siglip2() -> PreTrainedModel:
    vision = {**SIZES, "patch_size": 16, "num_patches": 9}
    return Siglip2Model(
        Siglip2Config(text_config={**TEXT_TOWER, "projection_size": 16}, vision_config=vision)
    )


def dinov2() -> PreTrainedModel:
    return Dinov2Model(Dinov2Config(**VISION_TOWER, mlp_ratio=2))


def dinov3() -> PreTrainedModel:
    return DINOv3ViTModel(DINOv3ViTConfig(**VISION_TOWER, num_register_tokens=2))


def vit() -> PreTrainedModel:
    return ViTModel(ViTConfig(**VISION_TOWER))


def vit_classifier() -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig(**VISION_TOWER))


def convnext() -> PreTrainedModel:
    return ConvNextModel(ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=32))


# what each family gives for a picture, as its own model computes it from the processor's output
FAMILIES: dict[str, tuple[Callable, object, Callable]] = {
    "clip": (
        clip,
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE),
        lambda model, batch: model.visual_projection(model.vision_model(**batch).pooler_output),
    ),
    "clip-tower": (
        clip_tower,
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE),
        lambda model, batch: model(**batch).image_embeds,
    ),
    "siglip": (
        siglip,
        SiglipImageProcessorPil(size=SQUARE),
        lambda model, batch: model.vision_model.head(model.vision_model(**batch).last_hidden_state),
    ),
    "siglip2": (  # patches of a picture's own shape, as many as fit
        siglip2,
        Siglip2ImageProcessorPil(patch_size=16, max_num_patches=9),
        lambda model, batch: model.get_image_features(**batch).pooler_output,
    ),
    "dinov2": (
        dinov2,
        BitImageProcessorPil(size={"shortest_edge": 40}, crop_size=SQUARE),
        lambda model, batch: model.layernorm(
            model.encoder(model.embeddings(batch["pixel_values"])).last_hidden_state
        )[:, 0],
    ),
    "dinov3": (  # whose own processor needs torchvision
        dinov3,
        ViTImageProcessorPil(size=SQUARE),
        lambda model, batch: model(**batch).last_hidden_state[:, 0],
    ),
    "vit": (vit, ViTImageProcessorPil(size=SQUARE), lambda model, batch: model(**batch).pooler_output),
    "vit-classifier": (  # which comes without a pooler: transformers would draw one at random
        vit_classifier,
        ViTImageProcessorPil(size=SQUARE),
        lambda model, batch: model.vit(**batch).last_hidden_state[:, 0],
    ),
    "convnext": (
        convnext,
        ViTImageProcessorPil(size=SQUARE),
        lambda model, batch: model.layernorm(model(**batch).last_hidden_state.mean(dim=(2, 3))),
    ),
}


def save(folder: Path, family: str) -> PreTrainedModel:
    make, processor, _ = FAMILIES[family]
    model = make().eval()
    for weight in model.parameters():
        weight.data.normal_(std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Two pictures of different shapes, one that is cut off, and none at all."""
    paths = [tmp_path / name for name in ("wide.png", "cut.png", "high.png")]
    for path, size in zip(paths, [(96, 40), (60, 60), (50, 70)], strict=True):
        Image.effect_noise(size, 90).convert("RGB").save(path)
    paths[1].write_bytes(paths[1].read_bytes()[:900])
    return [str(path) for path in paths]


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_familys_own_picture_embedding(
    family: str, pictures: list[str], tmp_path: Path
) -> None:
    model = save(tmp_path / "model", family)
    encoder = ImageEncoder(str(tmp_path / "model"))
    images = [pictures[0], None, *pictures[1:]]
    features, present, broken = encoder.encode(images, cache=tmp_path / "cache", progress=False)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")
    rows = [0, 3]
    batch = processor(images=[Image.open(images[row]) for row in rows], return_tensors="pt")
    with torch.no_grad():
        expected = FAMILIES[family][2](model, batch)
    assert encoder.width == expected.shape[1] and present.tolist() == [True, False, False, True]
    torch.testing.assert_close(features[rows], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    assert set(broken) == {pictures[1]} and not features[1:3].any()


def test_a_text_tower_is_neither_loaded_nor_part_of_the_key(tmp_path: Path) -> None:
    save(tmp_path, "clip")
    encoder = ImageEncoder(str(tmp_path))
    assert not any("text" in name for name in encoder._model.state_dict())
    weights = load_file(tmp_path / "model.safetensors")
    weights["text_projection.weight"] += 1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert ImageEncoder(str(tmp_path)).identity == encoder.identity


@pytest.mark.parametrize("family", ["clip", "vit-classifier"])
def test_whatever_changes_the_features_changes_the_key(family: str, tmp_path: Path) -> None:
    save(tmp_path / "model", family)
    first = ImageEncoder(str(tmp_path / "model")).identity
    shutil.copytree(tmp_path / "model", tmp_path / "elsewhere")
    assert ImageEncoder(str(tmp_path / "elsewhere")).identity == first
    seen = {first}

    def check(what: str) -> None:
        now = ImageEncoder(str(tmp_path / "model")).identity
        assert now not in seen, f"{what} left the key as it was"
        seen.add(now)

    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name in sorted(weights) if "vi" in name and name.endswith("bias"))
    weights[name][3] += 1e-3
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    check("a weight")
    for file, key, value in (
        ("preprocessor_config.json", "image_mean", [0.1, 0.2, 0.3]),
        ("config.json", "layer_norm_eps", 0.1),
    ):
        settings = json.loads((tmp_path / "model" / file).read_text())
        settings.get("vision_config", settings)[key] = value
        write(tmp_path / "model" / file, settings)
        check(key)


@pytest.mark.exact
def test_an_interrupted_encoding_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model", "clip")
    paths = [str(tmp_path / f"{number}.png") for number in range(5)]
    for number, path in enumerate(paths):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(path)
    encoder = ImageEncoder(str(tmp_path / "model"), batch_size=2)
    expected, _, _ = encoder.encode(paths, cache=tmp_path / "whole", progress=False)
    compute, batches = encoder._compute, []

    def counted(pictures: list[Image.Image]) -> list[torch.Tensor]:
        if len(batches) == 1:
            raise KeyboardInterrupt
        batches.append(len(pictures))
        return compute(pictures)

    monkeypatch.setattr(encoder, "_compute", counted)
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(paths, cache=tmp_path / "cache", progress=False)
    assert batches == [2]
    again = ImageEncoder(str(tmp_path / "model"), batch_size=2)
    compute, rest = again._compute, []
    monkeypatch.setattr(again, "_compute", lambda pictures: rest.append(len(pictures)) or compute(pictures))
    features, present, _ = again.encode(paths, cache=tmp_path / "cache", progress=False)
    assert rest == [2, 1] and present.all() and torch.equal(features, expected)


def masked_at_random(folder: Path) -> None:
    ViTMAEModel(ViTMAEConfig(**{**VISION_TOWER, "patch_size": 4})).save_pretrained(folder)
    ViTImageProcessorPil(size=SQUARE).save_pretrained(folder)


def of_texts(folder: Path) -> None:
    BertModel(BertConfig(**SIZES, vocab_size=8)).save_pretrained(folder)
    ViTImageProcessorPil(size=SQUARE).save_pretrained(folder)


def without_processor(folder: Path) -> None:
    save(folder, "vit")
    (folder / "preprocessor_config.json").unlink()


def only_pickled(folder: Path) -> None:
    save(folder, "vit")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (masked_at_random, "returns other vectors each time"),
        (of_texts, ""),
        (without_processor, "preprocessor_config.json"),
        (only_pickled, "no file named model.safetensors"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(spoil: Callable, message: str, tmp_path: Path) -> None:
    spoil(tmp_path)
    with pytest.raises(SpeederError, match=r"image encoder '.*' cannot be loaded: \w") as caught:
        ImageEncoder(str(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)
