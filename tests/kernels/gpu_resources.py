"""What the GPU kernels' machine code takes, as last agreed to: gpu_resources.json, and what has become worse.

    python -m tests.kernels.gpu_resources [--only cuda] [--all]

compiles what has changed since the file was written (`--all`: everything), checks it (compile_facts.py), and rewrites
the file; it refuses to where a check fails. A kernel that takes more than it did, or is new or gone, fails a test until
the file is rewritten, so that the diff shows what a change costs. Better numbers pass, but are held to only once the
file is rewritten.

The file has a part for each CUDA source and for each op in Triton, with a hash of all that its machine code is made
from: the sources, the compiler with its flags, and what it is compiled for. Where the hash is the same, so are the
numbers, which were checked when they were written: then the tests compile nothing and say so, unless
SPEEDER_COMPILE_ALL=1.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

from tests.kernels import compile_facts, cuda_launches, cuda_resources, triton_aot

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("gpu_resources.json")
REWRITE = "python -m tests.kernels.gpu_resources rewrites the file"
# What is kept of a row, and whether more of it is worse. CUDA's shared memory is a matter of the launch: "launches" are
# the CUDA kernels as cuda_launches.py launches them, their occupancy with the registers that "cuda" holds.
COLUMNS = {
    "cuda": {"registers": True, "stack": True},
    "launches": {"shared": True, "occupancy": False},
    "triton": {"registers": True, "stack": True, "shared": True, "occupancy": False},
}
PARTS = {"cuda": tuple(cuda_resources.SOURCES), "triton": tuple(triton_aot.CASES)}


def by_key(section: str, table: Iterable[dict]) -> dict[str, list]:
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


def agreed_rows(section: str, agreed: dict | None = None) -> dict[str, list]:
    """The file's numbers by name, of all parts; `agreed` is the file's contents, unless given."""
    parts = (agreed or json.loads(FILE.read_text()))[section]["parts"].values()
    return {key: row for part in parts for key, row in part["rows"].items()}


# --- what a part is made from ----------------------------------------------------------------------------------


@functools.cache
def compiler(section: str) -> str:
    """The release that the numbers depend on: nvcc's, or Triton's."""
    if section == "triton":
        return importlib.metadata.version("triton")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release [\d.]+, V([\d.]+)", version).group(1)


def _triton_modules(tree: ast.AST) -> set[str]:
    """Modules of speeder_kernels.triton that some code imports, with the packages they are in."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}  # which may be no module
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    parents = {
        ".".join(words[:n]) for words in (name.split(".") for name in found) for n in range(1, len(words))
    }
    return {name for name in found | parents if f"{name}.".startswith("speeder_kernels.triton.")}


def triton_sources(op: str) -> list[Path]:
    """triton_aot.py, which calls the launchers, and the modules that one op's launchers import, by others too."""
    cases = ast.parse(Path(triton_aot.__file__).read_text())
    call = next(node for node in cases.body if isinstance(node, ast.FunctionDef) and node.name == op)
    found, left = {Path(triton_aot.__file__)}, _triton_modules(call)
    seen: set[str] = set()
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        path = ROOT.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path.exists():
            found.add(path)
            left |= _triton_modules(ast.parse(path.read_text()))
    return sorted(found)


def fingerprint(section: str, part: str, release: str | None = None) -> str:
    """A hash of all that the machine code of a CUDA source, or of a Triton op, is made from.

    `release` is the compiler, unless it is the one installed.
    """
    if section == "cuda":
        sources = cuda_resources.included(cuda_resources.SOURCES[part])
        target = [*cuda_resources.ARCHS, *cuda_resources.FLAGS]
    else:
        sources, target = triton_sources(part), []  # triton_aot.py says for what it compiles
    digest = hashlib.sha256("\n".join([release or compiler(section), *target]).encode())
    for path in sources:
        digest.update(
            f"\n{path.relative_to(ROOT).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode()
        )
    return digest.hexdigest()[:32]


def checks(section: str) -> str:
    """A hash of the files that check a section's machine code and read what it takes."""
    readers = [compile_facts, cuda_resources] if section == "cuda" else [compile_facts]
    return hashlib.sha256(b"".join(Path(module.__file__).read_bytes() for module in readers)).hexdigest()[:32]


def changed(section: str, everything: bool | None = None) -> list[str]:
    """The parts that must be compiled: those that are not what the file was written for, or all of them where
    `everything` is asked for (unless told, by SPEEDER_COMPILE_ALL=1)."""
    if everything is None:
        everything = os.environ.get("SPEEDER_COMPILE_ALL") == "1"
    content = json.loads(FILE.read_text())[section]
    agreed, everything = content["parts"], everything or content.get("checks") != checks(section)
    return [
        part
        for part in PARTS[section]
        if everything or agreed.get(part, {}).get("hash") != fingerprint(section, part)
    ]


def summary(section: str, compiled: Collection[str]) -> str:
    """One line for the reader of a test run: what was compiled, what was not, and why."""
    kept = [part for part in PARTS[section] if part not in compiled]
    because = "asked for by SPEEDER_COMPILE_ALL=1"
    if os.environ.get("SPEEDER_COMPILE_ALL") != "1":
        because = "sources, flags, compiler or checks are not those of gpu_resources.json"
    words = [f"GPU kernels, {section}:"]
    if compiled:
        words.append(f"compiled and checked {', '.join(compiled)} ({because}){';' if kept else ''}")
    if kept:
        words.append(
            f"not compiled: {', '.join(kept)} (the same sources, flags and compiler passed the same checks when "
            "gpu_resources.json was written; SPEEDER_COMPILE_ALL=1 compiles them all the same)"
        )
    return " ".join(words)


# --- comparing and writing ---------------------------------------------------------------------------------------


def worse(
    section: str, table: list[dict], prefix: str = "", agreed: dict | None = None, release: str | None = None
) -> list[str]:
    """What `table` has that is worse than agreed, new or gone, among the keys that begin with `prefix`; one line each.

    `agreed` and `release` are the file's contents and the installed compiler, unless given.
    """
    agreed = agreed or json.loads(FILE.read_text())
    release = release or compiler(section)
    if agreed[section]["compiler"] != release:
        return [f"{section} {release} is installed, the file is of {agreed[section]['compiler']}: {REWRITE}"]
    before = {key: row for key, row in agreed_rows(section, agreed).items() if key.startswith(prefix)}
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


def compile_triton(ops: Collection[str], jobs: int | None = None) -> list[dict]:
    """The table of triton_aot.py for some ops, by a process that does not interpret.

    Raises:
        RuntimeError: what the process wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "table.json"
        command = [sys.executable, triton_aot.__file__, "--out", str(out), "--only", *ops]
        command += ["--jobs", str(jobs)] if jobs else []
        environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        result = subprocess.run(command, env=environ, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stderr[-8000:])
        return json.loads(out.read_text())


def renewed(section: str, everything: bool) -> tuple[dict[str, dict], list[str]]:
    """The parts of a section, those that changed compiled anew; and what is wrong with these."""
    before = json.loads(FILE.read_text())[section]["parts"]
    compiled = changed(section, everything)
    hashes = {part: fingerprint(section, part) for part in compiled}  # of what is there when compiling begins
    print(f"{section}: compiling {', '.join(compiled) or 'nothing'}", flush=True)
    table, problems = [], []
    if compiled and section == "cuda":
        table = cuda_resources.compile_all("nvcc", compiled)
        problems = compile_facts.cuda_problems("nvcc", table)
    elif compiled:
        table = compile_triton(compiled)
        problems = compile_facts.triton_problems(table)
    numbers = by_key(section, table)
    parts = {}
    for part in PARTS[section]:
        if part in compiled:
            rows = {key: row for key, row in numbers.items() if key.split()[0] == part}
            problems += [] if rows else [f"{section} {part}: no kernel was compiled"]
            parts[part] = {"hash": hashes[part], "rows": rows}
        else:
            parts[part] = before[part]
    return parts, problems


def write(sections: dict[str, dict[str, dict]]) -> None:
    """Rewrite the file, a kernel a line."""
    texts = []
    for section, parts in sections.items():
        release = compiler("triton" if section == "triton" else "cuda")
        bodies = []
        for part, content in parts.items():
            rows = [f"     {json.dumps(key)}: {json.dumps(row)}" for key, row in content["rows"].items()]
            head = f'     "hash": {json.dumps(content["hash"])},\n' if "hash" in content else ""
            bodies.append(
                f'    {json.dumps(part)}: {{\n{head}     "rows": {{\n' + ",\n".join(rows) + "\n     }}"
            )
        passed = "" if section == "launches" else f'   "checks": {json.dumps(checks(section))},\n'
        texts.append(
            f'  {json.dumps(section)}: {{\n   "compiler": {json.dumps(release)},\n{passed}'
            f'   "columns": {json.dumps(list(COLUMNS[section]))},\n   "parts": {{\n'
            + ",\n".join(bodies)
            + "\n   }}"
        )
    FILE.write_text("{\n" + ",\n".join(texts) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="compile what has not changed, too")
    parser.add_argument("--only", choices=PARTS, help="leave the other section as it is")
    args = parser.parse_args()
    parts, problems = {}, []
    for section in PARTS:
        if args.only in (None, section):
            parts[section], wrong = renewed(section, args.all)
            problems += wrong
        else:
            parts[section] = json.loads(FILE.read_text())[section]["parts"]
    launches = cuda_launches.launches()
    problems += cuda_launches.problems(launches)
    if problems:
        raise SystemExit(
            "\n".join([*problems, f"{FILE.name} is left as it was: {len(problems)} checks failed"])
        )
    rows = occupied(launches, agreed_rows("cuda", {"cuda": {"parts": parts["cuda"]}}))
    parts["launches"] = {"all": {"rows": by_key("launches", rows)}}
    write({section: parts[section] for section in COLUMNS})
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
