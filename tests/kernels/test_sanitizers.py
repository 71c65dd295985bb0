"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set of this machine.

The kernels are built once more, with both sanitizers, beside a copy of the Python files; `sanitizer_sweep.py` runs on
them in processes of its own. Two planted faults show that the sweep would be caught out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from speeder_kernels import _host
from tests.kernels.test_spae_attention_cpu import ISAS

ROOT = Path(__file__).resolve().parents[2]
# Optimizing would take longer than it saves: the kernels run for seconds.
FLAGS = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
# setup.py, where what this machine cannot run is compiled only so that the library links.
BUILD = """
import runpy, sys
setup = runpy.run_path("setup.py")
for isa in sys.argv[1].split():
    setup["ISAS"][isa] += ["-O0", "-fno-sanitize=all"]
sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
setup["main"]()
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are preloaded as on Linux")


class Tree:
    """A copy of the sources, built in place with the sanitizers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("csrc", "speeder_kernels"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)

    def build(self) -> None:
        environ = {**os.environ, "SPEEDER_CUDA": "0", "CXXFLAGS": FLAGS}
        cannot_run = ISAS[ISAS.index(_host.best_instruction_set()) + 1 :]
        command = [sys.executable, "-c", BUILD, " ".join(cannot_run)]
        result = subprocess.run(command, cwd=self.folder, env=environ, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]

    def sweep(self, isa: str, *ops: str) -> subprocess.CompletedProcess:
        asan = subprocess.run(
            ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
        )
        environ = {
            **os.environ,
            "LD_PRELOAD": asan.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0",  # what Python and torch keep to the end
            "SPEEDER_CPU_ISA": isa,
            "PYTHONPATH": os.pathsep.join((str(self.folder), str(ROOT))),
        }
        code = (
            "import speeder_kernels, sys\n"
            f"assert speeder_kernels.__file__.startswith({str(self.folder)!r}), speeder_kernels.__file__\n"
            "from tests.kernels.sanitizer_sweep import main\nmain()\n"
        )
        command = [sys.executable, "-c", code, *ops]
        return subprocess.run(command, cwd=self.folder, env=environ, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Tree:
    tree = Tree(tmp_path_factory.mktemp("sanitized"))
    tree.build()
    return tree


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_are_clean(tree, isa):
    if ISAS.index(isa) > ISAS.index(_host.best_instruction_set()):
        pytest.skip(f"this processor has no {isa}")
    result = tree.sweep(isa)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count(f"{isa} ") == 5, result.stdout


@pytest.mark.parametrize(
    ("file", "sound", "faulty", "report"),
    [
        (
            "pack_tokens/rows.cpp",
            "t < end; ++t",
            "t <= end; ++t",
            "ERROR: AddressSanitizer: heap-buffer-overflow",
        ),
        (
            "pack_tokens/pack_tokens.cpp",
            "1 + kElementsPerThread / args.hidden",
            "0x7FFFFFFFFFFFFFFF + args.hidden",
            "runtime error: signed integer overflow",
        ),
    ],
    ids=["out of bounds", "undefined behaviour"],
)
def test_a_planted_fault_is_caught(tree, file, sound, faulty, report):
    source = tree.folder / "csrc" / "cpu" / file
    text = source.read_text()
    assert text.count(sound) == 1
    try:
        source.write_text(text.replace(sound, faulty))
        tree.build()
        result = tree.sweep("portable", "pack_tokens")
    finally:
        source.write_text(text)
    assert result.returncode != 0 and report in result.stderr, result.stderr[-4000:]
