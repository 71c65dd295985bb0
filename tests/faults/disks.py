"""Disks without room: a real one of a few megabytes where one may be mounted, and a limit to files' lengths."""

import errno
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

LONGEST = 16_384  # bytes of a file, where there is a limit


class SmallDisk:
    """A folder on a disk that can be filled up, and emptied again.

    Args:
        folder: on a tmpfs of its own, or (`limit`) on any disk, where files are then kept short.
    """

    def __init__(self, folder: Path, limit: bool):
        self.folder, self.limit = folder, limit
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, keep: int = 0) -> None:
        """From now on nothing more can be written, but for `keep` bytes."""
        if self.limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LONGEST, self._limits[1]))
            return
        with open(self.folder / ".ballast", "ab", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError as error:
                    assert error.errno == errno.ENOSPC
            file.truncate(file.tell() - keep)

    def empty(self) -> None:
        """There is room again."""
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)
        (self.folder / ".ballast").unlink(missing_ok=True)


@contextmanager
def small_disk(kind: str, place: Path, megabytes: int = 8) -> Iterator[SmallDisk]:
    """A disk of the kind "full" (skips the test where nothing may be mounted) or "limit"."""
    if kind == "full":
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
        try:
            done = subprocess.run(mount, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount")
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    disk = SmallDisk(place, kind == "limit")
    try:
        yield disk
    finally:
        disk.empty()
        if kind == "full":
            subprocess.run(["umount", "--lazy", str(place)], check=True)
