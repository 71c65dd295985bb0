"""What every reader of raw lines needs: counts of what was kept and dropped, and why."""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from speeder.errors import SpeederError

log = logging.getLogger(__name__)

_LOGGED_EACH = 20  # line numbers logged per reason: a file of another format would fill the log


class LineCount:
    """Counts a file's lines as read, kept, or dropped for a reason; dropped lines are logged by number."""

    def __init__(self, path: Path):
        self.path, self.read, self.dropped = path, 0, Counter()

    def drop(self, number: int, reason: str) -> None:
        """Counts line `number` (from 1) as dropped."""
        self.dropped[reason] += 1
        if self.dropped[reason] <= _LOGGED_EACH:
            more = " (further ones are only counted)" if self.dropped[reason] == _LOGGED_EACH else ""
            log.warning("%s line %d dropped: %s%s", self.path, number, reason, more)

    def summary(self) -> dict:
        """`{"read", "kept", "dropped": {reason: count}}`, for a manifest."""
        return {"read": self.read, "kept": self.read - self.dropped.total(), "dropped": dict(self.dropped)}


def read_table(path: Path, columns: list[str], count: LineCount) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a tab-separated file whose header names each column as `name:type`, with their line numbers.

    Blank lines are passed over; lines that are not UTF-8 or have another number of fields are dropped and
    counted. Raises `SpeederError` where the file cannot be read or its header lacks one of `columns`.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise SpeederError(f"{path} cannot be read: {error.strerror or error}") from error
    header = lines[0].decode("utf-8-sig", errors="replace").rstrip("\r").split("\t")
    names = [field.partition(":")[0] for field in header]
    missing = [name for name in columns if name not in names]
    if missing:
        raise SpeederError(
            f"{path} has no column {missing[0]!r}; its first line names {', '.join(names)[:200]}"
        )
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        count.read += 1
        try:
            fields = line.decode("utf-8").rstrip("\r").split("\t")
        except UnicodeDecodeError:
            count.drop(number, "not UTF-8")
            continue
        if len(fields) != len(names):
            count.drop(number, "wrong number of fields")
            continue
        yield number, dict(zip(names, fields, strict=True))
