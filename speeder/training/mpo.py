"""MPO, Modality-aware Progressive Optimization: modalities are opened to a text-pretrained language model one by one.

The paper names the idea; its form here is this project's own reading. A recipe is a list of stages. Each stage says
which modalities are open and which parts learn. The gate of a newly opened modality ramps up over some steps, so that
what was learned before is not disturbed at once. Each stage is an ordinary Hugging Face `Trainer` run.
"""

from __future__ import annotations

from torch import nn
from transformers import TrainerCallback

from speeder.errors import SpeederError
from speeder.model.mrc import CLOSED
from speeder.recipes.schema import Stage

RAMP_START = (
    -6.0
)  # gate logit offset at the start of a ramp: a weight of about 0.25 % beside one open modality


def gate_offset(newly_open: bool, is_open: bool, step: int, ramp_steps: int) -> float:
    """The gate logit offset of a modality at a step of a stage: 0 open, `CLOSED` closed, between them during its ramp.

    Args:
        newly_open: opened by this stage.
        step: optimizer steps done in this stage.
    """
    if not is_open:
        return CLOSED
    if not newly_open or step >= ramp_steps:
        return 0.0
    return RAMP_START * (1.0 - step / ramp_steps)


class GateRamp(TrainerCallback):
    """Sets `mrc.gate_offset` at each step of a stage. It depends only on the step, so a resumed run has the same.

    Args:
        opened_before: modalities that earlier stages opened. In the first stage there is nothing to protect by a ramp,
            so its gates are open from the start.
        stage_steps: optimizer steps of the whole stage; a ramp takes at most half of them.
    """

    def __init__(self, stage: Stage, opened_before: set[str], stage_steps: int):
        self.stage = stage
        self.new = set(stage.open) - opened_before if opened_before else set()
        self.steps = min(stage.ramp_steps, stage_steps // 2) if self.new else 0

    def set_offsets(self, model: nn.Module, step: int) -> None:
        for column, name in enumerate(model.mrc.names):
            is_open = name in self.stage.open
            model.mrc.gate_offset[column] = gate_offset(name in self.new, is_open, step, self.steps)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.set_offsets(model, state.global_step)


def select_parameters(model: nn.Module, stage: Stage, weight_decay: float) -> list[dict]:
    """Freeze everything but the stage's trained parts, and group these for AdamW.

    Closed modalities' experts and gates are frozen too. Vectors, scalars and bias tables have no weight decay.

    Returns:
        parameter groups with `params`, `lr`, `weight_decay` and a `name`, in the model's order.

    Raises:
        SpeederError: nothing would be trained.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    item_rate = stage.learning_rate if stage.item_learning_rate is None else stage.item_learning_rate
    word_rate = stage.learning_rate if stage.word_learning_rate is None else stage.word_learning_rate
    rates = {
        "backbone": stage.backbone_learning_rate,
        "item": item_rate,
        "word": word_rate,
        "new": stage.learning_rate,
    }
    layers = model.config.text_config.num_hidden_layers
    for part in stage.train:
        if part.startswith("backbone:") and int(part.partition(":")[2]) > layers:
            raise SpeederError(f"stage {stage.name!r}: train: expected at most {layers} layers, got {part!r}")
    heads = (model.backbone.get_input_embeddings(), model.backbone.get_output_embeddings())
    embeddings = {id(head.weight) for head in heads if head is not None}
    for name, parameter in model.named_parameters():
        part = "embeddings" if id(parameter) in embeddings else _part_of(name, stage, layers)
        part = None if part == "embeddings" and part not in stage.train else part
        parameter.requires_grad_(part is not None)
        if part is not None:
            decays = parameter.ndim >= 2 and not name.startswith("spae.")
            kind = "new"
            if part in ("backbone", "lora", "embeddings"):
                kind = "backbone"
            elif part == "item":
                kind = "item"
            elif name == "mrc.words.vectors.weight":
                kind = "word"
            groups.setdefault((kind, decays), []).append(parameter)
    if not groups:
        raise SpeederError(
            f"stage {stage.name!r}: none of {', '.join(stage.train) or 'no part'} has weights in this model"
        )
    return [
        {
            "name": kind + ("" if decays else ", no decay"),
            "params": parameters,
            "lr": rates[kind],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (kind, decays), parameters in sorted(groups.items(), key=lambda entry: entry[0])
    ]


def _part_of(name: str, stage: Stage, layers: int) -> str | None:
    """The trained part that a parameter belongs to; None if it is frozen."""
    path = name.split(".")
    if path[0] == "mrc":
        if path[1] in ("experts", "gates"):
            part = "experts" if path[1] == "experts" else "gate"
            return part if part in stage.train and path[2] in stage.open else None
        if path[1] in ("item_embedding", "item_gate"):
            part = "item" if path[1] == "item_embedding" else "gate"
            return part if part in stage.train and "item" in stage.open else None
        if path[1] in ("words", "word_gate"):
            part = "experts" if path[1] == "words" else "gate"
            return part if part in stage.train and "words" in stage.open else None
        return "experts" if "experts" in stage.train else None  # the norm after the experts
    if path[0] in ("spae", "history"):
        return "spae" if "spae" in stage.train else None
    if path[0] in ("item_head", "logit_scale"):
        return "head" if "head" in stage.train else None
    if any(piece.startswith("lora_") for piece in path):
        return "lora" if "lora" in stage.train else None
    for part in stage.train:
        kind, _, last = part.partition(":")
        if kind == "backbone":
            numbers = [int(piece) for piece in path if piece.isdigit()]
            first = layers - int(last) if last else 0
            return "backbone" if not numbers or numbers[0] >= first else None
    return None
