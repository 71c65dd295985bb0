"""Tiny backbones, catalogues and histories that the model's tests share."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from speeder.data.catalogue import ItemCatalogue
from speeder.model.modeling import SpeederForCausalLM

TEXT = 64  # text tokens of the tiny backbones
FAMILIES = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "gpt_neox": GPTNeoXConfig,
    "gemma3": Gemma3TextConfig,
    "mistral": MistralConfig,
    "olmo2": Olmo2Config,
}


def tiny_backbone(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random causal language model of two layers, 32 wide, with grouped key/value heads where it has them."""
    sizes = dict(
        vocab_size=TEXT, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    sizes |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True)
    if family != "gpt_neox":
        sizes |= dict(num_key_value_heads=2)
    if family in ("qwen3", "gemma3"):
        sizes |= dict(head_dim=8)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(FAMILIES[family](**sizes)).eval()


def tiny_catalogue(num_items: int = 20, seed: int = 1) -> ItemCatalogue:
    """Items with text, image and collaborative features, some lacking one or two of them."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(num_items, 3, generator=generator) > 0.3
    present[:, 0] |= ~present.any(dim=1)
    widths = {"text": 7, "image": 5, "collaborative": 4}
    features, masks = {}, {}
    for column, (name, width) in enumerate(widths.items()):
        masks[name] = present[:, column]
        features[name] = torch.randn(num_items, width, generator=generator) * masks[name][:, None]
    ids = [f"id{i}" for i in range(num_items)]
    titles = [f"Title {i}" for i in range(num_items)]
    return ItemCatalogue(ids, titles, features=features, present=masks)


def tiny_model(family: str = "llama", stir: bool = True, **config) -> SpeederForCausalLM:
    """A fresh recommender; `stir` moves every weight, so that tables which start at zero take part in the test."""
    model = SpeederForCausalLM.from_backbone(tiny_backbone(family), tiny_catalogue(), **config)
    if stir:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_tiny_backbone(folder: Path, family: str = "llama") -> Path:
    """A tiny backbone with a word-level tokenizer as a Hugging Face folder."""
    tiny_backbone(family).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(TEXT)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w0").save_pretrained(folder)
    return folder
