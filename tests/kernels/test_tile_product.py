"""The products under all CPU kernels, on operands that end at forbidden pages: the address sanitizer does not see
what AMX reads and writes."""

from __future__ import annotations

import os
import runpy
import subprocess
from pathlib import Path

import pytest

from speeder_kernels import _host
from tests.kernels.test_spae_attention_cpu import ISAS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("level", ["-O2", "-O3"])
@pytest.mark.parametrize("isa", ISAS)
def test_products_are_exact_and_touch_nothing_else(isa, level, tmp_path):
    """At both levels: at -O2 GCC 12 was seen to leave out half of the configuration of AMX."""
    if ISAS.index(isa) > ISAS.index(_host.best_instruction_set()):
        pytest.skip(f"this processor has no {isa}")
    flags = runpy.run_path(str(ROOT / "setup.py"))["ISAS"][isa]
    sources = [
        ROOT / "tests" / "kernels" / "guarded_product.cpp",
        ROOT / "csrc" / "cpu" / "common" / "isa.cpp",
    ]
    program = tmp_path / "guarded_product"
    command = [os.environ.get("CXX", "g++"), level, "-std=c++17", *flags, f"-DSPEEDER_ISA={isa}"]
    command += [f"-I{ROOT / 'csrc'}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, (result.returncode, result.stdout)
    checked, wrong = (int(word) for word in result.stdout.split() if word.isdigit())
    assert checked > 50_000 and wrong == 0
