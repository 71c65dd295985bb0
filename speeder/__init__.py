"""Speeder: multimodal LLM recommenders in which an item is one token.

The names below load on first use, so that `import speeder` and `speeder --help` are quick. Importing
`SpeederForCausalLM` registers it with transformers' `AutoConfig` and `AutoModelForCausalLM`, importing
`SpeederProcessor` with `AutoProcessor`.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Interactions": "speeder.data",
    "ItemCatalogue": "speeder.data",
    "LeaveOneOut": "speeder.data",
    "PreparedData": "speeder.data",
    "Recipe": "speeder.recipe",
    "SpeederConfig": "speeder.config",
    "SpeederError": "speeder.errors",
    "SpeederForCausalLM": "speeder.model",
    "SpeederProcessor": "speeder.processor",
    "UserSessions": "speeder.sessions",
    "load_recipe": "speeder.recipe",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'speeder' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
