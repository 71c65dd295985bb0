"""Runs a recipe: its stages one after another, each a Hugging Face `Trainer`, resumable at any moment.

`run_folder.py` describes the run folder; `stages/<stage>/` has checkpoints, TensorBoard logs and `log.json`. A
checkpoint counts only with the marker that is written after it (`checkpoints.py`).
"""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainerCallback, TrainingArguments, set_seed

from speeder.baselines.auto import baseline_class
from speeder.data.fingerprints import training_hash
from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.evaluation.leaks import check_features, check_split
from speeder.io.disk_full import writing
from speeder.io.progress import say, showing
from speeder.model.loading import load_tokenizer
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.processor import SpeederProcessor, template_ids
from speeder.model.sequences import IGNORED, TokenSequence, pack_batch
from speeder.model.title_prompts import TitleExamples, TitlePrompts
from speeder.recipes.schema import AUTO, Recipe, Stage
from speeder.training.bad_batches import BadBatches
from speeder.training.callbacks import CheckpointMarker, EpochTeller, NegativesClock
from speeder.training.checkpoints import last_checkpoint, remove_checkpoint
from speeder.training.dataset import TrainingSequences, check_users, occurs, target_counts
from speeder.training.distributed import check_shared, from_main, processes
from speeder.training.ema import WeightAverage
from speeder.training.fsdp import copy_for_sharding
from speeder.training.fsdp_trainer import ShardedTrainer, sharding_is_asked
from speeder.training.mpo import GateRamp, select_parameters
from speeder.training.pair_weight import choose_pair_weight
from speeder.training.precision import resolve_precision
from speeder.training.progress import StageProgress, stage_line
from speeder.training.run_folder import (
    begin_run,
    begun_precision,
    finish_stage,
    read_state,
    stage_folder,
    write_stage_log,
)
from speeder.training.trainer import SpeederTrainer


def train(
    recipe: Recipe,
    data: PreparedData,
    run: str | Path,
    *,
    resume: bool = False,
    data_folder: str | Path | None = None,
    on_stage: Callable[[Stage, SpeederForCausalLM], None] | None = None,
    precision: str | None = None,
) -> SpeederForCausalLM:
    """Train a recommender by a recipe, on one process or on all that `torchrun` or `accelerate launch` started.

    Your own script on several processes must end with `accelerate.PartialState().destroy_process_group()`, as the
    command does: otherwise threads of the group may abort a process at its end.

    Args:
        recipe: the recipe; every modality that it opens must be in `data.catalogue`.
        data: a prepared set; only `data.split.training()` is used for training.
        run: the run folder; new or empty unless `resume`.
        resume: resume from the last checkpoint, within a stage or between stages. The recipe and the data must be
            those of the run.
        data_folder: the folder of `data`, recorded in the run so that later commands find it.
        on_stage: called by the main process after each finished stage, with the stage and the model; after a resume
            once more for the last finished stage.
        precision: `"bf16"`, `"fp16"` or `"fp32"` for a recipe with `"auto"`; None: the faster on this machine. A
            resumed run keeps its precision.

    Returns:
        the finished recommender, in evaluation mode; also saved in `run/model`.

    Raises:
        SpeederError: the folder is in use, or has nothing to resume; the recipe or the data are not the run's; the
            data have no user to train or to validate on, or leak (`LeakError`).
    """
    run = Path(run)
    _check_modalities(recipe, data)
    _check_negatives(recipe, data)
    check_split(data.split, data.interactions)
    check_features(data)
    check_users(data.split)
    state = read_state(run, recipe, data, resume)
    tokenizer = load_tokenizer(recipe.backbone)
    model = _load_model(run, state, recipe, data, tokenizer)
    if model.config.item_embedding:
        model.set_trained_items(torch.from_numpy(occurs(data.split.training(), len(data.catalogue))))
    if model.item_counts is None:
        model.set_item_counts(data.split.training())
    if recipe.pairs and model.item_pairs is None:
        model.set_item_pairs(data.split.training())
    # a baseline keeps its tokenizer itself
    processor = SpeederProcessor(tokenizer, model.config, data.catalogue) if recipe.baseline is None else None
    prompts = None
    if any(stage.titles for stage in recipe.stages):
        prompts = TitlePrompts(tokenizer, model.config, data.catalogue, recipe.title_template)
    main = processes().is_main_process
    asked = precision if precision and recipe.precision == AUTO else recipe.precision
    precision = from_main((begun_precision(run) or resolve_precision(asked)) if main else None)
    on_stage = on_stage if main else None
    processes().wait_for_everyone()  # until all have read the folder
    if main:
        begin_run(run, recipe, data, data_folder, precision)
        _clear_finished(run, state)
    check_shared(run / "recipe.json")
    if on_stage is not None and state["finished"]:
        # the run may have been stopped between the stage's end and this call
        on_stage(recipe.stages[len(state["finished"]) - 1], model)
    examples = model.training_examples(recipe.supervision)
    sequences = TrainingSequences(data.split.training(), model.config, recipe.supervision, **examples)
    recipe = replace(recipe, precision=precision)
    steps = [_stage_steps(stage, recipe, len(sequences)) for stage in recipe.stages]
    opened: set[str] = set()
    done = sum(steps[: len(state["finished"])])
    with showing("training", sum(steps), "step", initial=done, show=main) as work:
        for number, stage in enumerate(recipe.stages):
            if number >= len(state["finished"]):
                shown = StageProgress(work, f"{stage.name} (stage {number + 1} of {len(steps)})")
                _run_stage(number, stage, opened, model, recipe, data, run, sequences, prompts, shown)
                last = stage is recipe.stages[-1]
                if last and recipe.pairs:
                    _choose_pair_weight(model, data, state)
                _finish_stage(number, stage, model, processor, run, state, last)
                if on_stage is not None:
                    on_stage(stage, model)
            opened |= set(stage.open)
    return model.eval()


def _choose_pair_weight(model: SpeederForCausalLM, data: PreparedData, state: dict) -> None:
    """Set the weight of the item pairs, and note it in the run's state, which is written with the last stage's model: a
    run that is stopped in between chooses again, from the same weights."""
    main = processes().is_main_process
    found = from_main(choose_pair_weight(model, data.split) if main else None)
    model.config.pair_weight = found["pair_weight"]
    state["pairs"] = found
    if main:
        values = {each["pair_weight"]: each["NDCG@10"] for each in found["tried"]}
        say(
            f"item pairs: weight {found['pair_weight']:.3g}, validation NDCG@10 "
            f"{values[found['pair_weight']]:.4f} (without pairs {values[0.0]:.4f})"
        )


def _stage_steps(stage: Stage, recipe: Recipe, examples: int) -> int:
    """Optimizer steps of a stage over so many examples, as `Trainer` counts them."""
    batches = math.ceil(examples / (stage.batch_users or recipe.batch_users))
    return stage.steps or math.ceil(stage.epochs * math.ceil(batches / recipe.gradient_accumulation_steps))


def _check_modalities(recipe: Recipe, data: PreparedData) -> None:
    if recipe.baseline is not None:
        return
    for stage in recipe.stages:
        for name in stage.open:
            setting = {"item": "item_embedding", "words": "words"}.get(name)
            if setting is not None and not recipe.model.get(setting):
                raise SpeederError(
                    f"stage {stage.name!r} opens {name!r}, which needs model: {{{setting}: true}}"
                )
            if setting is not None:
                continue
            if name not in data.catalogue.modalities:
                known = ", ".join(data.catalogue.modalities) or "none"
                raise SpeederError(f"stage {stage.name!r} opens {name!r}, but the prepared data has: {known}")


def _check_negatives(recipe: Recipe, data: PreparedData) -> None:
    """Each draw takes memory, and more draws than items are of less use than `full`."""
    draws, items = recipe.model.get("num_negatives"), len(data.catalogue)
    if recipe.model.get("negatives") == "sampled" and isinstance(draws, int) and draws > items:
        raise SpeederError(
            f"recipe: model: num_negatives: expected at most {items}, the items of the catalogue, got {draws}"
        )


def _load_model(run: Path, state: dict, recipe: Recipe, data: PreparedData, tokenizer) -> SpeederForCausalLM:
    kind = SpeederForCausalLM if recipe.baseline is None else baseline_class(recipe.baseline)
    if state["model"]:
        return kind.from_pretrained(run / state["model"])
    set_seed(recipe.seed)
    opened = {name for stage in recipe.stages for name in stage.open}
    try:
        if recipe.baseline is not None:
            own = {"tokenizer": tokenizer, "template": recipe.template, "lora": recipe.lora}
        else:
            prefix, suffix = template_ids(tokenizer, recipe.template)
            own = {"lora": recipe.lora, "prompt_prefix": prefix, "prompt_suffix": suffix}
            own["modalities"] = [name for name in data.catalogue.modalities if name in opened]
        model = kind.from_backbone(
            recipe.backbone,
            data.catalogue,
            layers=recipe.layers,
            random_weights=recipe.random_weights,
            **own | recipe.model,
        )
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise SpeederError(f"recipe: model: {' '.join(str(error).split())}") from error
    for stage in recipe.stages:  # unknown parts are found before the first stage runs
        select_parameters(model, stage, recipe.weight_decay)
    model.config.training_hash = training_hash(data.split.training())
    return model


def _run_stage(
    number: int,
    stage: Stage,
    opened: set[str],
    model: SpeederForCausalLM,
    recipe: Recipe,
    data: PreparedData,
    run: Path,
    sequences: TrainingSequences | TitleExamples,
    prompts: TitlePrompts | None,
    shown: StageProgress,
) -> None:
    folder = stage_folder(run, number, stage.name)
    steps = _stage_steps(stage, recipe, len(sequences))
    callbacks: list[TrainerCallback] = [shown]
    if stage.titles:
        sequences = TitleExamples(sequences, stage.titles, prompts, recipe.seed, stage.name)
        callbacks.append(EpochTeller(sequences.set_epoch))
    if model.config.negatives != "full":
        model.negatives.set_counts(target_counts(data.split.training(), len(data.catalogue)))
        callbacks.append(NegativesClock())
    checkpoint = from_main(last_checkpoint(folder, steps) if processes().is_main_process else None)
    if checkpoint is not None:
        check_shared(checkpoint)
    ramp = GateRamp(stage, opened, steps)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=stage.epochs,
        max_steps=stage.steps or -1,
        # of all devices together, see SharedBatches
        per_device_train_batch_size=stage.batch_users or recipe.batch_users,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=stage.learning_rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_ratio,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=recipe.log_steps,
        logging_nan_inf_filter=False,  # see BadBatches
        logging_first_step=True,  # so that even the shortest stage has a loss in its log
        eval_strategy="steps",
        eval_steps=recipe.checkpoint_steps,
        eval_delay=ramp.steps,  # the best checkpoint is sought among those with the gates wholly open
        save_strategy="steps",
        save_steps=recipe.checkpoint_steps,
        save_total_limit=None,  # see CheckpointMarker
        # the best ranking need not write the best titles: a stage with titles keeps its last weights
        load_best_model_at_end=recipe.keep_best and not stage.titles,
        metric_for_best_model="NDCG@10",
        greater_is_better=True,
        remove_unused_columns=False,
        seed=recipe.seed + number,
        report_to=["tensorboard"],
        # a process may not use a part that others train, such as the head for items
        ddp_find_unused_parameters=True,
        ddp_broadcast_buffers=False,  # the catalogue's features, which all have
        run_name=stage.name,
    )
    # packed batches cannot be split by DataParallel; use a launcher
    arguments._n_gpu = min(1, arguments.n_gpu)
    trained, kind = model, SpeederTrainer
    if sharding_is_asked():
        trained, kind = copy_for_sharding(model), ShardedTrainer
    groups = select_parameters(trained, stage, recipe.weight_decay)
    average = WeightAverage(trained, recipe.ema_decay) if recipe.ema_decay else None
    trainer = kind(
        model=trained,
        plain=model,
        args=arguments,
        train_dataset=sequences,
        eval_dataset=[],
        data_collator=lambda share: pack_batch(share or [_unasked(sequences[0])], with_labels=True),
        callbacks=[*callbacks, ramp, CheckpointMarker()],
        split=data.split,
        parameter_groups=groups,
        average=average,
        bad_batches=BadBatches(stage.name, recipe.skip_bad_batches),
    )
    with writing(folder):  # such as TensorBoard's logs
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    processes().wait_for_everyone()  # until all have read the best checkpoint, which is now removed
    if average is not None:
        average.copy_to_model()
    trainer.gather()
    ramp.set_offsets(model, steps)
    if processes().is_main_process:
        resumed_from = checkpoint.name if checkpoint else None
        log = trainer.state.log_history
        seconds = log[-1]["train_runtime"]
        skipped = trainer.bad_batches.tell(trainer.state)
        write_stage_log(folder, stage.name, log, seconds, resumed_from, arguments.world_size, skipped)
        say(stage_line(shown.stage, log, seconds, last=stage is recipe.stages[-1]))
    if processes().use_distributed:
        # the stage's wrapper must let go of the gradients before the next one takes them
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()


def _unasked(sequence: TokenSequence) -> TokenSequence:
    """A sequence without targets, for a process without a share of a batch: it must compute with the others."""
    return TokenSequence(sequence.ids, sequence.ranks, [IGNORED] * len(sequence.ids))


def _finish_stage(
    number: int,
    stage: Stage,
    model: SpeederForCausalLM,
    processor: SpeederProcessor | None,
    run: Path,
    state: dict,
    last: bool,
) -> None:
    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)

    if processes().is_main_process:
        finish_stage(run, state, stage.name, save, "model" if last else f"model-{number + 1:02d}")
        _clear_finished(run, state)
    state.update(from_main(state))


def _clear_finished(run: Path, state: dict) -> None:
    """Remove finished stages' checkpoints, and models that a later one replaced; a killed run may have left them."""
    for number, name in enumerate(state["finished"]):
        for checkpoint in stage_folder(run, number, name).glob("checkpoint-*"):
            remove_checkpoint(checkpoint)
        if state["model"] != (replaced := f"model-{number + 1:02d}"):
            shutil.rmtree(run / replaced, ignore_errors=True)
