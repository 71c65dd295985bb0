"""A `device_map` with offload: the backbone's weights may wait on the CPU or on disk, Speeder's own parts stay.

Accelerate brings a module's offloaded weights when the module is called. Speeder's tables, scales and features are read
by others than their module, and are small beside a backbone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from speeder.errors import SpeederError

WAITING = ("cpu", "disk")  # where offloaded weights are
OWN_PARTS = ("mrc", "spae", "history", "item_head", "logit_scale", "dropout", "negatives")


def keep_own_parts(device_map: dict[str, Any]) -> dict[str, Any]:
    """A device map with Speeder's own parts on the device that computes.

    Raises:
        SpeederError: several devices would compute, on which SPAE's tables would have to be at once.
    """
    computing = sorted({str(device) for device in device_map.values() if str(device) not in WAITING})
    if len(computing) > 1:
        raise SpeederError(
            "device_map: expected one device that computes, with others being 'cpu' or 'disk' for offload, got "
            + ", ".join(computing)
        )
    main = next((device for device in device_map.values() if str(device) not in WAITING), "cpu")
    kept = {name: device for name, device in device_map.items() if name.partition(".")[0] not in OWN_PARTS}
    if "" in kept:  # the whole model
        kept = {"backbone": kept.pop(""), **kept}
    return {**kept, **dict.fromkeys(OWN_PARTS, main)}


def check_own_parts(model: nn.Module) -> None:
    """Raise `SpeederError` if Speeder's own parts were offloaded after loading, as by `accelerate.cpu_offload`."""
    if model.mrc.norm_weight.is_meta:
        raise SpeederError(
            "offload: expected Speeder's own parts in memory; load the recommender by from_pretrained with device_map, "
            "which offloads the backbone alone"
        )


def own_parts_wait(model: nn.Module) -> bool:
    """Whether a weight of Speeder's own parts was offloaded."""
    return any(
        parameter.is_meta
        for name, parameter in model.named_parameters()
        if name.partition(".")[0] in OWN_PARTS
    )
