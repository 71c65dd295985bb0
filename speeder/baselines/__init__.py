"""Baselines: popularity, neighbours, SASRec, BSARec, text-reading language models. Names load on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speeder.baselines.bsarec.fit import fit_bsarec
    from speeder.baselines.bsarec.model import BSARec
    from speeder.baselines.fit_neighbours import fit_neighbours
    from speeder.baselines.neighbours import Neighbours
    from speeder.baselines.popularity import Popularity
    from speeder.baselines.sasrec.fit import fit_sasrec
    from speeder.baselines.sasrec.model import SASRec
    from speeder.recipes.bsarec import BSARecConfig
    from speeder.recipes.neighbours import NeighboursConfig
    from speeder.recipes.sasrec import SASRecConfig

_WHERE = {
    "BSARec": "speeder.baselines.bsarec.model",
    "BSARecConfig": "speeder.recipes.bsarec",
    "Neighbours": "speeder.baselines.neighbours",
    "NeighboursConfig": "speeder.recipes.neighbours",
    "Popularity": "speeder.baselines.popularity",
    "SASRec": "speeder.baselines.sasrec.model",
    "SASRecConfig": "speeder.recipes.sasrec",
    "fit_bsarec": "speeder.baselines.bsarec.fit",
    "fit_neighbours": "speeder.baselines.fit_neighbours",
    "fit_sasrec": "speeder.baselines.sasrec.fit",
}
__all__ = [
    "BSARec",
    "BSARecConfig",
    "Neighbours",
    "NeighboursConfig",
    "Popularity",
    "SASRec",
    "SASRecConfig",
    "fit_bsarec",
    "fit_neighbours",
    "fit_sasrec",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'speeder.baselines' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_WHERE[name]), name)
    return value
