"""Work on a table in numbered parts, kept in a folder, so that finished parts are not computed again after a stop.

The driver writes each part's input once. A worker reads that file and writes another, whole or not at all. A part that
is computed twice (its first worker was killed) gives the same file again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from speeder.errors import SpeederError
from speeder.io.files import atomic_path, read_json, sha256_file, write_json
from speeder.io.progress import showing

log = logging.getLogger(__name__)

Work = Callable[[pa.Table], pa.Table]
"""Computes a part: one result row per input row, in order."""


class Parts:
    """A job's folder: `job.json` (once every input is there), `input/000000.parquet` and `output/000000.parquet`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def input(self, part: int) -> Path:
        """The file of a part's input."""
        return self.folder / "input" / f"{part:06d}.parquet"

    def output(self, part: int) -> Path:
        """The file of a part's result; it exists once the part is done."""
        return self.folder / "output" / f"{part:06d}.parquet"

    @property
    def count(self) -> int:
        """The number of parts."""
        return read_json(self.folder / "job.json")["parts"]

    def missing(self) -> list[int]:
        """The parts without a result."""
        return [part for part in range(self.count) if not self.output(part).exists()]

    def stage(self, identity: dict, tables: Iterable[pa.Table]) -> None:
        """Write the inputs, unless they exist already."""
        job = self.folder / "job.json"
        if job.exists():
            return
        for place in ("input", "output"):
            shutil.rmtree(self.folder / place, ignore_errors=True)
            (self.folder / place).mkdir(parents=True)
        parts = 0
        for table in tables:
            pq.write_table(table, self.input(parts))
            parts += 1
        write_json(job, {"identity": identity, "parts": parts})

    def compute(self, part: int, work: Work) -> None:
        """Read a part, compute its result, and write it.

        Raises:
            ValueError: the result does not have as many rows as the part.
        """
        table = pq.read_table(self.input(part))
        made = work(table)
        if len(made) != len(table):
            raise ValueError(f"part {part}: expected {len(table)} rows, got {len(made)}")
        with atomic_path(self.output(part)) as temporary:
            pq.write_table(made, temporary)

    def outputs(self) -> Iterator[pa.Table]:
        """The results of all parts, in order.

        Raises:
            SpeederError: a part is missing, or has lost rows.
        """
        for part in range(self.count):
            try:
                made, rows = pq.read_table(self.output(part)), pq.read_metadata(self.input(part)).num_rows
            except (OSError, pa.ArrowException) as error:
                raise SpeederError(f"{self.output(part)}: expected a part that is done: {error}") from error
            if len(made) != rows:
                raise SpeederError(f"{self.output(part)}: expected {rows} rows, got {len(made)}")
            yield made


def job_parts(folder: Path, identity: dict) -> Parts:
    """A job's parts, in a subfolder of its own, since a lost worker of an earlier job may still be writing."""
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return Parts(folder / name)


Runner = Callable[[Callable[[], Work], Parts, list[int]], Iterator[int]]
"""Called with a function that makes the `Work` (once per process), the parts, and the numbers of the missing ones.
Computes these, and yields each number when it is done."""


def here(make: Callable[[], Work], parts: Parts, missing: list[int]) -> Iterator[int]:
    """The runner that computes the parts one by one in this process."""
    work = make()
    for part in missing:
        parts.compute(part, work)
        yield part


@contextmanager
def computed(
    folder: Path,
    identity: dict,
    tables: Iterable[pa.Table],
    make: Callable[[], Work],
    runner: Runner,
    what: str,
) -> Iterator[Iterator[pa.Table]]:
    """The results of all tables, in order; after any stop, the same call computes only the missing parts.

    Args:
        folder: the job's folder, removed on a clean exit. Every worker must see it under this path.
        identity: JSON; an unfinished job of another identity is discarded.
        tables: the parts' inputs, read only when a job begins.
        make: makes the `Work`, once per process.
        what: the progress bar's label.

    Raises:
        SpeederError: another process is computing this job, a worker failed, or a part is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts, lock = job_parts(folder, identity), FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SpeederError(f"{folder}: another process is computing these parts") from None
    try:
        for other in folder.iterdir():
            if other.is_dir() and other != parts.folder:
                shutil.rmtree(other, ignore_errors=True)
        parts.stage(identity, tables)
        missing = parts.missing()
        if done := parts.count - len(missing):
            log.warning("going on: %d of %d parts are done (%s)", done, parts.count, folder)
        if missing:
            with showing(what, len(missing), "part") as work:
                for _ in runner(make, parts, missing):
                    work.update()
        yield parts.outputs()
        (parts.folder / "job.json").unlink()  # first: killed after that, the rest is no job that could go on
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()


def folder_identity(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by its path inside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}
