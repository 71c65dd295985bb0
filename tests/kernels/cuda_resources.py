"""Compiles every CUDA kernel with nvcc and lists what its machine code takes; needs no GPU.

    python -m tests.kernels.cuda_resources --out table.json [--only pack_tokens/pack_tokens] [--jobs 2]

The table is a JSON list of rows, one a kernel and architecture: op (its source file), kernel (with its template
arguments), arch; registers (a thread), stack, spill_stores, spill_loads (bytes a thread). Threads and shared memory are
a matter of the launch: `HostDevice.call(..., dry=True)` tells them for kernels of the same names.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.kernels import compilers

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
ARCHS = ("80", "90a", "100a")
FLAGS = ("-O3", "-std=c++17", "-Icsrc", "-Xptxas=-v")


def source_name(source: Path) -> str:
    """Its path within csrc/cuda without the ending: attention/forward_bfloat16."""
    return source.relative_to(CUDA).with_suffix("").as_posix()


# By name; all but cuda_versions.cu, which has no kernel.
SOURCES = {source_name(path): path for path in sorted(CUDA.glob("*/*.cu")) if path.stem != "cuda_versions"}

_ROW = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for 'sm_\w+'\n"
    r".*\n\s*(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers"
)


def included(source: Path) -> list[Path]:
    """A source and every file of csrc/ that it includes, by itself or by another."""
    found, left = set(), [source]
    while left:
        path = left.pop()
        if (
            path in found or not path.exists()
        ):  # what is not there is included on the host alone, or is a compiler's
            continue
        found.add(path)
        names = re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.MULTILINE)
        left += [ROOT / "csrc" / name for name in names]
    return sorted(found)


def compile_kernels(nvcc: str, source: Path, arch: str) -> list[dict]:
    """Compile one file for one architecture; the rows of its kernels.

    Raises:
        RuntimeError: nvcc's messages.
    """
    # A launcher keeps objects alone. They take a little longer than a cubin, of which they are made.
    output = (
        ["-c", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        if compilers.launcher()
        else ["-cubin", f"-arch=sm_{arch}"]
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *compilers.nvcc(nvcc),
            *FLAGS,
            *output,
            str(source.relative_to(ROOT)),
            "-o",
            f"{folder}/out",
        ]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{source.name}, sm_{arch}:\n{result.stderr}")
    rows = [match.groupdict() for match in _ROW.finditer(result.stderr)]
    found = result.stderr.count("Compiling entry function")
    if not rows or len(rows) != found:
        raise RuntimeError(f"{source.name}, sm_{arch}: {len(rows)} of {found} kernels read:\n{result.stderr}")
    names = _demangled([row.pop("kernel") for row in rows])
    numbers = [{name: int(value) for name, value in row.items()} for row in rows]
    return [
        {"op": source_name(source), "kernel": name, "arch": arch, **row}
        for name, row in zip(names, numbers, strict=True)
    ]


def _demangled(names: list[str]) -> list[str]:
    """The struct that `run<Kernel>` was made for."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return [re.search(r"::run<(.*?) ?>\(", line).group(1) for line in text.splitlines()]


def compile_all(
    nvcc: str, names: Iterable[str] = SOURCES, archs: Sequence[str] = ARCHS, jobs: int | None = None
) -> list[dict]:
    """Every file for every architecture, several at once."""
    pairs = list(itertools.product(names, archs))
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        tables = pool.map(lambda pair: compile_kernels(nvcc, SOURCES[pair[0]], pair[1]), pairs)
        return list(itertools.chain(*tables))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="where the table goes, as JSON")
    parser.add_argument("--only", choices=SOURCES, help="one file")
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--jobs", type=int)
    args = parser.parse_args()
    table = compile_all(args.nvcc, [args.only] if args.only else SOURCES, jobs=args.jobs)
    Path(args.out).write_text(json.dumps(table, indent=0))
    print(f"{len(table)} kernels compiled")


if __name__ == "__main__":
    main()
