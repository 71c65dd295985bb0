"""Model flops: what the mathematics of a step or of a forward pass needs, without anything computed twice.

A product of `(m, k)` and `(k, n)` is `2 m k n`. Trained weights cost three products a token (forward, the gradients of
input and weight), frozen ones that a gradient passes through two, the first layer above fixed inputs two. Attention is
counted below the diagonal alone; its backward is twice its forward: four products, the scores not counted again.
Norms, activations and the optimizer are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from speeder.model.experts import LinearExpert
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.sequences import TokenSequence


def training_flops(model: SpeederForCausalLM, sequences: Sequence[TokenSequence]) -> dict[str, int]:
    """Flops of a training step on packed sequences, by part.

    A sequence's last token is a target and is not read. The text embedding, which is also the text head of many
    backbones, counts as frozen, as in the bundled recipes.
    """
    lengths = [len(sequence.ids) - 1 for sequence in sequences]
    first_item = model.config.text_vocab_size
    labels = [label for sequence in sequences for label in sequence.labels[1:] if label >= 0]
    items = sum(label >= first_item for label in labels)
    hidden, total = model.config.hidden_size, sum(lengths)
    parts = {
        "backbone": 6 * linear_weights(model) * total,
        "attention": 3 * attention_flops(model, lengths),
        "history look-up": 3 * causal_pairs(lengths) * lookup_flops(model),
        "text logits": 4 * (len(labels) - items) * hidden * first_item,
    }
    if items:
        parts["item head"] = 6 * items * hidden * hidden
        parts["item logits"] = 6 * items * len(model.catalogue) * hidden
        parts["item tokens"] = catalogue_flops(model, training=True)
    if model.config.position_proxy_weight > 0:
        at_item = sum(rank >= 0 for sequence in sequences for rank in sequence.ranks[:-1])
        parts["position proxy"] = 6 * at_item * hidden * (model.config.num_distance_buckets + 1)
    return {name: count for name, count in parts.items() if count}


def ranking_flops(model: SpeederForCausalLM, lengths: Sequence[int], whole_catalogue: bool) -> int:
    """Flops of reading sequences of the given lengths and predicting at the end of each: the whole catalogue's scores,
    or one text token. Item tokens, made once, are not counted; of the last layer only the states that are read are."""
    hidden, answers, total = model.config.hidden_size, len(lengths), sum(lengths)
    if whole_catalogue:
        answer = 2 * hidden * (hidden + len(model.catalogue))
    else:
        answer = 2 * hidden * model.config.text_vocab_size
    *whole, last = model.backbone.get_decoder().layers
    keys_and_values = 2 * hidden * model.config.text_config.num_key_value_heads * head_width(model)
    products = sum(map(matrix_weights, whole)) * total
    products += keys_and_values * total + (matrix_weights(last) - keys_and_values) * answers
    pairs = len(whole) * causal_pairs(lengths) + total
    return 2 * products + pairs * pair_flops(model) + total * lookup_flops(model) + answers * answer


def linear_weights(model: SpeederForCausalLM) -> int:
    """Weights of the decoder layers' matrices."""
    return sum(map(matrix_weights, model.backbone.get_decoder().layers))


def matrix_weights(module: nn.Module) -> int:
    """Weights of a module's matrices."""
    return sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)


def attention_flops(model: SpeederForCausalLM, lengths: Sequence[int]) -> int:
    """Flops of causal attention's forward pass in all layers: queries with keys, weights with values."""
    return model.config.text_config.num_hidden_layers * causal_pairs(lengths) * pair_flops(model)


def causal_pairs(lengths: Sequence[int]) -> int:
    """Pairs of a token and one that it sees, itself too."""
    return sum(length * (length + 1) // 2 for length in lengths)


def pair_flops(model: SpeederForCausalLM) -> int:
    """Flops of such a pair in a layer."""
    return 4 * model.config.text_config.num_attention_heads * head_width(model)


def lookup_flops(model: SpeederForCausalLM) -> int:
    """Flops of such a pair in the history look-up: a weight with an item's vector. Its weights are no products."""
    return 2 * model.config.hidden_size if model.config.history_lookup else 0


def head_width(model: SpeederForCausalLM) -> int:
    """Width of an attention head."""
    text = model.config.text_config
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def catalogue_flops(model: SpeederForCausalLM, training: bool) -> int:
    """Flops of compressing the whole catalogue to item tokens: each modality's expert and gate, and its words."""

    def passes(first: int, second: int) -> int:  # the first layer's input needs no gradient
        return 4 * first + 6 * second if training else 2 * (first + second)

    flops, items = 0, len(model.catalogue)
    for name, width in model.config.modalities.items():
        expert = model.mrc.experts[name]
        first = width * (expert.up.out_features + 1)  # the gate reads the same features
        if isinstance(expert, LinearExpert):
            first += width * expert.direct.out_features
        second = expert.down.in_features * expert.down.out_features
        flops += items * passes(first, second)
    if model.config.words:
        words = model.mrc.words
        flops += passes(
            len(words.item_ids) * words.vectors.embedding_dim, items * words.direct.weight.numel()
        )
    return flops  # a learned embedding is looked up: no product
