"""How the backbone's text embedding is read: its weight by the kernel, or by calling the module."""

from __future__ import annotations

import torch
from torch import nn

from speeder.errors import SpeederError


def read_directly(words: nn.Module) -> bool:
    """Whether a text embedding's rows are those of its weight, so that a kernel can read them.

    They are not where the module has an adapter (PEFT), a hook (NEFTune, activation checkpointing), a weight that is
    loaded for each call (Accelerate's offload), or torch's options `max_norm` or `sparse`: then it has
    to be called.

    Raises:
        SpeederError: NEFTune with FSDP2, or `scale_grad_by_freq`, which are not supported.
    """
    # items, which it does not embed, would count as a text token
    if any(getattr(part, "scale_grad_by_freq", False) for part in words.modules()):
        raise SpeederError("scale_grad_by_freq: expected False in the text embedding, got True")
    if hasattr(words, "unshard"):  # FSDP2 gathers weights of modules that are called; this one is only read
        if hasattr(words, "neftune_noise_alpha"):
            raise SpeederError(
                f"neftune_noise_alpha: expected none beside FSDP2, got {words.neftune_noise_alpha}"
            )
        words.unshard()
        return True
    hooks = (
        words._forward_hooks,
        words._forward_pre_hooks,
        words._backward_hooks,
        words._backward_pre_hooks,
    )
    plain = isinstance(words, nn.Embedding) and (
        type(words).forward is nn.Embedding.forward or hasattr(words, "embed_scale")
    )
    options = isinstance(words, nn.Embedding) and (words.max_norm is not None or words.sparse)
    return (
        plain
        and not options
        and not any(hooks)
        and "forward" not in vars(words)
        and not nn.utils.parametrize.is_parametrized(words)
    )


def embedding_scale(words: nn.Module) -> torch.Tensor | None:
    """The constant that an embedding module, or the one that an adapter wraps, multiplies its rows by; None: none."""
    if isinstance(words, nn.Embedding):
        return getattr(words, "embed_scale", None)
    return next((module.embed_scale for module in words.modules() if hasattr(module, "embed_scale")), None)
