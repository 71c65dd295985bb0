"""What a full disk looks like: one error that names the file, whichever library was writing it."""

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
_RUST = re.compile(r"\(os error (\d+)\)")  # how safetensors tells the error number
_TORCH = re.compile(r"PytorchStreamWriter|unexpected pos|file write failed")  # which tells no number


class WriteError(SpeederError):
    """A file could not be written for want of room, or since the disk fails.

    Attributes:
        path: what was to be written. reason: the system's word for why.
    """

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} cannot be written: {reason}; nothing that was there before is lost")
        self.path, self.reason = path, reason


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Makes one `WriteError` of whatever Python, Arrow, safetensors or torch raises where a disk takes no more.

    Other errors pass, and so does one that names its file already, but for a temporary one inside `path`'s folder.
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
    """Arrow's error, where anything has imported Arrow."""
    return (sys.modules["pyarrow"].ArrowException,) if "pyarrow" in sys.modules else ()


def _reason(error: Exception) -> str | None:
    """Why the disk took no more; None where the error is another one."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return os.strerror(error.errno)
    text = str(error)
    told = _RUST.search(text)
    if told and int(told[1]) in _NO_ROOM:
        return os.strerror(int(told[1]))
    for number in _NO_ROOM:
        if os.strerror(number) in text:
            return os.strerror(number)
    if isinstance(error, RuntimeError) and _TORCH.search(text):
        return "the disk takes no more"
    return None
