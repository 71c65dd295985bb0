"""LoRA adapters in the backbone, by PEFT, which is imported only if there are any: it takes a quarter second."""

from __future__ import annotations

import torch

from speeder.errors import SpeederError


def add_lora(self, settings: dict) -> None:
    """Add LoRA adapters to the backbone; they have no effect until trained.

    Args:
        settings: arguments of `peft.LoraConfig`, such as `r`, `lora_alpha`, `target_modules`.

    Raises:
        SpeederError: PEFT refuses the settings.
    """
    from peft import LoraConfig, inject_adapter_in_model

    try:
        inject_adapter_in_model(LoraConfig(**settings), self.backbone)
    except (TypeError, ValueError) as error:
        raise SpeederError(f"lora: {str(error).splitlines()[0]}") from error
    self.config.lora = dict(settings)


@torch.no_grad()
def merge_lora(self) -> None:
    """Fold trained LoRA adapters into the backbone's own weights and remove them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(self.backbone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            self.backbone.set_submodule(name, module.get_base_layer())
    self.config.lora = None
