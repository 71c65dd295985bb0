"""Which split prepared data get: leave one out, or two dates for everybody."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np

from speeder.data.interactions import Interactions, LeaveOneOut
from speeder.data.prepared import PreparedData
from speeder.data.temporal_split import DATES, TemporalSplit, as_date
from speeder.errors import SpeederError
from speeder.prepare.ties import Ties

SPLITS = (LeaveOneOut.name, TemporalSplit.name)
SHARES = (0.8, 0.9)  # of the interactions, before validation and before test


def check_rules(ties: Ties, split: str, split_time: Sequence[float | str] | None, has_times: bool) -> None:
    """Refuse rules that do not fit together, or not the data; called before hours of work.

    Raises:
        SpeederError: an unknown split, dates without a temporal split or not two of them; or the data have no times,
            and ties or split need some.
    """
    if split not in SPLITS:
        raise SpeederError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if split_time is not None and (split != TemporalSplit.name or len(split_time) != 2):
        raise SpeederError(
            "split-time: expected two dates or shares, for validation and test, with --split temporal, got"
            f" {' '.join(map(str, split_time))} with {split}"
        )
    if has_times:
        return
    if ties.order != "file":
        raise SpeederError(
            f"ties: expected 'file' for data without times, whose lines are in order, got {ties.order!r}"
        )
    if split != LeaveOneOut.name:
        raise SpeederError(f"split: expected {LeaveOneOut.name!r} for data without times, got {split!r}")


def with_split(data: PreparedData, split: str, split_time: Sequence[float | str] | None) -> PreparedData:
    """The data whose manifest records the split; see `check_rules`.

    Args:
        split_time: for validation and test, each a date in ISO 8601 (without a zone, in UTC), or a share of the
            interactions between 0 and 1: the date is then the time of the interaction behind that share. None:
            `SHARES`.

    Raises `SpeederError` for dates that cannot be read, are in the wrong order, or leave nobody to validate or test.
    """
    if split != TemporalSplit.name:
        return data
    given = SHARES if split_time is None else split_time
    first, second = (_seconds(value, data.interactions) for value in given)
    if first >= second:
        raise SpeederError(
            "split-time: expected a validation date before the test date, got"
            f" {as_date(first)} and {as_date(second)} of {given[0]} and {given[1]}"
        )
    dates = {"validation_from": first, "test_from": second}
    data = replace(data, manifest={**data.manifest, DATES: dates})
    for name in ("validation", "test"):
        if not len(data.split.users(name)):
            raise SpeederError(f"split-time: no user has a {name} target; {data.split.requirement}")
    return replace(data, manifest={**data.manifest, "split": data.split.rule})


def _seconds(value: float | str, interactions: Interactions) -> int:
    """A date in seconds since 1970; a share of the interactions gives the time of the one behind it."""
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if 0 < share < 1:
        place = int(share * len(interactions))
        return int(np.partition(interactions.time, place)[place])
    try:
        date = datetime.fromisoformat(value if isinstance(value, str) else "")
    except ValueError:
        raise SpeederError(
            "split-time: expected a date such as 2014-01-31, or a share of the interactions between 0 and 1, got"
            f" {value!r}"
        ) from None
    return int((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp())
