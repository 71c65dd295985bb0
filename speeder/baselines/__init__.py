"""Baselines that every table carries."""

from speeder.baselines.popularity import Popularity
from speeder.baselines.sasrec import BEAUTY, MOVIELENS, SASRec, SASRecConfig

__all__ = ["BEAUTY", "MOVIELENS", "Popularity", "SASRec", "SASRecConfig"]
