"""The Hugging Face `Trainer` of every stage: optimizer, evaluation by ranking, checkpoints."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from speeder.data.interactions import Split
from speeder.io.disk_full import WriteError, writing
from speeder.model.modeling import SpeederForCausalLM
from speeder.training.bad_batches import BadBatches, check_weights
from speeder.training.callbacks import EpochTeller, OwnDraws
from speeder.training.checkpoints import reading
from speeder.training.distributed import SharedBatches
from speeder.training.ema import WeightAverage

GATE_SAMPLE = 4096  # items whose gates are logged if the whole catalogue is never compressed


class SpeederTrainer(Trainer):
    """A `Trainer` that evaluates by the model's ranking of the validation items, on one process or several.

    `per_device_train_batch_size` counts the examples of a batch on all processes together.

    Args:
        split: the split with the validation items.
        parameter_groups: AdamW's parameter groups.
        average: the moving average of the weights, which is evaluated instead of the weights; None: no average.
        plain: the model to evaluate and to save; None: the trained one.
        bad_batches: the check of losses and gradients; None: batches that are not finite are errors.
    """

    def __init__(
        self,
        *args,
        split: Split,
        parameter_groups: list[dict],
        average: WeightAverage | None = None,
        plain: SpeederForCausalLM | None = None,
        bad_batches: BadBatches | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        for drawn in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):  # see training/progress.py
            self.remove_callback(drawn)
        self.plain = self.model if plain is None else plain
        self.split, self.parameter_groups, self.average = split, parameter_groups, average
        self.batches = SharedBatches(
            self.train_dataset,
            self.args.per_device_train_batch_size,
            self.args.seed,
            self.args.process_index,
            self.args.world_size,
        )
        self.add_callback(EpochTeller(self.batches.set_epoch))
        self.add_callback(OwnDraws())
        self.bad_batches = bad_batches or BadBatches(self.args.run_name)
        self.add_callback(self.bad_batches)
        if average is not None:
            average.skipped_steps = self.bad_batches.skipped_steps
            self.add_callback(average)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        return self.bad_batches.see_loss(super().training_step(*args, **kwargs))

    def get_train_dataloader(self) -> DataLoader:
        """Batches of `SharedBatches`; Accelerate would repeat examples to make equal shares."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory and not self.args.use_cpu,
        )

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.parameter_groups, betas=(0.9, 0.98), fused=True)
        return self.optimizer

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add each modality's mean gate weight to every log line with a loss."""
        if "loss" in logs:
            gates = self.plain.gates(None if self.plain.config.negatives == "full" else GATE_SAMPLE)
            logs |= {f"gate/{name}": float(weights.mean()) for name, weights in gates.items()}
        super().log(logs, *args, **kwargs)

    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        weights = contextlib.nullcontext() if self.average is None else self.average.in_model()
        with weights, self.autocast_smart_context_manager():
            found = self._validation_metrics()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validation_metrics(self) -> dict[str, float]:
        """The model's validation metrics; each process ranks for its part of the users."""
        model = self.plain
        ranks, users = self.args.world_size, len(self.split.users("validation"))
        if ranks == 1 or users < ranks or not getattr(model, "ranks_catalogue", True):
            return model.validation_metrics(self.split)  # on every process, since it is quick
        part = self.split.part(self.args.process_index, ranks)
        found = model.validation_metrics(part)
        sums = torch.tensor(list(found.values()), dtype=torch.float64) * len(part.users("validation"))
        means = self.accelerator.reduce(sums.to(self.args.device), "sum") / users
        return dict(zip(found, means.tolist(), strict=True))

    def _save_checkpoint(self, *args, **kwargs) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with writing(folder):
                super()._save_checkpoint(*args, **kwargs)
        except WriteError:  # an incomplete checkpoint is of no use, and takes disk space
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # the catalogue is in the prepared data and with the finished model; a checkpoint needs only the weights
        trained = {name: weight for name, weight in self.plain.named_parameters() if weight.requires_grad}
        check_weights(trained, f"stage {self.bad_batches.stage!r}, step {self.state.global_step}")
        if self.args.should_save:  # on the main process
            self.plain.save_pretrained(output_dir, state_dict=state_dict, save_catalogue=False)
        if self.average is not None:
            self.average.save(output_dir, self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args, **kwargs) -> None:
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
            if self.average is not None:
                self.average.load(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None, *args, **kwargs) -> None:
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint, *args, **kwargs)

    def _load_rng_state(self, checkpoint: str | None, *args, **kwargs) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint, *args, **kwargs)

    def _load_scaler(self, checkpoint: str | None, *args, **kwargs) -> None:
        with reading(checkpoint):
            super()._load_scaler(checkpoint, *args, **kwargs)

    def _load_best_model(self, *args, **kwargs) -> None:
        super()._load_best_model(*args, **kwargs)
        if self.average is not None:
            self.average.load(self.state.best_model_checkpoint)

    def gather(self) -> None:
        """Copy the trained weights into `plain`, if it is another model."""
