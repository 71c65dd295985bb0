"""A tiny backbone with a real (byte-level BPE) tokenizer, and a world whose next item the last title tells."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from speeder.data import ItemCatalogue, PreparedData
from speeder.data.interactions import Interactions
from speeder.model.modeling import SpeederForCausalLM
from speeder.recipes.schema import Recipe
from speeder.training.callbacks import CheckpointMarker
from speeder.training.train import train

NAMES = (
    "Amber",
    "Birch",
    "Coral",
    "Dune",
    "Ember",
    "Fjord",
    "Grove",
    "Heath",
    "Islet",
    "Jade",
    "Knoll",
    "Lagoon",
)


def cycle_world(num_users: int = 60, length: int = 6) -> PreparedData:
    """Twelve items in a ring; every user starts somewhere and goes on one by one, so popularity knows nothing."""
    starts = np.arange(num_users) % len(NAMES)
    items = (starts[:, None] + np.arange(length)) % len(NAMES)
    user, time = np.repeat(np.arange(num_users), length), np.tile(np.arange(length), num_users)
    catalogue = ItemCatalogue([f"i{i}" for i in range(len(NAMES))], [f"The {name} Path" for name in NAMES])
    return PreparedData(
        catalogue, Interactions(user, items.ravel(), time, [f"u{u}" for u in range(num_users)])
    )


def save_text_backbone(folder: Path, titles: list[str]) -> Path:
    """A random Llama of two layers, 64 wide, and a tokenizer trained on the titles, as a Hugging Face folder."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        [*titles, " yes", " no", "Chosen so far:\nCandidates:\nChosen next:\nCandidate:\nIs it chosen next?"],
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<end>"]),
    )
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.1,  # so narrow a model hardly starts to learn from the usual 0.02
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def train_with_a_stop(recipe: Recipe, data: PreparedData, run: Path, monkeypatch) -> SpeederForCausalLM:
    """Train, stopped right after the first checkpoint and then resumed."""
    marked = CheckpointMarker.on_save

    def stop_after_one(self, args, state, control, **kwargs):
        marked(self, args, state, control, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointMarker, "on_save", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, data, run)
    return train(recipe, data, run, resume=True)
