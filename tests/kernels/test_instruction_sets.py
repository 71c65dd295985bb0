"""The ops over items on every instruction set of this machine: their tests again, in processes of their own.

`test_spae_attention_cpu.py` and `test_sanitizers.py` do the same for theirs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speeder_kernels import _host
from tests.kernels.test_spae_attention_cpu import ISAS

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("test_compress_items", "test_item_cross_entropy", "test_topk_items", "test_pack_tokens")


@pytest.mark.parametrize("isa", ISAS)
def test_ops_over_items(isa):
    """The one in use runs in this process anyway."""
    if isa == _host.instruction_set():
        pytest.skip(f"{isa} is in use")
    if ISAS.index(isa) > ISAS.index(_host.best_instruction_set()):
        pytest.skip(f"this processor has no {isa}")
    files = [f"tests/kernels/{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    command += [
        "-k",
        "loop or blocks or sorting or many_rows or half_precision or matches or larger_than_a_cache",
    ]
    environ = {**os.environ, "SPEEDER_CPU_ISA": isa}
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


@pytest.mark.exact
def test_torch_and_the_kernels_keep_to_what_they_may_use():
    """Or `make test-avx2` would test something else."""
    torchs = torch.backends.cpu.get_cpu_capability().lower()
    usual = {"portable": torchs, "avx2": "avx2"}.get(_host.best_instruction_set(), "avx512")
    assert torchs == os.environ.get("ATEN_CPU_CAPABILITY", usual)
    assert _host.instruction_set() == os.environ.get("SPEEDER_CPU_ISA", _host.instruction_set())


def test_bfloat16_dot_products_are_not_used_where_they_are_slow():
    """Intel's do half of what float32 does (AMX far more); the variable still allows them, for tests."""
    vendor = re.search(r"vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text())
    slow = vendor is not None and vendor.group(1) == "GenuineIntel"
    best = _host.best_instruction_set()
    if "SPEEDER_CPU_ISA" not in os.environ:
        assert _host.instruction_set() == (best.removesuffix("_bf16") if slow else best)


# A process with so small a stack for signals is refused AMX: what the tile registers hold would not fit.
REFUSED = """
import ctypes, sys
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
if sys.argv[1] == "small":
    stack = Stack(ctypes.addressof(memory), 0, 4096)
    assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
from speeder_kernels import _host
print(_host.best_instruction_set())
"""


@pytest.mark.parametrize("stack", ["usual", "small"])
def test_amx_is_used_where_linux_grants_it(stack):
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if flags is None or not {"amx_tile", "amx_bf16", "avx512_bf16"} <= set(flags.group(1).split()):
        pytest.skip("this processor has no AMX")
    if _host.best_instruction_set() != "avx512_amx":
        pytest.skip("this system grants no AMX to anyone")
    command = [sys.executable, "-c", REFUSED, stack]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ("avx512_amx" if stack == "usual" else "avx512_bf16")
