"""`Trainer` callbacks: pass on epochs and steps, seed each process, mark complete checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback, set_seed

from speeder.training.checkpoints import mark_whole, remove_checkpoint
from speeder.training.distributed import processes


class EpochTeller(TrainerCallback):
    """Calls `set_epoch` with the epoch, also after a resume (where Accelerate's own mechanism fails)."""

    def __init__(self, set_epoch: Callable[[int], None]):
        self.set_epoch = set_epoch

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.set_epoch(int(state.epoch or 0))


class NegativesClock(TrainerCallback):
    """Sets the optimizer step of the model's sampler of negatives."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.negatives.seek(state.global_step)


class OwnDraws(TrainerCallback):
    """Seeds each process differently for dropout, and a resumed run differently from its start.

    The first process keeps the `Trainer`'s seed at its first start. A resume by the same number of processes continues
    with the random state of its checkpoint.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if args.process_index or state.global_step:
            set_seed((args.seed + 7919 * args.process_index + 104_729 * state.global_step) % 2**32)


class CheckpointMarker(TrainerCallback):
    """Marks a checkpoint as complete after every process has written its files; only then removes older ones.

    The best one so far and the newest are kept, and never fewer than two. The `Trainer` itself would remove old ones
    before the new one is marked, so a kill could leave no complete one.
    """

    def on_save(self, args, state, control, **kwargs):
        processes().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        newest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        mark_whole(newest)
        best = Path(state.best_model_checkpoint or newest).name
        others = [path for path in newest.parent.glob("checkpoint-*") if path.name not in (newest.name, best)]
        others.sort(key=lambda path: int(path.name.rsplit("-", 1)[1]))
        for path in others[: len(others) - (best == newest.name)]:
            remove_checkpoint(path)
