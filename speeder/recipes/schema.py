"""A training recipe: a YAML file of MPO stages, read into checked dataclasses."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, ConfigDict, Field
from typing_extensions import TypedDict

from speeder.errors import SpeederError
from speeder.recipes.checked import (
    SETTINGS,
    Arguments,
    Count,
    CountOrZero,
    Epochs,
    NotNegative,
    Seed,
    Share,
    ShareBelowOne,
    Size,
    Text,
    all_finite,
    checked,
)
from speeder.recipes.templates import TITLE_FIELDS, template_text

AUTO = "auto"  # `precision`: the faster one on the machine at hand
PRECISIONS = ("bf16", "fp16", "fp32")
MODALITIES = ("text", "image", "collaborative")  # what the encoders make; prepared data may have more

# The prompt for titles. It begins as a ranking sequence does, so what ranking learned is used.
TITLE_TEMPLATE = "{history}\nCandidates:\n{candidates}\nChosen next:\n"
USUAL_TEMPLATE = "{history}"  # items alone; of a baseline, its own prompt

# What a stage may train. "backbone:N" is the backbone's last N layers (and its final norm).
LEARNED = ("words", "item")  # modalities that are no features: word vectors, and the learned item embedding
_RATES = (("item_learning_rate", None), ("word_learning_rate", None))
PARTS = ("experts", "gate", "item", "head", "spae", "lora", "backbone", "embeddings")


# The text baselines, see `speeder/baselines/`.
class Baseline(NamedTuple):
    """What a text baseline's recipe may have: parts to train, supervision, and fields of its template, in order."""

    parts: tuple[str, ...]
    supervisions: tuple[str, ...]
    fields: tuple[str, ...]


_OF_BACKBONE = ("lora", "backbone", "embeddings")
BASELINES = {
    "text-prompt": Baseline(("item", "head", *_OF_BACKBONE), ("all", "last"), ("history",)),
    "title-generation": Baseline(_OF_BACKBONE, ("last",), ("history", "candidates")),
    "yes-no": Baseline(_OF_BACKBONE, ("last",), ("history", "candidate")),
}


class NoStageLeft(SpeederError):
    """A recipe opens only modalities that the data lack."""


class LoraArguments(TypedDict, total=False):
    """Arguments of `peft.LoraConfig`, which checks those that are not here."""

    __pydantic_config__ = SETTINGS | ConfigDict(extra="allow")

    r: Size
    lora_alpha: Annotated[int | float, Field(gt=0)]
    lora_dropout: Annotated[int | float, Field(ge=0, lt=1)]
    target_modules: list[Text] | Text


@checked()
class Stage:
    """One stage of MPO, Modality-aware Progressive Optimization.

    Attributes:
        name: shown in logs, tables and plots.
        open: modalities whose gates are open ("item" is the learned item embedding, "words" the learned word vectors).
        train: parts that learn, of [`PARTS`]; everything else is frozen.
        epochs: passes over the training sequences (fractions are allowed); or
        steps: optimizer steps, which override epochs.
        learning_rate: peak rate of the new parts.
        item_learning_rate: peak rate of the learned item embedding; None: `learning_rate`. Each item's row is trained
            by few targets, so it needs a higher rate than weights that all items share.
        word_learning_rate: peak rate of the word vectors, for the same reason; None: `learning_rate`.
        backbone_learning_rate: peak rate of the backbone's own weights and of LoRA.
        ramp_steps: steps in which a newly opened modality's gate goes from nearly closed to open.
        titles: share of the examples with a title as the target instead of items, see `TitleExamples`.
        batch_users: overrides the recipe's.
    """

    name: Annotated[str, Field(min_length=1, max_length=100)]
    open: list[str] = field(default_factory=list)
    train: list[str] = field(default_factory=lambda: ["experts", "gate", "item", "head", "spae", "backbone"])
    epochs: Epochs = 1.0
    steps: Count | None = None
    learning_rate: NotNegative = 1e-3
    item_learning_rate: NotNegative | None = None
    word_learning_rate: NotNegative | None = None
    backbone_learning_rate: NotNegative = 3e-4
    ramp_steps: CountOrZero = 20
    titles: Share = 0.0
    batch_users: Count | None = None

    def __post_init__(self):
        if not self.train:
            raise SpeederError("train: expected at least one part, got none")
        for part in self.train:
            name, _, last = part.partition(":")
            numbered = name == "backbone" and last.isdecimal() and last.isascii() and int(last[:9]) > 0
            if name not in PARTS or (":" in part and not numbered):
                raise SpeederError(
                    f"train: expected parts of {', '.join(PARTS)} or 'backbone:N', got {part!r}"
                )


@checked()
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
        pairs: count which items are near each other in training histories, add that to the scores, and choose its
            weight on the validation items after the last stage.
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

    stages: Annotated[list[Stage], Field(min_length=1)]
    backbone: Text = "smollm2-135m"
    baseline: Literal["text-prompt", "title-generation", "yes-no"] | None = None
    layers: Count | None = None
    random_weights: bool = False
    template: str = "{history}"
    title_template: str = TITLE_TEMPLATE
    model: Arguments = field(default_factory=dict)
    lora: Annotated[LoraArguments, AfterValidator(all_finite)] | None = None
    supervision: Literal["all", "last"] = "all"
    pairs: bool = False
    batch_users: Count = 64
    gradient_accumulation_steps: Count = 1
    precision: Literal["auto", "bf16", "fp16", "fp32"] = AUTO
    weight_decay: NotNegative = 0.01
    warmup_ratio: ShareBelowOne = 0.05
    max_grad_norm: NotNegative = 1.0
    ema_decay: ShareBelowOne = 0.0
    checkpoint_steps: Count = 100
    keep_best: bool = True
    log_steps: Count = 5
    skip_bad_batches: CountOrZero = 0
    seed: Seed = 0

    def __post_init__(self):
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise SpeederError(f"stages: expected different names, got {', '.join(names)}")
        if self.model.get("pair_weight"):
            raise SpeederError(
                f"model: pair_weight: expected none, as pairs: true chooses it, got {self.model['pair_weight']!r}"
            )
        if self.baseline is not None:
            self._fit_baseline()
        for stage in self.stages:
            if not stage.open and self.baseline is None:
                raise SpeederError(
                    f"stage {stage.name!r}: open: expected at least one name, got {stage.open}"
                )
        if self.lora is None and any("lora" in stage.train for stage in self.stages):
            raise SpeederError("lora: expected arguments, since a stage trains 'lora', got none")
        fields = ("history",) if self.baseline is None else BASELINES[self.baseline].fields
        if self.baseline is None or self.template != USUAL_TEMPLATE:
            _check_template("template", self.template, fields)
        _check_template("title_template", self.title_template, TITLE_FIELDS)

    def _fit_baseline(self) -> None:
        parts, supervisions, _ = BASELINES[self.baseline]
        if self.pairs:
            raise SpeederError(f"pairs: expected false for the baseline {self.baseline!r}, got true")
        if self.supervision not in supervisions:
            raise SpeederError(
                f"supervision: expected 'last' for {self.baseline!r}, got {self.supervision!r}"
            )
        for stage in self.stages:
            where = f"stage {stage.name!r}: "
            if stage.titles:
                raise SpeederError(
                    f"{where}titles: expected 0 for the baseline {self.baseline!r}, got {stage.titles}"
                )
            train = [part for part in stage.train if part.partition(":")[0] in parts]
            if not train:
                raise SpeederError(f"{where}train: expected some of {', '.join(parts)}, got {stage.train}")
            stage.train, stage.open = train, ["item"] if "item" in parts else []

    def for_modalities(self, available: list[str], keep_stages: bool = False) -> tuple[Recipe, list[str]]:
        """The recipe for the available modalities, without others, and without stages that then open nothing new.

        Args:
            available: modalities of the data, and "words" if items have texts (`ItemCatalogue.readable`).
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
        known = {*available, *MODALITIES, *LEARNED}
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
        model = self.model
        if model.get("words") and "words" not in available:
            model = {**model, "words": False}
        return dataclasses.replace(self, stages=stages, model=model), notes

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML, without some unused keys.

        So a run of a version without these keys can still be resumed.
        """
        plain = dataclasses.asdict(self)
        if not any(stage.titles for stage in self.stages):
            del plain["title_template"]
        for key in ("skip_bad_batches", "pairs"):
            if not plain[key]:
                del plain[key]
        for stage in plain["stages"]:
            for key, unused in (("titles", 0.0), ("batch_users", None), *_RATES):
                if stage[key] == unused:
                    del stage[key]
        return plain


def _check_template(name: str, template: str, fields: tuple[str, ...]) -> None:
    try:
        template_text(template, fields)
    except ValueError as error:
        raise SpeederError(f"{name}: {error}") from error
