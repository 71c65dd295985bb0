"""Converts downloaded weights into folders of safetensors. `speeder.io.assets` calls these functions by name."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from speeder.io.progress import showing

# The model_type identifies an image encoder's folder; the rest is for readers.
EFFICIENTNET_LITE0 = {
    "model_type": "efficientnet-lite0",
    "image_size": 224,
    "num_features": 1280,
    "num_classes": 1000,
}


def smollm2(source: Path, target: Path) -> None:
    """GGUF (4-bit) -> a Hugging Face folder: float32 weights, the tokenizer and its chat template."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
    # The GGUF file names its splitting rule ("smollm": each digit by itself, then bytes); transformers reads
    # the second half alone, and would split runs of spaces before digits differently from how the model was
    # trained.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(target)
    with showing("unpacking SmolLM2's weights"), _without_a_second_bar():
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file="model.gguf", dtype=torch.float32)
    # The weights are plain float32 from here on, but the model read is still marked as quantised, and such a
    # one cannot be saved: the same weights go into an unmarked twin.
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(config), dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(target)


@contextmanager
def _without_a_second_bar() -> Iterator[None]:
    """transformers draws a bar of its own over a GGUF file's tensors, which no setting of its turns off."""
    from transformers import modeling_gguf_pytorch_utils as gguf_loading

    bar = gguf_loading.tqdm
    gguf_loading.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        gguf_loading.tqdm = bar


def efficientnet_lite0(source: Path, target: Path) -> None:
    """A PyTorch checkpoint, read as tensors only -> `model.safetensors` and `config.json`."""
    weights = torch.load(source / "model.pth", map_location="cpu", weights_only=True)
    # the encoder loads them strictly: it would refuse a weight too many or too few
    renamed = {_efficientnet_name(name): tensor.contiguous() for name, tensor in weights.items()}
    save_file(renamed, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(EFFICIENTNET_LITE0, indent=2) + "\n", encoding="utf-8")


# In the published checkpoint, a block's normalisations are numbered by kind, not by position.
_EFFICIENTNET_NAMES = [
    (r"^_conv_stem\.", "stem.0."),
    (r"^_bn0\.", "stem.1."),
    (r"^_conv_head\.", "head.0."),
    (r"^_bn1\.", "head.1."),
    (r"^_fc\.", "classifier."),
    (r"^_blocks\.(\d+)\._expand_conv\.", r"blocks.\1.expand.0."),
    (r"^_blocks\.(\d+)\._bn0\.", r"blocks.\1.expand.1."),
    (r"^_blocks\.(\d+)\._depthwise_conv\.", r"blocks.\1.depthwise.0."),
    (r"^_blocks\.(\d+)\._bn1\.", r"blocks.\1.depthwise.1."),
    (r"^_blocks\.(\d+)\._project_conv\.", r"blocks.\1.project.0."),
    (r"^_blocks\.(\d+)\._bn2\.", r"blocks.\1.project.1."),
]


def _efficientnet_name(name: str) -> str:
    for pattern, replacement in _EFFICIENTNET_NAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name
