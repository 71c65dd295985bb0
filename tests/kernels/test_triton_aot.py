"""Every Triton kernel as it can be launched, compiled for each architecture with no GPU at hand: no register is
spilled, and shared memory stays within what the architecture has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from speeder_kernels import dispatch
from tests.kernels import gpu_resources, triton_aot

SCRIPT = Path(triton_aot.__file__)
ROW = {"op", "kernel", "arch", "case", "dtype", "constants", "num_warps", "num_stages"}
ROW |= {"registers", "stack", "shared", "occupancy", "matrix", "barriers"}
PRODUCTS = ("item_cross_entropy", "logit_gradient", "grad_hidden", "grad_table", "item_codes")


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env={**kept, **environ}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("triton") / "table.json"
    result = run("--out", str(path), "--jobs", "2")
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text())


def tuned(table: list[dict]) -> list[dict]:
    return [row for row in table if (row["op"], row["arch"]) not in triton_aot.UNTUNED]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_is_spilled(table):
    spilled = [row for row in tuned(table) if row["stack"]]
    assert not spilled, "\n".join(map(str, spilled))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_shared_memory_fits(table):
    """Also of the rows that may spill, but for the heads that the op refuses on AMD's GPUs."""

    def refused(row: dict) -> bool:
        head = row["constants"].get("D", 0) if row["op"] == "spae_attention" else 0
        return row["arch"].startswith("gfx") and head > dispatch.LARGEST_AMD_HEAD

    rows = [row for row in table if not refused(row)]
    too_large = [row for row in rows if row["shared"] > triton_aot.SHARED_LIMIT[row["arch"]]]
    assert not too_large, "\n".join(map(str, too_large))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_table_is_complete(table):
    """Every op for every target and dtype; the script itself refuses a kernel or a row of tiles that is left out."""
    assert all(set(row) == ROW for row in table)
    expected = {
        (op, arch, str(dtype).removeprefix("torch."))
        for op in triton_aot.CASES
        for arch, dtypes in triton_aot.TARGETS.items()
        for dtype in dtypes
    }
    assert {(row["op"], row["arch"], row["dtype"]) for row in table} >= expected
    assert all(row["arch"].startswith("gfx") or 0 < row["occupancy"] <= 1 for row in table)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_products_use_the_matrix_instruction_of_their_architecture(table):
    """And float32 is multiplied as such, not cut to 10 bits of mantissa (TF32)."""
    rows = [row for row in table if row["kernel"].removesuffix("_kernel") in PRODUCTS]
    assert len(rows) > 20
    for row in rows:
        wanted = {None} if row["dtype"] == "float32" else {triton_aot.MATRIX[row["arch"]]}
        assert row["matrix"] in wanted, row


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_attention_uses_the_matrix_instruction_of_its_architecture(table):
    """Where most of its time goes: the forward pass, and the gradient of q of heads up to 128. The other kernels have
    tiles for which Triton picks an older instruction, for some products or for all."""
    held = {"forward_kernel": 256, "queries_kernel": 128}
    rows = [row for row in table if row["constants"].get("BLOCK_D", 512) <= held.get(row["kernel"], 0)]
    assert {row["kernel"] for row in rows} == set(held)
    for row in rows:
        wanted = None if row["dtype"] == "float32" else triton_aot.MATRIX[row["arch"]]
        assert row["matrix"] == wanted, row


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_barriers_are_compiled(table):
    """Of the kernels that read what their other threads have stored, each of those that stand in the source: which they
    must be is tested in the interpreter (`missing_barriers_fail`)."""
    least = {"absolute_kernel": 2, "relative_kernel": 6}
    rows = [row for row in table if row["kernel"] in least]
    assert {row["kernel"] for row in rows} == set(least)
    for row in rows:
        assert row["barriers"] >= least[row["kernel"]], row


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_takes_more_than_agreed(table):
    problems = gpu_resources.worse("triton", table)
    assert not problems, "\n".join(problems)


def test_what_has_become_worse_is_named():
    """More registers, less occupancy, a kernel that is new or gone, and another compiler; better is no problem."""
    names = ("op", "arch", "kernel", "dtype", "case", "registers", "stack", "shared", "occupancy")
    row = dict(zip(names, ("pack", "90", "k", "float32", "H", 40, 0, 1024, 0.5), strict=True))
    rows = gpu_resources.by_key("triton", [row, row])
    assert list(rows) == ["pack 90 k float32 H", "pack 90 k float32 H #2"]
    agreed = {"triton": {"compiler": "3.9.0", "rows": {"pack 90 k float32 H": [40, 0, 1024, 0.5]}}}

    def worse(*table: dict, release: str = "3.9.0") -> str:
        return "\n".join(gpu_resources.worse("triton", list(table), agreed=agreed, release=release))

    assert worse(row) == worse({**row, "registers": 32, "occupancy": 0.75}) == ""
    assert worse({**row, "registers": 41}).startswith(
        "pack 90 k float32 H: registers 41, was 40; if it is worth"
    )
    assert worse({**row, "occupancy": 0.25}).startswith("pack 90 k float32 H: occupancy 0.25, was 0.5;")
    assert worse() == f"pack 90 k float32 H: gone; {gpu_resources.REWRITE}"
    assert worse(row, row) == f"pack 90 k float32 H #2: new; {gpu_resources.REWRITE}"
    assert worse(row, release="4.0").startswith("triton 4.0 is installed, the file is of 3.9.0")


def test_the_table_in_the_docs_is_of_the_file():
    agreed = json.loads(gpu_resources.FILE.read_text())
    lines = (SCRIPT.parents[2] / "docs" / "kernels.md").read_text().splitlines()
    rows = [line.split("|")[1:6] for line in lines if line.startswith(("  | triton | `", "  | cuda | `"))]
    assert len(rows) >= 10
    for section, key, registers, shared, occupancy in (map(str.strip, row) for row in rows):
        key = key.strip("`")
        numbers = agreed[section]["rows"][key]
        if section == "cuda":
            numbers = [*numbers, *agreed["launches"]["rows"][key.split(" ", 1)[1]]]
        expected = [str(numbers[0]), f"{numbers[2] / 1024:.1f}", f"{numbers[3]:.3f}"]
        assert [registers, shared, occupancy] == expected, f"docs/kernels.md: {key}"


def test_interpreted_kernels_are_refused(tmp_path):
    result = run("--out", str(tmp_path / "table.json"), TRITON_INTERPRET="1")
    assert result.returncode != 0 and "TRITON_INTERPRET is set" in result.stderr


def test_occupancy():
    """By registers (64 a thread: half), by shared memory (100 KiB: two blocks), by warps of a block."""
    assert triton_aot.occupancy(registers=32, shared=0, warps=4, arch=90) == 1.0
    assert triton_aot.occupancy(registers=64, shared=0, warps=4, arch=90) == 0.5
    assert triton_aot.occupancy(registers=32, shared=100 << 10, warps=8, arch=90) == 0.25
    assert triton_aot.occupancy(registers=32, shared=100 << 10, warps=8, arch=80) == 0.125
    assert triton_aot.occupancy(registers=255, shared=0, warps=8, arch=90) == 0.125
