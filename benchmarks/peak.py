"""What this machine can do at most: products with our register tile, and copies from memory to memory."""

from __future__ import annotations

import os
import runpy
import subprocess
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


class GemmPeak:
    """Builds peak.cpp for an instruction set, with the flags of the kernels; `measure` runs it."""

    def __init__(self, isa: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        # float32 has no products on AMX: its kernels are AVX-512's
        self._isas = {"float32": "avx512" if isa == "avx512_amx" else isa, "bfloat16": isa}
        for one in set(self._isas.values()):
            self._build(one)

    def _build(self, isa: str) -> None:
        flags = runpy.run_path(str(ROOT / "setup.py"))["ISAS"][isa]
        command = [
            os.environ.get("CXX", "g++"),
            "-O3",
            "-std=c++17",
            "-ffp-contract=fast",
            "-pthread",
            *flags,
        ]
        sources = [str(ROOT / "benchmarks" / "peak.cpp"), str(ROOT / "csrc" / "cpu" / "common" / "isa.cpp")]
        command += [f"-DSPEEDER_ISA={isa}", f"-I{ROOT / 'csrc'}", *sources]
        subprocess.run([*command, "-o", str(self._program(isa))], check=True)

    def _program(self, isa: str) -> Path:
        return Path(self._folder.name) / isa

    def measure(self, threads: int, seconds: float) -> dict[str, float]:
        """GFLOP/s by dtype, all threads together; `seconds` for each dtype."""
        rates = {}
        for dtype, isa in self._isas.items():
            command = [str(self._program(isa)), dtype, str(threads), str(seconds)]
            rates[dtype] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return rates


def copy_bandwidth(threads: int, quick: bool) -> float:
    """GB/s read and written by a copy between buffers far larger than the last cache, by the best number of
    threads up to `threads`."""
    size = 1 << 24 if quick else _copied_bytes()
    source, copy = torch.ones(2, size // 4)
    best = float("inf")
    for count in sorted({*(1 << n for n in range(threads.bit_length())), threads}):
        torch.set_num_threads(count)
        for _ in range(4):
            start = time.perf_counter()
            copy.copy_(source)
            best = min(best, time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 2 * size / best / 1e9


def _copied_bytes() -> int:
    """Four times the last cache where memory allows: at most a sixteenth of it, at least 256 MiB."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(path.read_text().strip().removesuffix("K")) * 1024 for path in caches]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1 << 28, min(4 * max(sizes, default=0), memory // 16))
