"""CUDA code compiles without spills, with accesses of 16 bytes, and takes no more than gpu_resources.json holds.

A source is compiled where that file has another hash of it, or with SPEEDER_COMPILE_ALL=1. Else its tests are skipped:
what they ask was asked when the file was written, of the same code. The end of the test run says which it was.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable

import pytest

from tests.kernels import compile_facts, cuda_launches, cuda_resources, gpu_resources
from tests.kernels.compile_summary import PROPERTY

KEPT = "nothing changed since gpu_resources.json was written, when this was checked"


@pytest.fixture(scope="module")
def archs() -> list[str]:
    """Those that the installed nvcc knows, of all that kernels are compiled for."""
    if shutil.which("nvcc") is None:
        pytest.skip("no CUDA compiler: nvcc is not in PATH")
    command = ["nvcc", "--list-gpu-arch"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in cuda_resources.ARCHS if f"compute_{arch.rstrip('a')}" in known]


@pytest.fixture(scope="module")
def changed(archs) -> list[str]:
    return gpu_resources.changed("cuda")


@pytest.fixture(scope="module")
def compiled(changed, archs) -> list[dict]:
    """The kernels of what changed; compiled once, several files at a time."""
    return cuda_resources.compile_all("nvcc", changed, archs)


@pytest.fixture
def rows_of(changed, compiled, record_property) -> Callable[[str, str], list[dict]]:
    """The rows of a source and architecture; skips where it was not compiled."""
    record_property(PROPERTY, gpu_resources.summary("cuda", changed))

    def rows(name: str, arch: str) -> list[dict]:
        if name not in changed:
            pytest.skip(KEPT)
        found = [row for row in compiled if (row["op"], row["arch"]) == (name, arch)]
        return found or pytest.skip(f"this nvcc does not know sm_{arch}")

    return rows


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", cuda_resources.ARCHS)
@pytest.mark.parametrize("name", cuda_resources.SOURCES)
def test_cuda_compiles_without_spills(rows_of, name, arch):
    problems = compile_facts.cuda_spills(rows_of(name, arch))
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", cuda_resources.ARCHS)
@pytest.mark.parametrize("name", cuda_resources.SOURCES)
def test_cuda_takes_no_more_than_agreed(rows_of, name, arch):
    problems = gpu_resources.worse("cuda", rows_of(name, arch), f"{name} {arch} ")
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("name", compile_facts.COPYING)
def test_cuda_moves_16_bytes_at_once(changed, name):
    """Where rows allow it (all kernels but those of width 1), elements come and go in the widest access."""
    if name not in changed:
        pytest.skip(KEPT)
    problems = compile_facts.narrow_accesses("nvcc", name)
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_cuda_launches_take_no_more_than_agreed():
    """Shared memory of the CUDA kernels, and how many warps can be resident; within what an A100 has."""
    agreed = json.loads(gpu_resources.FILE.read_text())
    launches = cuda_launches.launches()
    assert not cuda_launches.problems(launches)
    assert cuda_launches.problems([{**launches[0], "shared": 164 * 1024}])
    rows = gpu_resources.occupied(launches, gpu_resources.agreed_rows("cuda"))
    problems = gpu_resources.worse("launches", rows, release=agreed["launches"]["compiler"])
    assert not problems, "\n".join(problems)


def test_agreed_cuda_kernels_have_a_source():
    """No rows are left of a file that is gone."""
    assert set(json.loads(gpu_resources.FILE.read_text())["cuda"]["parts"]) == set(cuda_resources.SOURCES)
    keys = gpu_resources.agreed_rows("cuda")
    assert {tuple(key.split()[:2]) for key in keys} == {
        (name, arch) for name in cuda_resources.SOURCES for arch in cuda_resources.ARCHS
    }


def test_spills_are_found():
    row = {"op": "a/b", "kernel": "Sound", "arch": "90a", "registers": 9}
    row |= {"stack": 0, "spill_stores": 0, "spill_loads": 0}
    small = {**row, "kernel": "speeder::cuda::SpaeSmallForward<Half, 64>", "stack": 8}
    assert compile_facts.cuda_spills([row, small]) == []  # which is not launched on that GPU
    for bad in ({**row, "stack": 8}, {**row, "spill_loads": 4}, {**small, "arch": "80"}):
        assert len(compile_facts.cuda_spills([row, bad])) == 1
    assert compile_facts.cuda_spills([small])  # nothing that is launched was compiled
