"""Text baselines by name, and the class of a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from speeder.errors import SpeederError
from speeder.io.files import read_json

if TYPE_CHECKING:  # each is imported where a folder holds one, so that Speeder loads without the others
    from speeder.baselines.bsarec.model import BSARec
    from speeder.baselines.neighbours import Neighbours
    from speeder.baselines.sasrec.model import SASRec
    from speeder.baselines.text.base import TextBaseline
    from speeder.model.modeling import SpeederForCausalLM

_TEXT_BASELINE = "speeder-baseline"  # TextBaselineConfig.model_type


def baseline_class(name: str) -> type[TextBaseline]:
    """The class of a baseline.

    Raises:
        SpeederError: the name is unknown.
    """
    from speeder.baselines.text.text_prompt import TextPrompt
    from speeder.baselines.text.title_generation import TitleGeneration
    from speeder.baselines.text.yes_no import YesNo

    classes = {kind.name: kind for kind in (TextPrompt, TitleGeneration, YesNo)}
    if name not in classes:
        raise SpeederError(f"baseline: expected one of {', '.join(classes)}, got {name!r}")
    return classes[name]


def load_recommender(folder: str | Path) -> SpeederForCausalLM | SASRec | BSARec | Neighbours:
    """Load a saved recommender: Speeder, a text baseline, SASRec, BSARec or neighbours.

    Raises:
        SpeederError: the folder has none of these, or it is damaged.
    """
    config = read_json(Path(folder) / "config.json")
    if config.get("model_type") == _TEXT_BASELINE:
        return baseline_class(config.get("baseline", "")).from_pretrained(folder)
    if config.get("baseline") == "neighbours":
        from speeder.baselines.neighbours import Neighbours

        return Neighbours.load(folder)
    if config.get("baseline") == "bsarec":
        from speeder.baselines.bsarec.model import BSARec

        return BSARec.load(folder)
    if "model_type" not in config:  # theirs is no Hugging Face model
        from speeder.baselines.sasrec.model import SASRec

        return SASRec.load(folder)
    from speeder.model.modeling import SpeederForCausalLM

    return SpeederForCausalLM.from_pretrained(folder)


def load_model(folder: Path) -> SpeederForCausalLM | SASRec | BSARec | Neighbours:
    """The recommender in a folder; `SpeederError` if a file is missing or damaged."""
    try:
        return load_recommender(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise SpeederError(f"{folder}: not a readable recommender: {str(error).splitlines()[0]}") from error
