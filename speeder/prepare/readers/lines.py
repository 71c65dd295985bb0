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
_LOGGED_EACH = 20  # line numbers logged per reason: a file of another format would fill the log
_BAR_LINES = 4096  # lines between two updates of the progress bar


class BadLine(Exception):
    """A line cannot be used; the message is the reason in the counts. The readers always catch it."""


class LineCount:
    """Counts a file's lines as read, kept, or dropped with a reason; broken lines are logged by number."""

    def __init__(self, path: Path):
        self.path, self.read, self.dropped = path, 0, Counter()

    def drop(self, number: int, reason: str) -> None:
        """Counts line `number` (from 1), which is broken, as dropped."""
        self.dropped[reason] += 1
        if self.dropped[reason] <= _LOGGED_EACH:
            more = " (further ones are only counted)" if self.dropped[reason] == _LOGGED_EACH else ""
            log.warning("%s line %d dropped: %s%s", self.path, number, reason, more)

    def leave_out(self, reason: str, lines: int = 1) -> None:
        """Counts valid lines that a filter, or the choice of items, leaves out."""
        if lines:
            self.dropped[reason] += lines

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
                    count.drop(number, "not UTF-8" if encoding == "utf-8" else f"not {encoding}")
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
