"""Raw files line by line, in little memory, with counts of kept lines and of dropped ones by reason."""

import gzip
import io
import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from speeder.errors import SpeederError
from speeder.io.progress import showing

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 4 << 20  # the longest real line (an Amazon item with its page's HTML) is far shorter
BLANK = "blank"  # the reason under which lines without any text are counted
NOT_UTF8, SAVE_AS_UTF8 = "not UTF-8", "save the file as UTF-8"
_LOGGED_EACH = 5  # lines logged per reason: a file of another format would fill the log
_NEARLY_ALL = 0.95  # share of a file's lines that is no accident
_BAR_LINES = 4096  # lines between two updates of the progress bar


class BadLine(Exception):
    """A line cannot be used; the message is the reason in the counts. The readers always catch it.

    Attributes:
        remedy: what came, what is expected and what to do; "" where the reason says it.
    """

    def __init__(self, reason: str, remedy: str = ""):
        super().__init__(reason)
        self.remedy = remedy

    @property
    def told(self) -> str:
        """Reason and remedy."""
        return f"{self} ({self.remedy})" if self.remedy else str(self)


class LineCount:
    """Counts a file's lines as read, kept, or dropped with a reason; broken lines are logged by number.

    Attributes:
        unused: the names of the table's columns that are not read.
    """

    def __init__(self, path: Path):
        self.path, self.read, self.dropped = path, 0, Counter()
        self.unused: list[str] = []
        self._first: dict[str, str] = {}  # reason -> its first line, with the remedy

    def drop(self, number: int, error: BadLine | str) -> None:
        """Counts line `number` (from 1), which is broken, as dropped; `error` is or has the reason."""
        error, reason = error if isinstance(error, BadLine) else BadLine(error), str(error)
        self.dropped[reason] += 1
        if error.remedy:
            self._first.setdefault(reason, f"line {number}: {error.remedy}")
        if self.dropped[reason] <= _LOGGED_EACH:
            more = "; further ones are only counted" if self.dropped[reason] == _LOGGED_EACH else ""
            log.warning("%s line %d dropped: %s%s", self.path, number, error.told, more)

    def leave_out(self, reason: str, lines: int = 1) -> None:
        """Counts valid lines that a filter, or the choice of items, leaves out."""
        if lines:
            self.dropped[reason] += lines

    def reasons(self) -> str:
        """Why lines were dropped, the most frequent reason first."""
        return "; ".join(
            f"{lines} {self._with_first(reason)}" for reason, lines in self.dropped.most_common()
        )

    def check(self) -> None:
        """Raises `SpeederError` if nearly every line was dropped for one reason that has a remedy.

        Such a file is meant in another way than it was read. Reasons without a remedy, such as a missing user, may
        well be true of most lines.
        """
        lines = self.read - self.dropped[BLANK]
        for reason in self._first:
            if self.dropped[reason] >= _NEARLY_ALL * lines:
                raise SpeederError(
                    f"{self.path}: {self.dropped[reason]} of {lines} lines cannot be used: {self._with_first(reason)}"
                )

    def _with_first(self, reason: str) -> str:
        return f"{reason} ({self._first[reason]})" if reason in self._first else reason

    def summary(self) -> dict:
        """`{"read", "kept", "dropped": {reason: count}}`, for a manifest."""
        return {"read": self.read, "kept": self.read - self.dropped.total(), "dropped": dict(self.dropped)}


def read_lines(
    path: Path,
    count: LineCount,
    *,
    encoding: str = "utf-8",
    limit: int = MAX_LINE_BYTES,
    raw_lines: bool = False,
) -> Iterator[tuple[int, str]]:
    """Lines of a plain or gzipped file with their numbers from 1, without their ends; read as a stream.

    Every line is counted as read. Lines of more than `limit` bytes (which are never held whole), in another encoding,
    or blank, are dropped and counted. With `raw_lines`, blank lines are not dropped, and lines keep their ends, since
    both may belong to a quoted cell. The progress display shows how much of the file is read. Raises `SpeederError`,
    with the line's number, if the file cannot be read or its gzip stream is broken or cut off.
    """
    number = 0
    try:
        with (
            open(path, "rb") as raw,
            showing(f"reading {path.name}", os.fstat(raw.fileno()).st_size, "B") as work,
        ):
            stream = _unpacked(raw)
            while line := stream.readline(limit + 1):
                number += 1
                count.read += 1
                if number % _BAR_LINES == 0:
                    work.update(raw.tell() - work.done)
                if len(line) > limit and not line.endswith(b"\n"):
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(limit)
                    count.drop(number, f"longer than {limit >> 20} MiB")
                    continue
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                try:
                    text = line.decode(encoding)
                except UnicodeDecodeError:
                    utf8 = encoding == "utf-8"
                    count.drop(number, BadLine(NOT_UTF8, SAVE_AS_UTF8) if utf8 else f"not {encoding}")
                    continue
                if not raw_lines:
                    text = text.rstrip("\r\n")
                    if not text or text.isspace():
                        count.drop(number, BLANK)
                        continue
                yield number, text
            work.update(raw.tell() - work.done)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SpeederError(
            f"{path} line {number + 1}: the gzip stream is broken or cut off ({error}); fetch the file again"
        ) from error
    except OSError as error:
        raise SpeederError(f"{path} cannot be read: {error.strerror or error}") from error


def _unpacked(raw: BinaryIO) -> BinaryIO:
    """The stream itself, or its gunzipped content, by its first bytes: names can be wrong."""
    magic = raw.read(2)
    raw.seek(0)
    return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20) if magic == b"\x1f\x8b" else raw
