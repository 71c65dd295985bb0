"""Processes to be killed: forked from one that has imported everything, so that each begins within milliseconds."""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.jobs"])


def start(job: Callable[..., None], *arguments: object) -> BaseProcess:
    """Runs a function of `tests.faults.jobs` in a process of its own."""
    process = _context.Process(target=job, args=arguments)
    process.start()
    return process


def run(job: Callable[..., None], *arguments: object) -> int:
    """Runs a job to its end; its exit status."""
    process = start(job, *arguments)
    process.join(300)
    assert process.exitcode is not None, "the job hangs"
    return process.exitcode


def killed(process: BaseProcess, after: float) -> bool:
    """Kills a process (SIGKILL) after so many seconds; whether it was not done before. Its failure fails the test."""
    process.join(after)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"the job ended with {process.exitcode}"
    return process.exitcode != 0


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]
