"""One system in a process of its own, which measures what it is told to and holds still otherwise."""

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
Sample = dict[str, float]  # "seconds", and what was done in them


class Worker:
    """What the bench sees of a system's process; its methods wait for the answer.

    Raises `SpeederError`, from every method, with what went wrong in the process.
    """

    def __init__(self, name: str, *settings):
        """Start the process of `_Bench(name, *settings)`."""
        self.name = name
        # a server that has imported all and done nothing: each process is forked from it, clean and at once
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, *settings), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, question: str, **arguments):
        """The answer of one of `_Bench`'s methods."""
        self.send(question, **arguments)
        return self.answer()

    def send(self, question: str, **arguments) -> None:
        """Ask, and let the process work; `answer` must follow."""
        try:
            self._connection.send((question, arguments))
        except OSError:
            raise self._death() from None

    def answer(self):
        """What the last question was answered."""
        try:
            kind, content = self._connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if kind == "error":
            raise SpeederError(f"bench: {self.name}: {content}")
        return content

    def close(self) -> None:
        """End the process, in the middle of its work if need be."""
        self._connection.close()  # which ends one that waits for a question
        self._process.join(1)
        self._process.terminate()
        self._process.join()

    def _death(self) -> SpeederError:
        self._process.join(5)
        code = self._process.exitcode
        killed = " (out of memory?)" if code == -signal.SIGKILL else ""
        return SpeederError(f"bench: {self.name}: its process ended with status {code}{killed}")


def _serve(connection: Connection, name: str, *settings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the bench's: it ends this process
    bench = _Bench(name, *settings)
    try:
        while True:
            question, arguments = connection.recv()
            try:
                answer = ("answer", getattr(bench, question)(**arguments))
            except SpeederError as error:
                answer = ("error", str(error))
            except Exception as error:  # whatever it is, the bench must hear of it and end
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
        """Seconds from loaded weights to the first answer for one user; and all that was compressed or tokenized."""
        reset_peak_memory()
        start = time.perf_counter()
        self._system.rank([0])
        return time.perf_counter() - start

    def facts(self) -> dict:
        """What is measured: sizes in tokens, batches, model flops of one repetition of each task."""
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
        """Repetitions until so many seconds are over: at least one, at most `most`.

        The very first of a task is not among them, because libraries and memory get ready in it; unless it took
        more than `patience` seconds: that is little of it then, and a second one would be too dear.
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
        """The next users, one by one or as many as a batch takes."""
        known = len(self._system.users.histories)
        size = min(known, self._system.ranked_users) if task == "batch" else 1
        rows = [(self._counts[task] * size + place) % known for place in range(size)]
        start = time.perf_counter()
        self._system.rank(rows)
        return {"seconds": time.perf_counter() - start, "users": size}

    def memory(self, reset: bool) -> int | None:
        """The most that was resident since the last reset, in bytes."""
        peak = peak_memory()
        if reset:
            reset_peak_memory()
        return peak

    def profile(self) -> dict[str, float]:
        """Shares of a training step's time, by group of operators."""
        return profile_step(lambda: self._system.train(0))

    def cpu_seconds(self) -> float:
        """Processor time that this process has used."""
        return cpu_seconds()
