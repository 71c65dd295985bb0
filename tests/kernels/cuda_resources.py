"""Compiles every CUDA kernel with nvcc and lists what its machine code takes; needs no GPU.

    python tests/kernels/cuda_resources.py --out table.json [--only pack_tokens/pack_tokens] [--jobs 2]

The table is a JSON list of rows, one a kernel and architecture: op, kernel (with its template arguments), arch;
registers (a thread), stack, spill_stores, spill_loads (bytes a thread). Threads and shared memory are a matter of the
launch: `HostDevice.call(..., dry=True)` tells them for kernels of the same names.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# All but cuda_versions.cu, which has no kernel.
SOURCES = sorted(path for path in (CSRC / "cuda").glob("*/*.cu") if path.stem != "cuda_versions")
ARCHS = ("80", "90a", "100a")

_ROW = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for 'sm_\w+'\n"
    r".*\n\s*(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers"
)


def source_name(source: Path) -> str:
    """Its path within csrc/cuda without the ending: attention/forward_bfloat16."""
    return source.relative_to(CSRC / "cuda").with_suffix("").as_posix()


def compile_kernels(nvcc: str, source: Path, arch: str) -> list[dict]:
    """Compile one file for one architecture; the rows of its kernels.

    Raises:
        RuntimeError: nvcc's messages.
    """
    command = [nvcc, "-O3", "-std=c++17", f"-I{CSRC}", "-Xptxas=-v", "-cubin"]
    command += [f"-arch=sm_{arch}", str(source), "-o", os.devnull]
    result = subprocess.run(command, capture_output=True, text=True)
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
    nvcc: str, sources: Sequence[Path] = SOURCES, archs: Sequence[str] = ARCHS, jobs: int | None = None
) -> list[dict]:
    """Every file for every architecture, several at once."""
    pairs = list(itertools.product(sources, archs))
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        return list(itertools.chain(*pool.map(lambda pair: compile_kernels(nvcc, *pair), pairs)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="where the table goes, as JSON")
    parser.add_argument("--only", choices=list(map(source_name, SOURCES)), help="one file")
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--jobs", type=int)
    args = parser.parse_args()
    sources = [source for source in SOURCES if args.only in (None, source_name(source))]
    table = compile_all(args.nvcc, sources, jobs=args.jobs)
    Path(args.out).write_text(json.dumps(table, indent=0))
    print(f"{len(table)} kernels compiled")


if __name__ == "__main__":
    main()
