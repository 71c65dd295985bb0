"""Runs a function in a process that is killed at its n-th touch of the file system."""

import os
import shutil
import signal
from collections.abc import Callable

import pyarrow.parquet as pq

import speeder.data.catalogue

_TOUCHES = [
    *((os, name) for name in ("mkdir", "replace", "unlink")),
    (shutil, "rmtree"),
    (pq.ParquetWriter, "write_table"),
    (speeder.data.catalogue, "save_file"),
]
_KILLED = -signal.SIGKILL


def killed_at(touch: int, function: Callable[[], None]) -> bool:
    """Whether the process was killed before it was done; an error in it fails the test."""
    child = os.fork()
    if child == 0:
        _die_at(touch)
        try:
            function()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, _KILLED), f"the child ended with {status}"
    return status == _KILLED


def _die_at(touch: int) -> None:
    count = 0

    def counted(real: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            nonlocal count
            if count == touch:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return real(*arguments, **options)

        return call

    for module, name in _TOUCHES:
        setattr(module, name, counted(getattr(module, name)))
