"""A backbone's own words as a text encoder."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import AutoTokenizer

from speeder.errors import SpeederError
from speeder.prepare.encoders.text import TextEncoder
from tests.model.worlds import save_tiny_backbone, tiny_backbone


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # gemma3 scales its embeddings as it looks them up
def test_a_row_is_the_mean_of_the_words_of_its_text(tmp_path: Path, family: str) -> None:
    save_tiny_backbone(tmp_path / "backbone", family)
    encoder = TextEncoder(f"backbone:{tmp_path / 'backbone'}")
    texts = ["w3 w5 w5", " ", "w9", "w5 w3 w5"]
    features, present = encoder.encode(texts, cache=tmp_path / "cache", progress=False)
    words = tiny_backbone(family).get_input_embeddings()
    with torch.no_grad():
        expected = normalize(
            torch.stack([words(torch.tensor(ids)).mean(dim=0) for ids in ([3, 5, 5], [9])]), dim=1
        )
    assert present.tolist() == [True, False, True, True] and encoder.width == 32
    torch.testing.assert_close(features[[0, 2]], expected)
    torch.testing.assert_close(features[3], features[0])  # order does not matter
    assert not features[1].any()


def test_the_key_is_of_the_words_alone(tmp_path: Path) -> None:
    folder = save_tiny_backbone(tmp_path) or tmp_path
    before = TextEncoder(f"backbone:{folder}").identity
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert TextEncoder(f"backbone:{folder}").identity == before
    weights["model.embed_tokens.weight"][7, 0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert TextEncoder(f"backbone:{folder}").identity != before


def test_of_the_default_backbone(smollm2_folder: Path, tmp_path: Path) -> None:
    encoder = TextEncoder("backbone:smollm2-135m")
    features, _ = encoder.encode(["Toy Story (1995)"], cache=tmp_path, progress=False)
    ids = AutoTokenizer.from_pretrained(smollm2_folder)("Toy Story (1995)", add_special_tokens=False)[
        "input_ids"
    ]
    words = load_file(smollm2_folder / "model.safetensors")["model.embed_tokens.weight"].float()
    assert encoder.width == 576 and len(ids) > 4
    torch.testing.assert_close(features[0], normalize(words[ids].mean(dim=0), dim=0))


@pytest.mark.parametrize("name", ["minilm", "nowhere/at/all"])
def test_what_is_no_backbone_is_named(name: str) -> None:
    with pytest.raises(SpeederError, match=name) as caught:
        TextEncoder(f"backbone:{name}")
    assert "\n" not in str(caught.value)
