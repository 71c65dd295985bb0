"""The converted SmolLM2: a folder like any other, whose model and tokenizer make sense."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from speeder.io.assets import resolve_backbone


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder: Path) -> PreTrainedTokenizerBase:
    assert resolve_backbone("smollm2-135m") == str(smollm2_folder)
    return AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="module")
def model(smollm2_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2_folder)


def test_it_is_plain_float32_safetensors(smollm2_folder: Path, model: PreTrainedModel) -> None:
    suffixes = {path.suffix for path in smollm2_folder.iterdir()}
    assert suffixes <= {".json", ".jinja", ".safetensors"}
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_it_knows_its_capitals(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    for country, capital in [("France", "Paris"), ("Japan", "Tokyo")]:
        prompt = tokenizer(f"The capital of {country} is", return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=6, do_sample=False)
        assert capital in tokenizer.decode(output[0])


def test_it_answers_through_its_chat_template(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    question = [{"role": "user", "content": "Which planet is known as the red planet? Answer briefly."}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    text = tokenizer.decode(prompt["input_ids"][0])
    assert "<|im_start|>user\n" in text and text.endswith("<|im_start|>assistant\n")
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert "Mars" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


# The model's vocabulary has no token for some control characters, nor for bytes that begin the far planes.
written = st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t")


@settings(deadline=None)
@given(text=st.text(written, max_size=40))
def test_texts_survive_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_digits_stand_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("x  1995,30")["input_ids"])
    assert pieces == ["x", "ĠĠ", "1", "9", "9", "5", ",", "3", "0"]
