"""Batches whose loss or gradient is not finite: an error, or skipped up to a limit, but never an optimizer step.

One NaN in a gradient makes every weight NaN in a single step, and a checkpoint of them would replace the last good one.
So losses and gradients are checked before each optimizer step, on all processes together.
"""

from __future__ import annotations

import logging

import torch
from torch import distributed, nn
from transformers import TrainerCallback

from speeder.errors import SpeederError
from speeder.training.fsdp import local

log = logging.getLogger(__name__)

SKIPPED = "skipped_batches"  # in a stage's log: how many so far, at the step of the last one


class BadBatches(TrainerCallback):
    """Checks a stage's losses and gradients, and skips optimizer steps with any that is not finite.

    A skipped step changes no weight, no moment of the optimizer and no moving average; it counts as a step of the
    schedule. With gradient accumulation all batches of the step are skipped together, and count as one. In fp16, the
    loss scale itself skips steps with infinite gradients, so only losses are checked.

    Args:
        stage: its name, for messages.
        allowed: skipped steps allowed in the stage, including those before a resume; one more is an error.

    Attributes:
        skipped_steps: numbers of the skipped steps of this process, from 1.
    """

    def __init__(self, stage: str, allowed: int = 0):
        self.stage, self.allowed = stage, allowed
        self.skipped_steps: set[int] = set()
        self._losses: list[torch.Tensor] = []  # of the batches of the coming step
        self._shown: torch.Tensor | None = None
        self._batch, self._epoch = 0, 1

    def see_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Record the loss of one batch. It is checked together with the others of its step, to avoid waiting for the
        device.

        Returns:
            the loss for the log: this one, or that of the batch before if it is not finite.
        """
        self._losses.append(loss.detach())
        if self._shown is None:
            self._shown = torch.zeros_like(loss)
        self._shown = torch.where(torch.isfinite(loss), loss.detach(), self._shown)
        return self._shown

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        steps = -(-len(train_dataloader) // args.gradient_accumulation_steps)
        done = state.global_step % steps  # a resumed run begins within an epoch
        self._epoch, self._batch = state.global_step // steps + 1, done * args.gradient_accumulation_steps
        self._losses = []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        losses, self._losses = self._losses, []
        first, self._batch = self._batch + 1, self._batch + len(losses)
        bad = [~torch.isfinite(loss) for loss in losses]
        if not args.fp16:
            bad.append(~torch.isfinite(_gradient_norm(model)).to(bad[0].device))
        flags = torch.stack(bad).to(torch.int32)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(flags, distributed.ReduceOp.MAX)  # so that all skip, or fail, together
        found = flags.tolist()  # the one wait for the device
        if not any(found):
            return
        step = state.global_step + 1
        what = self._describe(found[: len(losses)], first)
        count = self.skipped_before(state) + 1
        if count > self.allowed:
            limit = (
                f"{self.allowed} batches were already skipped" if self.allowed else "no batch may be skipped"
            )
            raise SpeederError(
                f"stage {self.stage!r}, step {step}: {what} is not finite, and {limit} (skip_bad_batches:"
                f" {self.allowed}); the weights and the last checkpoint are those before it. Look at the data or lower"
                " the rates; or go on with --resume and a recipe with a higher skip_bad_batches"
            )
        for group in optimizer.param_groups:  # AdamW leaves alone what has no gradient, moments included
            for parameter in group["params"]:
                parameter.grad = None
        self.skipped_steps.add(step)
        state.log_history.append({"step": step, "epoch": state.epoch, SKIPPED: count, "not_finite": what})
        if state.is_world_process_zero:
            log.warning("stage %r, step %d: skipped, since %s is not finite", self.stage, step, what)

    def _describe(self, bad_losses: list[int], first: int) -> str:
        """Such as "the loss of batch 3 of epoch 1"."""
        if any(bad_losses):
            batches = f"batch {first + bad_losses.index(1)}"
        elif len(bad_losses) == 1:
            batches = f"batch {first}"
        else:
            batches = f"batches {first} to {first + len(bad_losses) - 1}"
        return f"the {'loss' if any(bad_losses) else 'gradient'} of {batches} of epoch {self._epoch}"

    @staticmethod
    def skipped_before(state) -> int:
        """Number of skipped steps in the stage, from the log, since that is restored with a checkpoint."""
        return max((entry[SKIPPED] for entry in state.log_history if SKIPPED in entry), default=0)

    def tell(self, state) -> int:
        """At the stage's end, log the number of skipped steps, if any, and return it."""
        count = self.skipped_before(state)
        if count and state.is_world_process_zero:
            log.warning(
                "stage %r: %d of %d steps were skipped, because losses or gradients were not finite",
                self.stage, count, state.global_step,
            )  # fmt: skip
        return count


def _gradient_norm(model: nn.Module) -> torch.Tensor:
    """The norm of this process's gradients, or of its shards: a scalar, not finite if any number is not."""
    gradients = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    return torch.stack([norm.float() for norm in torch._foreach_norm(gradients)]).norm()


def check_weights(named: dict[str, torch.Tensor], what: str) -> None:
    """Refuse weights that are not finite, before they are saved.

    Raises:
        SpeederError: naming the first of them.
    """
    for name, tensor in named.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(local(tensor)).all()):
            raise SpeederError(
                f"{what}: the weights {name} are no longer finite, and are not saved; the last checkpoint is kept."
                " Lower the learning rates"
            )
