"""Item catalogues, interactions, splits and prepared data sets."""

from speeder.data.catalogue import ItemCatalogue
from speeder.data.interactions import Interactions, LeaveOneOut
from speeder.data.prepared import PreparedData
from speeder.data.temporal_split import TemporalSplit

__all__ = ["Interactions", "ItemCatalogue", "LeaveOneOut", "PreparedData", "TemporalSplit"]
