"""Which derivatives the ops have: first ones, in reverse mode. All others are refused; none is silently zero.

PyTorch would leave a derivative out, without a word, where an op does not say that it has none: forward mode drops
tangents, and a backward pass that is an op of its own counts as a constant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward mode carries a derivative along with this tensor."""
    if forward_ad._current_level < 0:  # no dual level is open, as nearly always
        return False
    try:
        if forward_ad.unpack_dual(tensor, level=0).tangent is not None:
            return True
    except RuntimeError:  # in a compiled graph under a dual level: PyTorch does not tell, so rather refuse
        return True
    # Of nested transforms, only the innermost one's tangent was seen: what any of them wraps may have another.
    transforms = _transforms()
    nested = len(transforms) > 1 and _functorch.TransformType.Jvp in transforms
    return nested and _functorch.is_functorch_wrapped_tensor(tensor)


def _transforms() -> list:
    """Which of `torch.func`'s transforms are under way, the outermost first."""
    if (
        torch.compiler.is_compiling()
    ):  # it cannot be traced; torch.compile refuses such derivatives, or calls the op
        return []
    return [level.key() for level in _functorch.get_interpreter_stack() or ()]


def is_batched(tensor: Tensor) -> bool:
    """Whether `torch.func.vmap` wraps this tensor, so that neither its values nor whether it requires a gradient can be
    read."""
    return not torch.compiler.is_compiling() and _functorch.is_batchedtensor(tensor)


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """NotImplementedError where one of them is a dual tensor.

    The public functions ask, for they see what `torch.func` wraps, and so does the op itself, for it sees what
    reaches it in a compiled graph.
    """
    if any(isinstance(x, Tensor) and has_tangent(x) for x in tensors):
        raise NotImplementedError(
            f"{op}: forward-mode derivatives are not supported (torch.func.jvp, jacfwd and hessian, dual tensors); "
            "reverse mode is (backward, torch.autograd.grad)"
        )


def refuse_transforms(op: str, *tensors: Tensor | None) -> None:
    """NotImplementedError where forward mode or `torch.func` asks for a derivative."""
    refuse_forward_mode(op, *tensors)
    # What vmap wraps within grad does not say that it requires a gradient.
    if _functorch.TransformType.Grad in _transforms() and any(
        isinstance(x, Tensor) and (x.requires_grad or _functorch.is_functorch_wrapped_tensor(x))
        for x in tensors
    ):
        raise NotImplementedError(
            f"{op}: torch.func's derivatives are not supported (grad, vjp, jacrev, hessian); use backward or "
            "torch.autograd.grad"
        )


def register(library: torch.library.Library, op: str, backward: Callable, setup_context: Callable) -> None:
    """Give `op` its gradient, which the op `{op}_backward` computes, and refuse the gradient of that."""

    def refuse(_context, *_grads) -> None:
        raise NotImplementedError(
            f"{op}: second derivatives are not supported; its gradient cannot be differentiated again "
            "(create_graph=True, torch.autograd.functional.hvp and hessian)"
        )

    torch.library.register_autograd(f"speeder::{op}", backward, setup_context=setup_context, lib=library)
    torch.library.register_autograd(f"speeder::{op}_backward", refuse, lib=library)
