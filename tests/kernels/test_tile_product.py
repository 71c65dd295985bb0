"""The products under all CPU kernels, on operands that end at forbidden pages: the address sanitizer does not see
what AMX reads and writes."""

from __future__ import annotations

import os
import runpy
import subprocess
from pathlib import Path

import pytest

from speeder_kernels import _host
from tests.kernels import compilers
from tests.kernels.test_spae_attention_cpu import ISAS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("level", ["-O2", "-O3"])
@pytest.mark.parametrize("isa", ISAS)
def test_products_are_exact_and_touch_nothing_else(isa, level, tmp_path):
    """At both levels: at -O2 GCC 12 was seen to leave out half of the configuration of AMX."""
    if ISAS.index(isa) > ISAS.index(_host.best_instruction_set()):
        pytest.skip(f"this processor has no {isa}")
    flags = runpy.run_path(str(ROOT / "setup.py"))["ISAS"][isa]
    program, parts = tmp_path / "guarded_product", []
    for source in ("tests/kernels/guarded_product.cpp", "csrc/cpu/common/isa.cpp"):
        parts.append(tmp_path / f"{Path(source).stem}.o")
        command = [*compilers.cxx(), level, "-std=c++17", *flags, f"-DSPEEDER_ISA={isa}", "-Icsrc"]
        subprocess.run([*command, "-c", source, "-o", parts[-1]], cwd=ROOT, check=True)
    subprocess.run([os.environ.get("CXX", "g++"), *parts, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, (result.returncode, result.stdout)
    checked, wrong = (int(word) for word in result.stdout.split() if word.isdigit())
    assert checked > 50_000 and wrong == 0
