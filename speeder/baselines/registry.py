"""The text baselines by name, and the right class for a saved model."""

from __future__ import annotations

from pathlib import Path

from speeder.baselines.sasrec import SASRec
from speeder.baselines.text_model import TextBaseline, TextBaselineConfig
from speeder.baselines.text_prompt import TextPrompt
from speeder.baselines.title_generation import TitleGeneration
from speeder.baselines.yes_no import YesNo
from speeder.data.files import read_json
from speeder.errors import SpeederError
from speeder.model import SpeederForCausalLM

_CLASSES: dict[str, type[TextBaseline]] = {kind.name: kind for kind in (TextPrompt, TitleGeneration, YesNo)}


def baseline_class(name: str) -> type[TextBaseline]:
    """The class of a baseline.

    Raises:
        SpeederError: there is none of that name.
    """
    if name not in _CLASSES:
        raise SpeederError(f"baseline: expected one of {', '.join(_CLASSES)}, got {name!r}")
    return _CLASSES[name]


def load_recommender(folder: str | Path) -> SpeederForCausalLM | SASRec:
    """A saved recommender, be it Speeder, a text baseline or SASRec.

    Raises:
        SpeederError: the folder holds neither, or it is damaged.
    """
    config = read_json(Path(folder) / "config.json")
    if config.get("model_type") == TextBaselineConfig.model_type:
        return baseline_class(config.get("baseline", "")).from_pretrained(folder)
    if "model_type" not in config:  # theirs is no Hugging Face model
        return SASRec.load(folder)
    return SpeederForCausalLM.from_pretrained(folder)
