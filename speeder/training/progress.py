"""The progress display of training: stage, step, loss, and the time left of all stages."""

from __future__ import annotations

from transformers import TrainerCallback

from speeder.io.progress import Progress


class StageProgress(TrainerCallback):
    """Shows a stage's progress on the display of the whole training.

    Args:
        work: counts the steps of all stages.
        stage: the stage's label, such as "text (stage 1 of 3)".
    """

    def __init__(self, work: Progress, stage: str):
        self.work, self.stage, self._step = work, stage, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._step = state.global_step
        self.work.skip(self._step)  # steps before a resume, which do not count for the speed
        self.work.tell(self.stage)

    def on_step_end(self, args, state, control, **kwargs):
        self.work.update(state.global_step - self._step)
        self._step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.work.tell(loss=f"{logs['loss']:.3f}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if "eval_NDCG@10" in metrics:
            self.work.tell(**{"validation NDCG@10": f"{metrics['eval_NDCG@10']:.4f}"})


def stage_line(stage: str, log: list[dict], seconds: float, last: bool = False) -> str:
    """The line that is printed at a stage's end, from its log; the last stage tells whether it was still improving."""
    loss = next(entry["loss"] for entry in reversed(log) if "loss" in entry)
    ranked = [entry["eval_NDCG@10"] for entry in log if "eval_NDCG@10" in entry]
    best = f", best validation NDCG@10 {max(ranked):.4f}" if ranked else ""
    steps = max(entry["step"] for entry in log)
    rising = last and len(ranked) > 1 and ranked[-1] == max(ranked) > ranked[-2]
    more = ", still rising at the last step: more epochs may help" if rising else ""
    return f"{stage}: {steps} steps in {seconds:.0f} s, loss {loss:.3f}{best}{more}"
