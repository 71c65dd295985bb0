"""Turns downloaded weights into ordinary folders of safetensors, once. Called by `speeder.io.assets` by name."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from speeder.io.progress import showing

# The model_type by which an image encoder's folder is recognised; the rest is for readers.
EFFICIENTNET_LITE0 = {
    "model_type": "efficientnet-lite0",
    "image_size": 224,
    "num_features": 1280,
    "num_classes": 1000,
}


def smollm2(source: Path, target: Path) -> None:
    """GGUF (4-bit) -> a Hugging Face folder: float32 weights, the tokenizer and its chat template."""
    from gguf import GGUFReader, dequantize
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
    # The GGUF file names its splitting rule ("smollm": each digit by itself, then bytes); transformers reads
    # the second half alone, and would split runs of spaces before digits differently from how the model was
    # trained.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(target)
    reader = GGUFReader(source / "model.gguf")
    config = LlamaConfig(dtype="float32", architectures=["LlamaForCausalLM"], **_llama_settings(reader))
    weights = {}
    with showing("unpacking SmolLM2's weights", len(reader.tensors), "tensor") as work:
        for tensor in reader.tensors:
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
            weights[_llama_name(tensor.name)] = _rotary_halves(tensor.name, values, config).contiguous()
            work.update()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(target)
    GenerationConfig.from_model_config(config).save_pretrained(target)


def _llama_settings(reader) -> dict[str, object]:
    """The arguments of `LlamaConfig`, as a GGUF file's header tells them."""

    def told(key: str):
        return reader.fields[key].contents()

    return {
        "vocab_size": int(next(t for t in reader.tensors if t.name == "token_embd.weight").shape[1]),
        "hidden_size": told("llama.embedding_length"),
        "num_hidden_layers": told("llama.block_count"),
        "intermediate_size": told("llama.feed_forward_length"),
        "num_attention_heads": told("llama.attention.head_count"),
        "num_key_value_heads": told("llama.attention.head_count_kv"),
        "max_position_embeddings": told("llama.context_length"),
        "rms_norm_eps": told("llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": told("llama.rope.freq_base")},
        "bos_token_id": told("tokenizer.ggml.bos_token_id"),
        "eos_token_id": told("tokenizer.ggml.eos_token_id"),
        "pad_token_id": told("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
    }


# llama.cpp's names of a layer's weights, and transformers'
_LLAMA_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _llama_name(name: str) -> str:
    """`"blk.3.attn_q.weight"` -> `"model.layers.3.self_attn.q_proj.weight"`."""
    *block, part, kind = name.split(".")
    layer = f"layers.{block[1]}." if block else ""
    return f"model.{layer}{_LLAMA_NAMES[part]}.{kind}"


def _rotary_halves(name: str, values: torch.Tensor, config) -> torch.Tensor:
    """Query and key rows in the order of transformers' rotary embedding: llama.cpp keeps its pairs side by side."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    part = name.split(".")[-2]
    if part not in heads:
        return values
    return values.view(heads[part], -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)


def efficientnet_lite0(source: Path, target: Path) -> None:
    """A PyTorch checkpoint, read as tensors alone -> `model.safetensors` and `config.json`."""
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
