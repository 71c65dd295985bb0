"""Runs the CUDA sources on the host: compiles a program of `cuda_host/` with g++ and the sanitizers, and sends it work.

    program = compile_program("pack_tokens", folder)
    with HostDevice(program) as device:
        device.call("pack_tokens", ids, table, out, 50, torch.float32)  # tensors are written back in place

What a GPU would punish (see cuda_host/) raises a HostDeviceError; the program goes on. What AddressSanitizer or UBSan
finds ends it: that raises too, with the report, and the next call starts it anew.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from speeder_kernels.validate import FLOATS
from tests.kernels import compilers

ROOT = Path(__file__).resolve().parents[2]
SOURCES = "tests/kernels/cuda_host"
# Bytes of shared memory that a block may have: on sm_90 and sm_100, and on sm_86, sm_89 and sm_120.
SHARED_H100, SHARED_LEAST = 227 * 1024, 99 * 1024

Argument = torch.Tensor | int | float | torch.dtype | None


class HostDeviceError(AssertionError):
    """A kernel did what a GPU would punish; the message says what, and which block and thread it was."""


@dataclass(frozen=True)
class Launch:
    """A kernel and its template arguments, blocks in x, y and z, threads of a block and its bytes of shared memory."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int


def compile_program(
    name: str, folder: Path, csrc: Path = ROOT / "csrc", extra: tuple[str, ...] = (), watch: bool = False
) -> Path:
    """Compile `cuda_host/<name>.cpp` over the kernels in `csrc`, with `extra` flags; returns the program.

    `watch`: every access to global memory is watched for races (see cuda_host/watched_memory.h), in the place of the
    sanitizers, since a program is compiled for one or the other.
    """
    program, compiled = folder / name, folder / f"{name}.o"
    if watch:
        _compile(csrc.parent, name, compiled, "-O1", "-fsanitize=thread", *extra)
        _link(program, compiled, _shared("engine"), _shared("watch"))
        return program
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    _compile(csrc.parent, name, compiled, "-O1", "-g1", *sanitizers, *extra)
    _link(program, compiled, _shared("engine"), *sanitizers, *extra)
    return program


@functools.cache
def _shared(name: str) -> Path:
    """What programs share, compiled once: it is not what the sanitizers are to watch."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    compiled = Path(folder) / f"{name}.o"
    _compile(ROOT, name, compiled, "-O2", "-g1")
    return compiled


def _compile(root: Path, name: str, out: Path, *flags: str) -> None:
    """One file of `cuda_host/`; `root` has csrc/ and what else it includes."""
    command = [
        *compilers.cxx(),
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Icsrc",
        f"-I{SOURCES}",
        *flags,
    ]
    _run([*command, "-c", f"{SOURCES}/{name}.cpp", "-o", str(out)], root)


def _link(program: Path, *parts: Path | str) -> None:
    _run([os.environ.get("CXX", "g++"), *map(str, parts), "-o", str(program)], ROOT)


def _run(command: list[str], root: Path) -> None:
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-8000:]


def plant(folder: Path, *edits: tuple[str, str, str]) -> Path:
    """A copy of csrc/ in `folder` with faults: `(file, sound text, faulty text)`, where the sound text occurs once.

    `cuda_host/` lies beside it at its place, so that its programs are compiled there as they are in a clone.
    """
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    shutil.copytree(ROOT / SOURCES, folder / SOURCES)
    for name, sound, faulty in edits:
        text = (csrc / name).read_text()
        assert text.count(sound) == 1, f"{name}: {sound!r} occurs {text.count(sound)} times"
        (csrc / name).write_text(text.replace(sound, faulty))
    return csrc


class HostDevice:
    """A running program of `cuda_host/`."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self._report = program.with_suffix(".stderr")
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> HostDevice:
        return self

    def __exit__(self, *_) -> None:
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
            self._process = None

    def call(
        self,
        function: str,
        *arguments: Argument,
        seed: int = 0,
        dry: bool = False,
        shared_most: int = SHARED_H100,
    ) -> list[Launch]:
        """Launch kernels by one of the program's functions; returns what was launched.

        Tensors must be contiguous; all are written back, as a device would leave them. `seed` draws the order in
        which blocks and threads run. `dry` runs nothing: any tensor will do then, and None where only its place counts.
        `shared_most` is how many bytes of shared memory a block may have.

        Raises:
            HostDeviceError: what is wrong with the kernel.
        """
        request = [struct.pack("<I", len(function)), function.encode()]
        request += [struct.pack("<Q?qI", seed, dry, shared_most, len(arguments)), *map(_packed, arguments)]
        if self._process is None:
            pipe = subprocess.PIPE
            with self._report.open("wb") as report:
                self._process = subprocess.Popen([self.program], stdin=pipe, stdout=pipe, stderr=report)
        try:
            self._process.stdin.write(b"".join(request))
            self._process.stdin.flush()
        except BrokenPipeError:
            self._died()
        error, launches = (self._take(*struct.unpack("<I", self._take(4))).decode() for _ in range(2))
        if error:
            raise HostDeviceError(error)
        for x in arguments:
            if isinstance(x, torch.Tensor) and x.numel():
                ctypes.memmove(x.data_ptr(), self._take(x.nbytes), x.nbytes)
        rows = [line.split("\t") for line in launches.splitlines()]
        return [
            Launch(name, tuple(map(int, grid)), int(threads), int(shared))
            for name, *grid, threads, shared in rows
        ]

    def _take(self, count: int) -> bytes:
        data = self._process.stdout.read(count)
        if len(data) < count:
            self._died()
        return data

    def _died(self) -> None:
        self._process.wait()
        self.__exit__()
        raise HostDeviceError(self._report.read_text()[:8000] or "the program ended without a word")


def _packed(x: Argument) -> bytes:
    if x is None:
        return b"n"
    if isinstance(x, torch.dtype):
        return struct.pack("<cq", b"i", FLOATS.index(x))
    if isinstance(x, float):
        return struct.pack("<cd", b"d", x)
    if isinstance(x, int):
        return struct.pack("<cq", b"i", x)
    assert x.is_contiguous(), f"expected a contiguous tensor, got strides {x.stride()}"
    data = ctypes.string_at(x.data_ptr(), x.nbytes) if x.numel() else b""
    return struct.pack("<cqq", b"t", len(data), x.data_ptr() % 16) + data
