"""Item catalogues, interactions, splits and prepared data sets."""

from speeder.data.catalogue import ItemCatalogue
from speeder.data.interactions import Interactions, LeaveOneOut
from speeder.data.prepared import PreparedData

__all__ = ["Interactions", "ItemCatalogue", "LeaveOneOut", "PreparedData"]
