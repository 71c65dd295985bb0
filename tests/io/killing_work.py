"""Work whose worker is killed once, midway."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from speeder.io.parts import Work


def killed_once(make: Callable[[], Work], marker: Path) -> Work:
    """The work, but the first worker that finishes its second part is killed before that part is written."""
    work, calls = make(), []

    def work_or_die(table: pa.Table) -> pa.Table:
        made = work(table)
        calls.append(len(made))
        if len(calls) == 2 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    return work_or_die


def failing() -> Work:
    """The work of a worker that cannot do it."""

    def fail(table: pa.Table) -> pa.Table:
        raise ValueError("no such thing")

    return fail
