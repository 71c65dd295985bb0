"""Trains a sequential baseline: windows of long histories, batches of similar lengths, early stopping on validation."""

import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from speeder.baselines.sequential.base import SequentialModel, check_sequences
from speeder.baselines.sequential.checkpoint import FitState, load_checkpoint, save_checkpoint
from speeder.data.fingerprints import training_hash
from speeder.data.item_indices import item_array
from speeder.evaluation.metrics import metric_values, target_ranks
from speeder.io.progress import showing
from speeder.recipes.sasrec import SASRecConfig
from speeder_kernels import item_cross_entropy

Model = TypeVar("Model", bound=SequentialModel)

_BUCKET_BATCHES = 16  # batches' worth of examples sorted by length together
_VALIDATION_BATCH = 256
_WARMUP = 0.05  # of all steps, before the rate falls in a line to zero


def fit_sequential(
    kind: type[Model],
    training_sequences: Sequence[Sequence[int]],
    num_items: int,
    config: SASRecConfig | None = None,
    *,
    validation: tuple[Sequence[Sequence[int]], Sequence[int]] | None = None,
    epochs: int | None = None,
    seed: int = 0,
    log: Callable[[dict], None] | None = None,
    device: str | torch.device = "cpu",
    checkpoint: str | os.PathLike | None = None,
    description: str | None = None,
) -> Model:
    """Train a new model: every item of every sequence is predicted from those before it.

    Args:
        kind: such as `SASRec`.
        training_sequences: users' items, oldest first. Sequences longer than ``max_length`` are cut into windows, so
            that every interaction is used.
        validation: histories and their targets. With it, training stops ``patience`` epochs after the best NDCG@10
            (seen items masked) and returns the best epoch's weights; without it, it runs all epochs.
        epochs: most epochs; None: ``config.epochs``.
        seed: fixes initial weights, dropout and order. The caller's random state is not changed.
        log: called after each epoch with ``epoch``, ``loss`` and, with validation, ``NDCG@10``. After a resume it is
            called for the earlier epochs too.
        checkpoint: a file, written after each epoch. If it exists, training resumes from it, with the same result. The
            caller removes it once the model is saved.
        description: label of the progress display; None: the kind's name.

    Returns:
        The trained model in evaluation mode.

    Raises:
        ValueError: no sequence has two items, or the loss is no longer finite.
        IndexError: an item outside the catalogue.
        SpeederError: the checkpoint is damaged, or of another training.
    """
    config = config or kind.config_class()
    file = None if checkpoint is None else Path(checkpoint)
    epochs = config.epochs if epochs is None else epochs
    if epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {epochs}")
    sequences = [item_array("training_sequences", sequence) for sequence in training_sequences]
    check_sequences("training_sequences", sequences, num_items)
    windows = cut_windows(sequences, config.max_length)
    if not windows:
        raise ValueError("training_sequences: expected at least one sequence of two items, got none")
    log = log or (lambda record: None)
    device, data_hash = torch.device(device), training_hash(sequences)
    settings = {"config": asdict(config), "epochs": epochs, "seed": seed, "validated": validation is not None}
    identity = json.dumps({**settings, "data": data_hash})
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = kind(num_items, config).to(device)
        examples, rng = model.examples(windows), np.random.default_rng(seed)
        description = description or kind.__name__
        _train(model, examples, validation, epochs, rng, log, file, identity, description)
    model.training_hash = data_hash
    return model.eval()


def _train(
    model: SequentialModel,
    examples: list[np.ndarray],
    validation: tuple[Sequence[Sequence[int]], Sequence[int]] | None,
    epochs: int,
    rng: np.random.Generator,
    log: Callable[[dict], None],
    checkpoint: Path | None,
    identity: str,
    description: str,
) -> None:
    config = model.config
    optimizer = _optimizer(model)
    steps = epochs * -(-len(examples) // config.batch_size)
    now, best_weights = FitState(), None
    if checkpoint is not None and checkpoint.exists():
        now, best_weights = load_checkpoint(checkpoint, model, optimizer, rng, identity)
        for record in now.records:
            log(record)
    with showing(description, epochs, "epoch", initial=now.epoch) as work:
        while now.epoch < epochs and not (validation and now.epoch - now.best_epoch >= config.patience):
            record = {
                "epoch": now.epoch + 1,
                "loss": _train_epoch(model, optimizer, examples, rng, now, steps),
            }
            if not np.isfinite(record["loss"]):
                raise ValueError(
                    f"loss: no longer finite in epoch {record['epoch']}; lower learning_rate={config.learning_rate}"
                )
            now.epoch += 1
            if validation is not None:
                record["NDCG@10"] = _validate(model, *validation)
                if record["NDCG@10"] > now.best:
                    now.best, now.best_epoch = record["NDCG@10"], now.epoch
                    best_weights = copy.deepcopy(model.state_dict())
            now.records.append(record)
            if checkpoint is not None:
                save_checkpoint(checkpoint, model, optimizer, best_weights, now, rng, identity)
            work.update()
            work.tell(**{key: f"{value:.4f}" for key, value in record.items() if key != "epoch"})
            log(record)
    if best_weights is not None:
        model.load_state_dict(best_weights)


def _optimizer(model: SequentialModel) -> torch.optim.Optimizer:
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    decay = model.config.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=model.config.learning_rate, fused=True)


def _train_epoch(
    model: SequentialModel,
    optimizer: torch.optim.Optimizer,
    examples: list[np.ndarray],
    rng: np.random.Generator,
    now: FitState,
    steps: int,
) -> float:
    """One pass over all examples; returns the mean loss per item and advances ``now.step``."""
    model.train()
    total, count = 0.0, 0
    for batch in length_batches(examples, model.config.batch_size, rng):
        for group in optimizer.param_groups:
            group["lr"] = model.config.learning_rate * rate_factor(now.step, steps)
        states, targets = model.states(batch)
        loss_sum = item_cross_entropy(states, model.items.weight, targets, scale=1.0).sum()
        optimizer.zero_grad(set_to_none=True)
        (loss_sum / len(targets)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        now.step += 1
        total, count = total + loss_sum.item(), count + len(targets)
    return total / count


def rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate in a step: linear warm-up over the first twentieth, then linear decay to zero."""
    warmup = max(1, round(_WARMUP * steps))
    return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))


def _validate(model: SequentialModel, histories: Sequence[Sequence[int]], targets: Sequence[int]) -> float:
    """Mean NDCG@10 with seen items masked."""
    ranks = []
    for start in range(0, len(histories), _VALIDATION_BATCH):
        batch = histories[start : start + _VALIDATION_BATCH]
        batch_targets = torch.as_tensor(
            np.asarray(targets[start : start + _VALIDATION_BATCH], dtype=np.int64)
        )
        ranks.append(target_ranks(model.score(batch), batch_targets, batch))
    return float(metric_values(torch.cat(ranks).numpy(), "NDCG@10").mean())


def cut_windows(sequences: Sequence[np.ndarray], max_length: int) -> list[np.ndarray]:
    """Windows of at most ``max_length + 1`` items; every item but a sequence's first is predicted once.

    Windows are aligned to a sequence's end and overlap by the one item that the later window starts from.
    """
    windows = []
    for sequence in sequences:
        for end in range(len(sequence), 1, -max_length):
            windows.append(sequence[max(0, end - max_length - 1) : end])
    return windows


def length_batches(
    examples: list[np.ndarray], batch_size: int, rng: np.random.Generator
) -> Iterator[list[np.ndarray]]:
    """Shuffled batches with each example once; similar lengths are together, so that there is little padding."""
    order = rng.permutation(len(examples))
    batches = []
    for start in range(0, len(order), _BUCKET_BATCHES * batch_size):
        bucket = sorted(
            order[start : start + _BUCKET_BATCHES * batch_size], key=lambda index: len(examples[index])
        )
        batches += [bucket[first : first + batch_size] for first in range(0, len(bucket), batch_size)]
    for number in rng.permutation(len(batches)):
        yield [examples[index] for index in batches[number]]
