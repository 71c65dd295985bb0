"""What the GPU kernels' machine code takes, as last agreed to: gpu_resources.json, and what has become worse.

    python -m tests.kernels.gpu_resources [--cuda table.json] [--triton table.json]

compiles every kernel and rewrites the file; a table that cuda_resources.py or triton_aot.py has written already
saves the compiling. A kernel that takes more than it did, or is new or gone, fails a test until the file is
rewritten, so that the diff shows what a change costs. Better numbers pass, but are held to only once the file is
rewritten.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.kernels import cuda_launches, cuda_resources, triton_aot

FILE = Path(__file__).with_name("gpu_resources.json")
REWRITE = "python -m tests.kernels.gpu_resources rewrites the file"
# What is kept of a row, and whether more of it is worse. CUDA's shared memory is a matter of the launch: "launches" are
# the CUDA kernels as cuda_launches.py launches them, their occupancy with the registers that "cuda" holds.
COLUMNS = {
    "cuda": {"registers": True, "stack": True},
    "launches": {"shared": True, "occupancy": False},
    "triton": {"registers": True, "stack": True, "shared": True, "occupancy": False},
}


def by_key(section: str, table: list[dict]) -> dict[str, list]:
    """The kept numbers of a table's rows, by a name; rows of the same name are counted."""
    names = {"cuda": ("op", "arch", "kernel"), "launches": ("arch", "kernel")}.get(
        section, ("op", "arch", "kernel", "dtype", "case")
    )
    out: dict[str, list] = {}
    for row in table:
        base = key = " ".join(row[name] for name in names)
        count = 1
        while key in out:
            count += 1
            key = f"{base} #{count}"
        out[key] = [row[column] for column in COLUMNS[section]]
    return out


def compiler(section: str) -> str:
    """The release that the numbers depend on: nvcc's, or Triton's."""
    if section == "triton":
        return importlib.metadata.version("triton")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", version).group(1)


def worse(
    section: str, table: list[dict], prefix: str = "", agreed: dict | None = None, release: str | None = None
) -> list[str]:
    """What `table` has that is worse than agreed, new or gone, among the keys that begin with `prefix`; one line each.

    `agreed` and `release` are the file's contents and the installed compiler, unless given.
    """
    agreed = (agreed or json.loads(FILE.read_text()))[section]
    release = release or compiler(section)
    if agreed["compiler"] != release:
        return [f"{section} {release} is installed, the file is of {agreed['compiler']}: {REWRITE}"]
    before = {key: row for key, row in agreed["rows"].items() if key.startswith(prefix)}
    now = by_key(section, table)
    problems = [f"{key}: gone; {REWRITE}" for key in before.keys() - now.keys()]
    problems += [f"{key}: new; {REWRITE}" for key in now.keys() - before.keys()]
    for key in before.keys() & now.keys():
        for (column, more_is_worse), old, new in zip(
            COLUMNS[section].items(), before[key], now[key], strict=True
        ):
            if None not in (old, new) and (new > old if more_is_worse else new < old):
                problems.append(f"{key}: {column} {new}, was {old}; if it is worth it, {REWRITE}")
    return sorted(problems)


def occupied(launches: list[dict], cuda: dict[str, list]) -> list[dict]:
    """A row for each launched kernel and architecture, with its occupancy; `cuda` are rows of the file."""
    rows = []
    for launch, arch in itertools.product(launches, cuda_resources.ARCHS):
        registers = next(row[0] for key, row in cuda.items() if key.endswith(f" {arch} {launch['kernel']}"))
        warps, number = launch["threads"] // 32, int(arch.rstrip("a"))
        share = triton_aot.occupancy(registers, launch["shared"], warps, number)
        rows.append({**launch, "arch": arch, "occupancy": share})
    return rows


def write(tables: dict[str, list[dict]]) -> None:
    """Rewrite the file, a kernel a line."""
    sections = []
    for section, table in tables.items():
        rows = [f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in by_key(section, table).items()]
        head = f'  {json.dumps(section)}: {{\n   "compiler": {json.dumps(compiler(section))},\n'
        columns = f'   "columns": {json.dumps(list(COLUMNS[section]))},\n   "rows": {{\n'
        sections.append(head + columns + ",\n".join(rows) + "\n   }}")
    FILE.write_text("{\n" + ",\n".join(sections) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuda", type=Path, help="a table of cuda_resources.py")
    parser.add_argument("--triton", type=Path, help="a table of triton_aot.py")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.triton is None:
            args.triton = Path(folder) / "triton.json"
            environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            script = str(FILE.with_name("triton_aot.py"))
            subprocess.run([sys.executable, script, "--out", str(args.triton)], env=environ, check=True)
        cuda = json.loads(args.cuda.read_text()) if args.cuda else cuda_resources.compile_all("nvcc")
        launches = occupied(cuda_launches.launches(), by_key("cuda", cuda))
        write({"cuda": cuda, "launches": launches, "triton": json.loads(args.triton.read_text())})
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
