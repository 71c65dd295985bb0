"""Where an op's tests run: every backend on a CPU, and on a GPU too where there is one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map_only

from speeder_kernels import dispatch


def places(op: str) -> list[tuple[str, str]]:
    """Backend and device, for `@pytest.mark.parametrize(("backend", "device"), places(op))`.

    A GPU backend that has the op and was not built or installed is among them: its tests then fail and say why.
    """
    found = [("reference", "cpu"), ("cpu", "cpu")]
    if torch.cuda.is_available():
        found += [(name, "cuda") for name in ("reference", "triton", "cuda") if op in dispatch.KERNELS[name]]
    return found


def all_places(op: str) -> list[tuple[str, str]]:
    """Triton's interpreter too, where Triton has no GPU: slow, so for small inputs."""
    found = places(op)
    return found if ("triton", "cuda") in found else [*found, ("triton", "cpu")]


def at(op: Callable, backend: str, device: str) -> Callable:
    """`op` as it runs there: tensors go to the device and results come back, gradients too."""

    def run(*args, **kwargs):
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to(device), (args, kwargs))
        return tree_map_only(torch.Tensor, lambda x: x.cpu(), op(*args, **kwargs, backend=backend))

    return run
