"""What the `Trainer` calls as it goes: epochs and steps told, draws of one's own, checkpoints marked as whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback, set_seed

from speeder.training.checkpoints import mark_whole, remove_checkpoint
from speeder.training.distributed import processes


class EpochTeller(TrainerCallback):
    """Tells a dataset its epoch by `set_epoch`, after a resume too (where accelerate's own way fails)."""

    def __init__(self, set_epoch: Callable[[int], None]):
        self.set_epoch = set_epoch

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.set_epoch(int(state.epoch or 0))


class NegativesClock(TrainerCallback):
    """Tells the model's sampler which optimizer step comes."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.negatives.seek(state.global_step)


class OwnDraws(TrainerCallback):
    """Gives each process its own dropout; and a resumed one other draws than it began with.

    The first process's first start keeps the `Trainer`'s seed; a resume by as many processes goes on with the draws
    that its checkpoint holds.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if args.process_index or state.global_step:
            set_seed((args.seed + 7919 * args.process_index + 104_729 * state.global_step) % 2**32)


class CheckpointMarker(TrainerCallback):
    """Marks a checkpoint as whole after every process wrote its last file of it; only then older ones go.

    The best one so far and the newest stay, and never fewer than two. The `Trainer` itself would remove them before the
    new one is marked, so that a kill could leave none whole.
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
