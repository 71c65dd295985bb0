"""Baselines that every table carries."""

from speeder.baselines.popularity import Popularity
from speeder.baselines.sasrec import SASRec, SASRecConfig

__all__ = ["Popularity", "SASRec", "SASRecConfig"]
