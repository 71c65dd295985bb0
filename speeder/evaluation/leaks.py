"""Checks that no target was trained on. They always run; docs/protocols.md says which runs where."""

from typing import TYPE_CHECKING

import numpy as np

from speeder.data.fingerprints import FITTED_ON_NOTHING, features_hash, training_hash
from speeder.data.temporal_split import TemporalSplit, as_date
from speeder.errors import SpeederError

if TYPE_CHECKING:
    from speeder.data import PreparedData
    from speeder.data.interactions import Interactions, Split
    from speeder.evaluation.candidates import Candidates


class LeakError(SpeederError):
    """Training had access to something that is to be predicted."""


def check_split(split: "Split", interactions: "Interactions | None" = None) -> None:
    """Check that a split's training parts end before its targets.

    For every evaluated user, the validation history must be the training part, and the test history the training part,
    then the validation target. If a target were in the training part, they would differ. An item with which a user
    interacted twice may be both in training and a target. In a temporal split a user may have one target alone, and
    more interactions between the validation target and the test target.

    Args:
        split: the split to check.
        interactions: the interactions of the split. With them, training part and targets must also be the user's
            sequence in order of time, so a split that is wrong throughout is found too. Of a temporal split, all
            training must be before the first date, and each target the user's first item from its date on.

    Raises:
        LeakError: naming the first user for whom it does not hold.
    """
    training = split.training()
    users = {name: split.users(name) for name in ("validation", "test")}
    histories = {
        name: dict(zip(users[name].tolist(), split.histories(name), strict=True))
        for name in ("validation", "test")
    }
    if any(len(histories[name]) != len(users[name]) for name in users):
        raise LeakError("split: a user is evaluated more than once")
    temporal = isinstance(split, TemporalSplit)
    if not temporal and not np.array_equal(users["validation"], users["test"]):
        raise LeakError("split: validation and test are over different users")
    for user, history in histories["validation"].items():
        if not np.array_equal(history, training[user]):
            raise LeakError(
                f"user {user}: the training part is not the validation history, so one holds a target"
            )
    targets = dict(zip(users["validation"].tolist(), split.targets("validation").tolist(), strict=True))
    for user, history in histories["test"].items():
        expected = [*training[user], *([targets[user]] if user in targets else [])]
        if temporal:  # what else the user had before the second date follows
            history = history[: len(expected)]
        if not np.array_equal(history, expected):
            raise LeakError(
                f"user {user}: the test history is not the training part and the validation target"
            )
    if interactions is None:
        return
    same_user = np.diff(interactions.user) == 0
    if np.any(np.diff(interactions.time)[same_user] < 0):
        raise LeakError(
            "interactions: not in order of time, so training may have interactions after a target"
        )
    if temporal:
        _check_dates(split, interactions, training)
    else:
        _check_whole(split, interactions, training, users["test"])


def _check_whole(split: "Split", interactions: "Interactions", training: list, users: np.ndarray) -> None:
    held_out = dict(
        zip(users, zip(split.targets("validation"), split.targets("test"), strict=True), strict=True)
    )
    for user, sequence in enumerate(interactions.sequences()):
        if not np.array_equal(sequence, [*training[user], *held_out.get(user, ())]):
            raise LeakError(
                f"user {user}: training part and targets together are not the user's interactions"
            )


def _check_dates(split: "TemporalSplit", interactions: "Interactions", training: list) -> None:
    """The times themselves are looked at, so that nothing rests on how the split was computed."""
    times, sequences = interactions.times(), interactions.sequences()
    for user, (sequence, time) in enumerate(zip(sequences, times, strict=True)):
        if not np.array_equal(training[user], sequence[time < split.validation_from]):
            raise LeakError(
                f"user {user}: the training part is not what the user had before {as_date(split.validation_from)}"
            )
    ends = {"validation": split.test_from, "test": np.inf}
    for name, start in (("validation", split.validation_from), ("test", split.test_from)):
        columns = zip(split.users(name).tolist(), split.histories(name), split.targets(name), strict=True)
        for user, history, target in columns:
            later = sequences[user][(times[user] >= start) & (times[user] < ends[name])]
            if not np.array_equal(history, sequences[user][times[user] < start]):
                raise LeakError(
                    f"user {user}: the {name} history is not what the user had before {as_date(start)}"
                )
            if not len(later) or target != later[0]:
                raise LeakError(
                    f"user {user}: the {name} target is not the first item from {as_date(start)} on"
                )


def check_training_hash(recorded: str, split: "Split", what: str = "model") -> None:
    """Check that ``what`` (a model or collaborative features) was fitted only on this split's training part.

    Raises:
        LeakError: the recorded hash is not ``training_hash(split.training())``.
    """
    expected = training_hash(split.training())
    if recorded != expected:
        raise LeakError(
            f"{what}: fitted on interactions {recorded[:12]}…, this split's training part is {expected[:12]}…"
        )


def check_model_training(model: object, split: "Split") -> str | None:
    """Check that a model, and the item pairs that it has counted, were fitted only on this split's training part.

    Returns:
        the hash that the model has recorded; None: it does not tell what it was fitted on.

    Raises:
        LeakError: they were fitted on other interactions.
    """
    name, recorded = type(model).__name__, getattr(model, "training_hash", None)
    if recorded is not None:
        check_training_hash(recorded, split, name)
    pairs = getattr(model, "item_pairs", None)
    if pairs is not None:
        check_training_hash(pairs.training_hash, split, f"{name}'s item pairs")
    return recorded


def check_candidates(candidates: "Candidates", split: "Split", num_items: int) -> None:
    """Check that a split's candidates are those of their seed, and depend on nothing else, such as the target.

    They are drawn again over the whole catalogue and compared, whatever the file says about itself.

    Args:
        num_items: items in the catalogue. The file's own number is not used: a file over a few chosen items would
            otherwise be drawn again over those.

    Raises:
        SpeederError: they were drawn for another split.
        LeakError: drawn over other than `num_items` items, or naming the first user whose negatives differ.
    """
    if candidates.split_hash != split.hash():
        raise SpeederError(
            f"candidates: drawn for the split {candidates.split_hash[:12]}…, this one is {split.hash()[:12]}…"
        )
    if candidates.num_items != num_items:
        raise LeakError(
            f"candidates: drawn over {candidates.num_items} items, the catalogue has {num_items}: not the same task"
        )
    if not np.array_equal(candidates.users, split.users(candidates.split)):
        raise LeakError(f"candidates: not over the users of the split's {candidates.split} targets")
    count = candidates.negatives.shape[1]
    drawn = candidates.draw(split, candidates.split, num_items, count, candidates.seed)
    differ = (drawn.negatives != candidates.negatives).any(axis=1)
    if differ.any():
        raise LeakError(
            f"user {candidates.users[differ.argmax()]}: the negatives are not those of seed {candidates.seed} "
            f"({int(differ.sum())} users), so they may depend on something else, such as the target"
        )


def check_features(data: "PreparedData") -> None:
    """Check that no features of a prepared set were fitted on targets.

    Every modality needs a record in `manifest["encoders"]`, with the `features_hash` of the catalogue's features.
    The record says what they were fitted on: a `training_hash`, which must be the split's, or
    `"fitted_on": "no interactions"`, which is believed. `PreparedData.with_features` writes a record.

    Raises:
        LeakError: they were fitted on something else, are not those of the record, or have no record.
    """
    records = data.manifest.get("encoders")
    for name, features in data.catalogue.features.items():
        record = records.get(name) if isinstance(records, dict) else None
        if not isinstance(record, dict):
            raise LeakError(
                f"{name} features: expected a record of what they were fitted on, found none; add them by "
                "PreparedData.with_features, which writes one"
            )
        if "features_hash" not in record:
            raise LeakError(
                f"{name} features: their record has no hash of the features (data of an earlier version); prepare the "
                "data again"
            )
        found = features_hash(features, data.catalogue.present[name])
        if record["features_hash"] != found:
            raise LeakError(
                f"{name} features: not those of their record (hash {found[:12]}…, recorded "
                f"{str(record['features_hash'])[:12]}…), so what they were fitted on is unknown"
            )
        _check_origin(name, record, data.split)


def check_model_features(model: object, data: "PreparedData") -> None:
    """Check that a model with its own catalogue has exactly the features that `check_features` checked.

    A model without a catalogue may have `features_hashes` instead: modality -> hash of the features it was fitted on.

    Raises:
        LeakError: naming the first modality whose features differ.
    """
    catalogue = getattr(model, "catalogue", None)
    hashes = getattr(model, "features_hashes", None) or {}
    if catalogue is not None:
        names = getattr(getattr(model, "config", None), "modalities", None) or {}
        hashes = {name: features_hash(catalogue.features[name], catalogue.present[name]) for name in names}
    for name, found in hashes.items():
        record = data.manifest.get("encoders", {}).get(name, {})
        if name not in data.catalogue.features or found != record.get("features_hash"):
            raise LeakError(
                f"{type(model).__name__}: its {name} features differ from the prepared data's, so what they were "
                "fitted on is unknown"
            )


def _check_origin(name: str, record: dict, split: "Split") -> None:
    if record.get("training_hash") is not None:
        check_training_hash(str(record["training_hash"]), split, f"{name} features")
    elif record.get("fitted_on") != FITTED_ON_NOTHING:
        raise LeakError(
            f"{name} features: expected a record with a training_hash, or with "
            f'"fitted_on": "{FITTED_ON_NOTHING}", got {record.get("training_hash")!r} and {record.get("fitted_on")!r}'
        )
