"""One error for a full disk, which names the file, whichever library was writing."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from speeder.errors import SpeederError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors' error number
_TORCH = re.compile(r"PytorchStreamWriter|unexpected pos|file write failed")  # torch gives no number


class WriteError(SpeederError):
    """A file could not be written: the disk is full, or it fails.

    Attributes:
        path: the file or folder. reason: the system's message.
    """

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} cannot be written: {reason}; nothing that was there before is lost")
        self.path, self.reason = path, reason


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns what Python, Arrow, safetensors or torch raise on a full disk into one `WriteError`.

    Other errors pass, and so does one that already names its file, unless that is a temporary one in `path`'s folder.
    """
    path = Path(path)
    try:
        yield
    except WriteError as error:
        if any(part.endswith(".partial") for part in error.path.parts):
            raise WriteError(path, error.reason) from error
        raise
    except (OSError, SafetensorError, RuntimeError, *_arrow_errors()) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise WriteError(path, reason) from error


def _arrow_errors() -> tuple[type[Exception], ...]:
    """Arrow's error class, if Arrow was imported."""
    return (sys.modules["pyarrow"].ArrowException,) if "pyarrow" in sys.modules else ()


def _reason(error: Exception) -> str | None:
    """Why the disk cannot be written; None for other errors."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return os.strerror(error.errno)
    text = str(error)
    number = _RUST.search(text)
    if number and int(number[1]) in _NO_ROOM:
        return os.strerror(int(number[1]))
    for number in _NO_ROOM:
        if os.strerror(number) in text:
            return os.strerror(number)
    if isinstance(error, RuntimeError) and _TORCH.search(text):
        return "the disk takes no more"
    return None
