"""FSDP2 for a recommender: Accelerate shards a copy of it, and the whole model ranks, is saved and is loaded.

So checkpoints are the same as without sharding, and a run resumes with or without it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def copy_for_sharding(model: nn.Module) -> nn.Module:
    """A copy to shard, which shares the catalogue and the features; scalars become vectors, since FSDP2 takes none."""
    shared = [*model.buffers(), getattr(model, "catalogue", None)]
    sharded = copy.deepcopy(model, {id(value): value for value in shared})
    for module in sharded.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 0:
                wrapped = nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad)
                setattr(module, name, wrapped)
    # where Accelerate looks whether the text's embedding and head are one, and have to be sharded as one
    sharded.get_output_embeddings = sharded.backbone.get_output_embeddings
    return sharded


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard, which shares the tensor's memory; or the tensor itself, if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor; if it is sharded, all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """A whole tensor, equal on all processes, sharded like `pattern`; if that is sharded, all processes must call
    it."""
    if not isinstance(pattern, DTensor):
        return tensor
    tensor = tensor.reshape(pattern.shape).to(pattern.device_mesh.device_type)
    return distribute_tensor(tensor, pattern.device_mesh, pattern.placements)


@torch.no_grad()
def gather(sharded: nn.Module, into: nn.Module, only: str = "") -> None:
    """Copy the weights whose names begin with `only` into the whole model."""
    parameters = dict(into.named_parameters())
    for name, parameter in sharded.named_parameters():
        if name.startswith(only):
            parameters[name].copy_(whole(parameter).reshape(parameters[name].shape))
    _copy_gate_offset(sharded, into)


@torch.no_grad()
def scatter(model: nn.Module, into: nn.Module) -> None:
    """Copy the whole model's weights, the same on all processes, into the sharded one."""
    parameters = dict(model.named_parameters())
    for name, parameter in into.named_parameters():
        local(parameter).copy_(local(shard_like(parameters[name].reshape(parameter.shape), parameter)))
    _copy_gate_offset(model, into)


def _copy_gate_offset(source: nn.Module, target: nn.Module) -> None:
    target.mrc.gate_offset.copy_(source.mrc.gate_offset)


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state as it would be without sharding, except that scalars' moments stay vectors."""
    state = optimizer.state_dict()
    moments = {
        number: {name: whole(value) if torch.is_tensor(value) else value for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return state | {"state": moments}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state into an optimizer of sharded or whole parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {}
    for number, entry in state["state"].items():
        parameter = parameters[int(number)]
        moments[number] = {
            name: value
            if name == "step" or not torch.is_tensor(value)
            else shard_like(value.reshape(parameter.shape), parameter)
            for name, value in entry.items()
        }
    optimizer.load_state_dict(state | {"state": moments})


def touch_unsharded(model: nn.Module) -> torch.Tensor:
    """0, which depends on each weight that is whole now, so that each has a gradient on every process.

    FSDP2 sums gradients over processes as one piece. It would sum wrongly, or wait for ever, if one process did not
    use a weight that others used.
    """
    parts = [
        parameter.flatten()[:0].sum()
        for parameter in model.parameters()
        if parameter.requires_grad and not isinstance(parameter, DTensor)
    ]
    return torch.stack(parts).sum() if parts else torch.zeros(())
