"""Parts computed by Ray Data: each row of its dataset is a part's number, and a pool of actors computes them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from speeder.errors import SpeederError
from speeder.io.extras import pip_command
from speeder.io.parts import Parts, Work
from speeder.io.ray_address import check_reachable

_RETRIES = 3  # of a part whose worker was killed: one that kills every worker must end some day


@dataclass(frozen=True)
class OnRay:
    """The runner that computes parts with Ray Data.

    A killed worker is started again and repeats its part, at most three times. Ray is joined or started for the
    duration of a job, unless this process has already joined it.

    Attributes:
        address: None joins the cluster of `RAY_ADDRESS`, or starts Ray on this machine; else as in `ray.init`, such as
            `"auto"` or `"host:6379"`.
        workers: most workers; None: one per CPU of the cluster. Each has one CPU and its own model.
    """

    address: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        """Checked before there is any work.

        Raises `SpeederError` if Ray is not installed or the cluster does not answer within seconds, `ValueError` for a
        wrong number of workers.
        """
        if find_spec("ray") is None:
            raise SpeederError(f"ray: expected Ray Data, which is not installed: {pip_command('ray')}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers: expected at least 1, got {self.workers}")
        if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
            check_reachable(self.address)

    def __call__(self, make: Callable[[], Work], parts: Parts, missing: list[int]) -> Iterator[int]:
        """See `Runner`; raises `SpeederError` if Ray cannot be reached or a worker failed."""
        with _ray(self.address) as ray:
            workers = self.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
            rows = [{"part": part} for part in missing]
            done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                _Worker,
                fn_constructor_args=(make, str(parts.folder.resolve())),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(workers, len(rows))),
                num_cpus=1,
                max_task_retries=_RETRIES,
            )
            try:
                for row in done.iter_rows():
                    if row["failed"]:
                        raise SpeederError(f"ray: a worker failed: {row['failed']}")
                    yield int(row["part"])
            except ray.exceptions.RayError as error:
                reason = str(error).strip().partition("\n")[0]
                raise SpeederError(f"ray: a worker was lost: {reason}") from error


class _Worker:
    """An actor; its `Work`, such as a loaded model, is made once."""

    def __init__(self, make: Callable[[], Work], folder: str):
        self._make, self._work, self._parts = make, None, Parts(Path(folder))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Errors are returned as text: Ray would retry after an exception, and wrap its message."""
        try:
            self._work = self._work or self._make()
            for part in batch["part"]:
                self._parts.compute(int(part), self._work)
        except Exception as error:
            return {**batch, "failed": np.array([f"{type(error).__name__}: {error}"] * len(batch["part"]))}
        return {**batch, "failed": np.array([""] * len(batch["part"]))}


@contextmanager
def _ray(address: str | None) -> Iterator:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.data

    began = not ray.is_initialized()
    if began:
        check_reachable(address)
        try:
            ray.init(address, logging_level="warning", log_to_driver=False)
        except Exception as error:  # also a bare one, where a machine is too busy to start Ray in time
            reason = str(error).partition("\n")[0]
            raise SpeederError(f"ray: cannot be started or joined: {reason}") from error
    context = ray.data.DataContext.get_current()
    shown, context.enable_progress_bars = context.enable_progress_bars, False  # there is one for the parts
    try:
        yield ray
    finally:
        context.enable_progress_bars = shown
        if began:
            ray.shutdown()
