"""Leaving out items that have none of some modalities, for recipes that read no other."""

import logging
from collections.abc import Collection

import numpy as np
import torch

from speeder.data.interactions import Interactions
from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError

log = logging.getLogger(__name__)

REASON = "item without the modalities of --require"


def leave_out_bare(data: PreparedData, require: Collection[str]) -> PreparedData:
    """The data without items that have none of the modalities `require`, and without these items' interactions.

    Items and users keep their order; users without any other interaction are left out too. The manifest counts what is
    left out. Features that were fitted on interactions do not fit any more: fit them afterwards.

    Raises `SpeederError` if a modality is missing, or no interaction is left.
    """
    catalogue, interactions = data.catalogue, data.interactions
    missing = [name for name in require if name not in catalogue.features]
    if missing:
        has = ", ".join(catalogue.modalities) or "none"
        raise SpeederError(f"require: no item has {missing[0]} features; the data have: {has}")
    keep = torch.zeros(len(catalogue), dtype=torch.bool)
    for name in require:
        keep |= catalogue.present[name]
    if bool(keep.all()):
        return data
    kept = keep.numpy()[interactions.item]
    users, user = np.unique(interactions.user[kept], return_inverse=True)
    if not len(users):
        raise SpeederError(f"require: no interaction is left with items that have {' or '.join(require)}")
    rows = keep.nonzero().flatten().tolist()
    place = np.cumsum(keep.numpy()) - 1
    log.warning(
        "%d of %d items have no %s and are left out (the first: %r), with %d interactions and %d users",
        len(catalogue) - len(rows),
        len(catalogue),
        " or ".join(require),
        catalogue.ids[int((~keep).nonzero()[0])],
        int((~kept).sum()),
        len(interactions.user_ids) - len(users),
    )
    left = Interactions(
        user,
        place[interactions.item[kept]],
        interactions.time[kept],
        [interactions.user_ids[index] for index in users.tolist()],
    )
    manifest = _recorded(data.manifest, require, len(catalogue) - len(rows), int((~kept).sum()), len(users))
    return PreparedData(catalogue.select(rows), left, manifest)


def _recorded(manifest: dict, require: Collection[str], items: int, lines: int, users: int) -> dict:
    counts = dict(manifest.get("interactions", {}))
    if "kept" in counts:
        dropped = counts.get("dropped", {})
        counts |= {
            "kept": counts["kept"] - lines,
            "dropped": {**dropped, REASON: dropped.get(REASON, 0) + lines},
        }
    return {
        **manifest,
        "items": {**manifest.get("items", {}), "left_out": {"require": list(require), "items": items}},
        "interactions": counts,
        "users": users,
    }
