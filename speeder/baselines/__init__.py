"""Baselines: popularity, content neighbours, SASRec, and text-reading language models. Names load on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speeder.baselines.popularity import Popularity
    from speeder.baselines.sasrec.fit import fit_sasrec
    from speeder.baselines.sasrec.model import SASRec
    from speeder.recipes.sasrec import SASRecConfig

_WHERE = {
    "Popularity": "speeder.baselines.popularity",
    "SASRec": "speeder.baselines.sasrec.model",
    "SASRecConfig": "speeder.recipes.sasrec",
    "fit_sasrec": "speeder.baselines.sasrec.fit",
}
__all__ = ["Popularity", "SASRec", "SASRecConfig", "fit_sasrec"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'speeder.baselines' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_WHERE[name]), name)
    return value
