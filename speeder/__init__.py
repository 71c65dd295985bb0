"""Speeder: multimodal LLM recommenders in which an item is one token.

The names below load on first use, so that `import speeder` and `speeder --help` are quick. Importing
`SpeederForCausalLM` registers it with transformers' `AutoConfig` and `AutoModelForCausalLM`, importing
`SpeederProcessor` with `AutoProcessor`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speeder.data import Interactions, ItemCatalogue, LeaveOneOut, PreparedData
    from speeder.errors import SpeederError
    from speeder.evaluation.evaluate import evaluate
    from speeder.model.config import SpeederConfig
    from speeder.model.modeling import SpeederForCausalLM
    from speeder.model.processor import SpeederProcessor
    from speeder.recipes.load import load_recipe
    from speeder.recipes.schema import Recipe
    from speeder.serving.sessions import UserSessions
    from speeder.training.train import train

__version__ = "0.2.0.dev0"

_WHERE = {
    "Interactions": "speeder.data",
    "ItemCatalogue": "speeder.data",
    "LeaveOneOut": "speeder.data",
    "PreparedData": "speeder.data",
    "Recipe": "speeder.recipes.schema",
    "SpeederConfig": "speeder.model.config",
    "SpeederError": "speeder.errors",
    "SpeederForCausalLM": "speeder.model.modeling",
    "SpeederProcessor": "speeder.model.processor",
    "UserSessions": "speeder.serving.sessions",
    "evaluate": "speeder.evaluation.evaluate",
    "load_recipe": "speeder.recipes.load",
    "train": "speeder.training.train",
}
__all__ = [
    "Interactions",
    "ItemCatalogue",
    "LeaveOneOut",
    "PreparedData",
    "Recipe",
    "SpeederConfig",
    "SpeederError",
    "SpeederForCausalLM",
    "SpeederProcessor",
    "UserSessions",
    "evaluate",
    "load_recipe",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'speeder' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
