"""What a benchmark is: one op on one shape, ours and the sides that it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Results = tuple[Tensor, ...]

FORWARD = "forward"
TRAINING = "forward + backward"
REFERENCE = "reference"  # the side that is the plain PyTorch oracle of speeder_kernels


def as_is(results: Results) -> Results:
    """The results of a side whose layout is ours."""
    return results


@dataclass(frozen=True)
class Side:
    """One way to compute it."""

    run: Callable[[], Results]
    # The results in our layout; None where this side computes less than we do (attention without a bias).
    to_ours: Callable[[Results], Results] | None = as_is


@dataclass(frozen=True)
class Inputs:
    """A benchmark with its tensors made."""

    sides: dict[str, Side]  # "ours" and those that run on this machine
    flops: float  # what one run multiplies and adds, with what is computed again rather than held
    bytes: float  # what one run must read and write at least, each tensor once
    missing: dict[str, str] = field(default_factory=dict)  # why a side does not run on this machine


@dataclass(frozen=True)
class Benchmark:
    """One op on one shape. Its tensors are made by `build(quick)`, small ones where `quick`."""

    op: str
    what: str  # shape and pass, for the tables
    label: str  # the same, short, for the plot
    dtype: torch.dtype
    # The other sides: the most that ours may take of each one's time, or None where there is no target.
    against: dict[str, float | None]
    build: Callable[[bool], Inputs]
    memory_against: dict[str, float] = field(default_factory=dict)  # the same for peak memory
    compute_share: float | None = None  # the least share of the measured GEMM peak
    bandwidth_share: float | None = None  # the least share of the measured copy bandwidth

    @property
    def name(self) -> str:
        return f"{self.op}, {self.what}, {dtype_name(self.dtype)}"

    @property
    def sides(self) -> tuple[str, ...]:
        return ("ours", *self.against)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def size_of(*tensors: Tensor) -> int:
    """Bytes of all elements."""
    return sum(x.numel() * x.element_size() for x in tensors)


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Copies that ask for a gradient."""
    return [x.detach().clone().requires_grad_() for x in tensors]


def training(forward: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], Results]:
    """Forward and backward: the result of `forward(*inputs)` and the gradients of the inputs."""

    def run() -> Results:
        out = forward(*inputs)
        return (out.detach(), *torch.autograd.grad(out, inputs, grad))

    return run
