"""Baselines that every table carries."""

from speeder.baselines.popularity import Popularity
from speeder.baselines.sasrec.fit import fit_sasrec
from speeder.baselines.sasrec.model import SASRec
from speeder.recipes.sasrec import SASRecConfig

__all__ = ["Popularity", "SASRec", "SASRecConfig", "fit_sasrec"]
