"""The global temporal split: all training lies before one date, all test targets from another date on."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime

import numpy as np

from speeder.data.fingerprints import training_hash
from speeder.data.interactions import FILE_ORDER, Interactions, LeaveOneOut, Split
from speeder.errors import SpeederError

DATES = "split_dates"  # the manifest's entry: validation_from and test_from, in seconds since 1970


class TemporalSplit(Split):
    """Splits all users at the same two dates.

    Interactions before `validation_from` train. A user's first interaction from then on, but before `test_from`, is the
    validation target; the first one from `test_from` on is the test target. The history of a target is all that the
    user had before the date. A user without anything before a date has no target of it.
    """

    name = "temporal"

    def __init__(
        self,
        interactions: Interactions,
        validation_from: int,
        test_from: int,
        ties: Mapping[str, object] | None = None,
    ):
        """Args:
            validation_from, test_from: seconds since 1970, the first below the second.

        Raises `ValueError` if they are not.
        """
        if not validation_from < test_from:
            raise ValueError(
                f"validation_from must be below test_from, but they are {validation_from} and {test_from}"
            )
        self.validation_from, self.test_from = validation_from, test_from
        lengths = interactions.lengths()
        before = [_before(interactions, date) for date in (validation_from, test_from)]
        places = {
            name: np.where((start > 0) & (start < end), start, -1)
            for name, start, end in zip(("validation", "test"), before, (before[1], lengths), strict=True)
        }
        first, second = as_date(validation_from), as_date(test_from)
        self.rule = (
            f"temporal: interactions before {first} train; a user's first interaction from then on, before {second},"
            f" is the validation target, the first one from {second} on the test target; users without an interaction"
            " before a date have no target of it"
        )
        self.title = f"Temporal split (training before {first}, test targets from {second} on)"
        self.requirement = (
            "the temporal split needs users with an interaction before a date and one after it"
            f" (validation from {first}, test from {second})"
        )
        super().__init__(interactions, before[0], places, ties)

    def may_be_targets(self, times: np.ndarray) -> np.ndarray:
        """`(n,)` bool: whether each of `(n,)` int64 times is after all training."""
        return times >= self.validation_from

    def _identity(self) -> bytes:
        # users without a target train too, and often are the most: histories do not tell of them
        dates = {"validation_from": self.validation_from, "test_from": self.test_from}
        trained = training_hash(self.training())
        return super()._identity() + json.dumps({**dates, "training": trained}, sort_keys=True).encode()


def _before(interactions: Interactions, date: int) -> np.ndarray:
    """`(U,)` int64: how many interactions each user has before a time in seconds."""
    earlier = interactions.user[interactions.time < date]
    return np.bincount(earlier, minlength=len(interactions.user_ids))


def as_date(seconds: int) -> str:
    """ISO 8601 in UTC: a date, with the time of day unless that is midnight."""
    moment = datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
    return moment.date().isoformat() if seconds % 86_400 == 0 else f"{moment.isoformat()}Z"


def recorded_split(interactions: Interactions, manifest: Mapping) -> Split:
    """The split that a prepared set's manifest records; leave one out, in the file's order, if it records none.

    Raises `SpeederError` if the record is damaged.
    """
    ties, dates = manifest.get("ties", FILE_ORDER), manifest.get(DATES)
    if not isinstance(ties, Mapping) or "order" not in ties:
        raise SpeederError(f"manifest: ties: expected a rule such as {FILE_ORDER}, got {ties!r}")
    if dates is None:
        return LeaveOneOut(interactions, ties)
    try:
        return TemporalSplit(interactions, int(dates["validation_from"]), int(dates["test_from"]), ties)
    except (KeyError, TypeError, ValueError) as error:
        raise SpeederError(
            f"manifest: {DATES}: expected validation_from and test_from, in seconds, got {dates!r}"
        ) from error
