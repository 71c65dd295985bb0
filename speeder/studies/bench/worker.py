"""One system in a process of its own, which measures on request and is idle otherwise."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.studies.bench.machine import cpu_seconds, peak_memory, reset_peak_memory
from speeder.studies.bench.profile import profile_step
from speeder.studies.bench.systems import System
from speeder.studies.bench.workload import Workload

TASKS = ("batch", "single", "train")
Sample = dict[str, float]  # "seconds", and the work done in them


class Worker:
    """The bench's side of a system's process; its methods wait for the answer.

    Every method raises `SpeederError` if something fails in the process.
    """

    def __init__(self, name: str, *settings):
        """Start the process of `_Bench(name, *settings)`."""
        self.name = name
        # a server that has only done its imports: each process is forked from it, clean and quickly
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, *settings), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, question: str, **arguments):
        """Call one of `_Bench`'s methods and return its result."""
        self.send(question, **arguments)
        return self.answer()

    def send(self, question: str, **arguments) -> None:
        """Start a call; `answer` must follow."""
        try:
            self._connection.send((question, arguments))
        except OSError:
            raise self._death() from None

    def answer(self):
        """The result of the last call."""
        try:
            kind, content = self._connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if kind == "error":
            raise SpeederError(f"bench: {self.name}: {content}")
        return content

    def close(self) -> None:
        """End the process, even during its work."""
        self._connection.close()  # ends a process that waits for a call
        self._process.join(1)
        self._process.terminate()
        self._process.join()

    def _death(self) -> SpeederError:
        self._process.join(5)
        code = self._process.exitcode
        killed = " (out of memory?)" if code == -signal.SIGKILL else ""
        return SpeederError(f"bench: {self.name}: its process ended with status {code}{killed}")


def _serve(connection: Connection, name: str, *settings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the bench ends this process
    bench = _Bench(name, *settings)
    try:
        while True:
            question, arguments = connection.recv()
            try:
                answer = ("answer", getattr(bench, question)(**arguments))
            except SpeederError as error:
                answer = ("error", str(error))
            except Exception as error:  # any error must reach the bench and end it
                traceback.print_exc()
                answer = ("error", f"{type(error).__name__}: {error}")
            connection.send(answer)
    except (EOFError, OSError):  # the bench has closed its end, or has ended
        return


class _Bench:
    """The other end: builds the system and times it."""

    def __init__(
        self,
        name: str,
        folder: Path,
        workload: Workload,
        backbone: str,
        layers: int,
        threads: int,
        precision: str,
    ):
        self._arguments = (name, folder, workload, backbone, layers, precision)
        self._threads = threads
        self._counts = dict.fromkeys(TASKS, 0)

    def load(self) -> None:
        """Weights, catalogue and users."""
        torch.set_num_threads(self._threads)
        name, folder, *settings = self._arguments
        self._system = System(name, PreparedData.load(folder, verify=False), *settings)
        self._system.for_ranking()

    def first(self) -> float:
        """Seconds from loaded weights to the first answer for one user, with compression or tokenization."""
        reset_peak_memory()
        start = time.perf_counter()
        self._system.rank([0])
        return time.perf_counter() - start

    def facts(self) -> dict:
        """Sizes in tokens, batches, and model flops of one repetition of each task."""
        system = self._system
        system.prepare()
        batch, ranked = system.batches[0], system.ranked_users
        return {
            "tokens_an_item": system.tokens_an_item(),
            "tokens_a_prompt": system.mean_prompt,
            "filled": system.users.filled,
            "training_batch": {
                "prompts": batch.prompts,
                "tokens": batch.tokens,
                "targets": batch.targets,
                "flops": batch.flops,
            },
            "ranked_users": ranked,
            "flops": {
                "batch": system.rank_flops(range(ranked)),
                "single": system.rank_flops([0]),
                "train": batch.flops,
            },
        }

    def measure(self, task: str, seconds: float, most: int, patience: float) -> list[Sample]:
        """Repetitions for `seconds` seconds: at least one, at most `most`.

        The first one of a task is a warm-up and not counted, unless it takes more than `patience` seconds: then the
        warm-up is a small part of it, and a second one would take too long.
        """
        if task == "train":
            self._system.for_training()
        samples: list[Sample] = []
        end = time.perf_counter() + seconds
        while not samples or (len(samples) < most and time.perf_counter() < end):
            sample = self._train() if task == "train" else self._rank(task)
            self._counts[task] += 1
            if self._counts[task] == 1 and sample["seconds"] < patience:
                end = time.perf_counter() + seconds
            else:
                samples.append(sample)
        return samples

    def _train(self) -> Sample:
        start = time.perf_counter()
        batch = self._system.train(self._counts["train"])
        seconds = time.perf_counter() - start
        done = {"targets": batch.targets, "prompts": batch.prompts, "flops": batch.flops}
        return {"seconds": seconds} | done

    def _rank(self, task: str) -> Sample:
        """Rank the next users: one, or a batch."""
        known = len(self._system.users.histories)
        size = min(known, self._system.ranked_users) if task == "batch" else 1
        rows = [(self._counts[task] * size + place) % known for place in range(size)]
        start = time.perf_counter()
        self._system.rank(rows)
        return {"seconds": time.perf_counter() - start, "users": size}

    def memory(self, reset: bool) -> int | None:
        """Peak resident bytes since the last reset."""
        peak = peak_memory()
        if reset:
            reset_peak_memory()
        return peak

    def profile(self) -> dict[str, float]:
        """Shares of a training step's time, by group of operators."""
        return profile_step(lambda: self._system.train(0))

    def cpu_seconds(self) -> float:
        """Processor seconds of this process."""
        return cpu_seconds()
