"""A training recipe: a YAML file of MPO stages, read into validated dataclasses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from speeder.errors import SpeederError

AUTO = "auto"  # `precision`: the faster one on the machine at hand
PRECISIONS = ("bf16", "fp16", "fp32")
MODALITIES = ("text", "image", "collaborative")  # what the encoders make; prepared data may have more

# The prompt for titles. It begins as a ranking sequence does, so what ranking learned is used.
TITLE_TEMPLATE = "{history}\nCandidates:\n{candidates}\nChosen next:\n"

# What a stage may train. "backbone:N" is the backbone's last N layers (and its final norm).
PARTS = ("experts", "gate", "item", "head", "spae", "lora", "backbone", "embeddings")

# The text baselines (`speeder/baselines/`): their trainable parts, and the supervision that they support.
BASELINES = {
    "text-prompt": (("item", "head", "lora", "backbone", "embeddings"), ("all", "last")),
    "title-generation": (("lora", "backbone", "embeddings"), ("last",)),
    "yes-no": (("lora", "backbone", "embeddings"), ("last",)),
}


class NoStageLeft(SpeederError):
    """A recipe opens only modalities that the data lack."""


@dataclass
class Stage:
    """One stage of MPO, Modality-aware Progressive Optimization.

    Attributes:
        name: shown in logs, tables and plots.
        open: modalities whose gates are open ("item" is the learned item embedding).
        train: parts that learn, of [`PARTS`]; everything else is frozen.
        epochs: passes over the training sequences (fractions are allowed); or
        steps: optimizer steps, which override epochs.
        learning_rate: peak rate of the new parts.
        item_learning_rate: peak rate of the learned item embedding; None: `learning_rate`. Each item's row is trained
            by few targets, so it needs a higher rate than weights that all items share.
        backbone_learning_rate: peak rate of the backbone's own weights and of LoRA.
        ramp_steps: steps in which a newly opened modality's gate goes from nearly closed to open.
        titles: share of the examples with a title as the target instead of items, see `TitleExamples`.
        batch_users: overrides the recipe's.
    """

    name: str
    open: list[str] = field(default_factory=list)
    train: list[str] = field(default_factory=lambda: ["experts", "gate", "item", "head", "spae", "backbone"])
    epochs: float = 1.0
    steps: int | None = None
    learning_rate: float = 1e-3
    item_learning_rate: float | None = None
    backbone_learning_rate: float = 3e-4
    ramp_steps: int = 20
    titles: float = 0.0
    batch_users: int | None = None

    def __post_init__(self):
        for key, least in (
            ("open", 0),
            ("train", 1),
        ):  # a baseline has nothing to open; `Recipe` checks the rest
            names = getattr(self, key)
            if len(names) < least or not all(isinstance(name, str) for name in names):
                raise SpeederError(f"stage {self.name!r}: {key}: expected at least one name, got {names}")
        for part in self.train:
            name, _, last = part.partition(":")
            if name not in PARTS or (last and not (name == "backbone" and last.isdigit() and int(last) > 0)):
                raise SpeederError(
                    f"stage {self.name!r}: train: expected parts of {', '.join(PARTS)} or 'backbone:N', got {part!r}"
                )
        if self.epochs <= 0 or (self.steps is not None and self.steps <= 0):
            raise SpeederError(f"stage {self.name!r}: expected epochs and steps above 0")
        if (
            min(
                self.learning_rate, self.item_learning_rate or 0, self.backbone_learning_rate, self.ramp_steps
            )
            < 0
        ):
            raise SpeederError(f"stage {self.name!r}: expected learning rates and ramp_steps of at least 0")
        if not 0.0 <= self.titles <= 1.0:
            raise SpeederError(f"stage {self.name!r}: titles: expected a share in [0, 1], got {self.titles}")
        if self.batch_users is not None and self.batch_users < 1:
            raise SpeederError(
                f"stage {self.name!r}: batch_users: expected at least 1, got {self.batch_users}"
            )


@dataclass
class Recipe:
    """A whole training run.

    Attributes:
        backbone: Hub id, folder, or an asset's name.
        baseline: one of [`BASELINES`], to train instead of Speeder; stages then open nothing, and parts that the
            baseline lacks are not trained.
        layers: keep only this many of the backbone's first layers; None keeps all.
        random_weights: initialise the backbone's weights (for ablations).
        template: the prompt around the history; `"{history}"` means items only.
        title_template: the prompt of stages with `titles`, around `{history}` and `{candidates}`.
        model: further arguments of [`SpeederConfig`].
        lora: arguments of `peft.LoraConfig` (`r`, `lora_alpha`, `target_modules`, ...); None leaves adapters out.
        supervision: `"all"` or `"last"`, see `build_sequence`.
        batch_users: training sequences per batch, which all devices share.
        gradient_accumulation_steps: batches per optimizer step.
        precision: `"bf16"` (autocast), `"fp16"`, `"fp32"`, or `"auto"`
        weight_decay, warmup_ratio, max_grad_norm: of AdamW, its cosine schedule, and gradient clipping.
        ema_decay: decay of the moving average of the weights, which is evaluated and saved in their place; 0: none.
        checkpoint_steps: steps between checkpoints, each with a validation ranking.
        skip_bad_batches: steps of a stage that may be skipped because loss or gradient are not finite; one more is an
            error. A run may be resumed with another number.
        keep_best: end a stage with its checkpoint of the best validation NDCG@10.
        log_steps: steps between log lines.
        seed: seed of everything random.
        stages: in order.
    """

    stages: list[Stage]
    backbone: str = "smollm2-135m"
    baseline: str | None = None
    layers: int | None = None
    random_weights: bool = False
    template: str = "{history}"
    title_template: str = TITLE_TEMPLATE
    model: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    supervision: str = "all"
    batch_users: int = 64
    gradient_accumulation_steps: int = 1
    precision: str = AUTO
    weight_decay: float = 0.01
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    checkpoint_steps: int = 100
    keep_best: bool = True
    log_steps: int = 5
    skip_bad_batches: int = 0
    seed: int = 0

    def __post_init__(self):
        if not self.stages:
            raise SpeederError("recipe: expected at least one stage, got none")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise SpeederError(f"recipe: expected stages with different names, got {', '.join(names)}")
        for name, allowed in (("precision", (AUTO, *PRECISIONS)), ("supervision", ("all", "last"))):
            if getattr(self, name) not in allowed:
                raise SpeederError(
                    f"recipe: {name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in ("batch_users", "gradient_accumulation_steps", "checkpoint_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise SpeederError(f"recipe: {name}: expected at least 1, got {getattr(self, name)}")
        if self.skip_bad_batches < 0:
            raise SpeederError(f"recipe: skip_bad_batches: expected at least 0, got {self.skip_bad_batches}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise SpeederError(f"recipe: ema_decay: expected a number in [0, 1), got {self.ema_decay}")
        if self.baseline is not None:
            self._fit_baseline()
        for stage in self.stages:
            if not stage.open and self.baseline is None:
                raise SpeederError(
                    f"stage {stage.name!r}: open: expected at least one name, got {stage.open}"
                )
        if self.lora is None and any("lora" in stage.train for stage in self.stages):
            raise SpeederError("recipe: a stage trains 'lora', but the recipe has no 'lora' section")

    def _fit_baseline(self) -> None:
        if self.baseline not in BASELINES:
            raise SpeederError(
                f"recipe: baseline: expected one of {', '.join(BASELINES)}, got {self.baseline!r}"
            )
        parts, supervisions = BASELINES[self.baseline]
        if self.supervision not in supervisions:
            raise SpeederError(
                f"recipe: supervision: expected 'last' for {self.baseline!r}, got {self.supervision!r}"
            )
        for stage in self.stages:
            if stage.titles:
                raise SpeederError(
                    f"stage {stage.name!r}: titles: expected 0 for the baseline {self.baseline!r}, got {stage.titles}"
                )
            train = [part for part in stage.train if part.partition(":")[0] in parts]
            if not train:
                raise SpeederError(f"stage {stage.name!r}: train: expected some of {', '.join(parts)}")
            stage.train, stage.open = train, ["item"] if "item" in parts else []

    def for_modalities(self, available: list[str], keep_stages: bool = False) -> tuple[Recipe, list[str]]:
        """The recipe for the available modalities, without others, and without stages that then open nothing new.

        Args:
            keep_stages: leave out only stages that open nothing at all, so that recipes keep their number of steps.

        Returns:
            the recipe, and one line for each stage that is left out or changed.

        Raises:
            NoStageLeft: none of its modalities is available.
            SpeederError: a stage opens an unknown modality.
        """
        if self.baseline is not None:  # reads titles, not features
            return self, []
        stages, notes, noted = [], [], set()
        opened: set[str] = set()
        wanted: set[str] = set()  # what would be open by now if the data had all modalities
        known = {*available, *MODALITIES, "item"}
        for stage in self.stages:
            for name in stage.open:
                if name not in known:
                    raise SpeederError(
                        f"stage {stage.name!r}: open: expected some of {', '.join(sorted(known))}, got {name!r}"
                    )
        for stage in self.stages:
            there = [name for name in stage.open if name in available or name == "item"]
            missing = [name for name in stage.open if name not in there]
            # the stage is only for missing modalities
            idle = set(there) <= opened and not set(stage.open) <= wanted and not stage.titles
            wanted |= set(stage.open)
            if missing and (not there or (idle and not keep_stages)):
                notes.append(f"stage {stage.name!r} is left out: no item has {', '.join(missing)} features")
                noted |= set(missing)
                continue
            if set(missing) - noted:
                notes.append(
                    f"stage {stage.name!r} runs without {', '.join(missing)}: no item has such features"
                )
            opened |= set(there)
            stages.append(dataclasses.replace(stage, open=there))
        if not stages:
            raise NoStageLeft(
                f"recipe: no stage is left with the available modalities: {', '.join(available) or 'none'}"
            )
        return dataclasses.replace(self, stages=stages), notes

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML, without a stage's unused keys.

        So a run of a version without these keys can still be resumed.
        """
        plain = dataclasses.asdict(self)
        if not any(stage.titles for stage in self.stages):
            del plain["title_template"]
        if not self.skip_bad_batches:
            del plain["skip_bad_batches"]
        for stage in plain["stages"]:
            for key in ("titles", "batch_users", "item_learning_rate"):
                if not stage[key]:
                    del stage[key]
        return plain
