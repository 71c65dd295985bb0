"""Tiny models with random weights and their real processors, saved as Hugging Face folders."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "title", ":", "dogs", "cats", "bank", "robbery", "Heat", "heat"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT_TOWER = {**SIZES, "vocab_size": 40, "max_position_embeddings": 8}
VISION_TOWER = {**SIZES, "image_size": 32, "patch_size": 16}


def save_tokenizer(folder: Path, **options: object) -> None:
    """Words between [CLS] and [SEP]."""
    words = Tokenizer(WordLevel({word: row for row, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special, **options).save_pretrained(folder)


def save_bert(folder: Path, **tokenizer_options: object) -> PreTrainedModel:
    """A BERT of two layers, 16 wide, with its tokenizer."""
    model = BertModel(BertConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=40)).eval()
    for weight in model.parameters():  # the usual start is so narrow that all words look alike
        weight.data.normal_(std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder, **tokenizer_options)
    return model


def save_clip(folder: Path) -> None:
    """A CLIP of two layers, 16 wide, that projects to 12, with its image processor."""
    towers = {"text_config": TEXT_TOWER, "vision_config": VISION_TOWER}
    CLIPModel(CLIPConfig(**towers, projection_dim=12)).save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)


def list_modules(folder: Path, pooling: dict, *after: str) -> None:
    """The files of sentence-transformers' layout: a Transformer, a Pooling, and what comes `after`."""
    kinds = ["Transformer", "Pooling", *after]
    paths = ["", *(f"{place}_{kind}" for place, kind in enumerate(kinds[1:], start=1))]
    for path in paths[1:]:
        (folder / path).mkdir(exist_ok=True)
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": SIZES["hidden_size"], **pooling})
    listed = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    write(folder / "modules.json", listed)


def write(path: Path, content: object) -> None:
    """A JSON file."""
    path.write_text(json.dumps(content))
