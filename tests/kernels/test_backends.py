"""What the package says of itself: its names, its backends, and how it gets on without compiled code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import speeder_kernels
from speeder_kernels import dispatch

PACKAGE = Path(speeder_kernels.__file__).parent
OPS = {"spae_attention", "pack_tokens", "compress_items", "item_cross_entropy", "topk_items"}


def python(*arguments: str, **environ: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environ}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_public_names():
    assert set(speeder_kernels.__all__) == OPS | {"backends", "plan_packing"}
    assert all(getattr(speeder_kernels, name).__doc__ for name in speeder_kernels.__all__)


def test_backends_say_why_they_are_missing():
    table = dispatch.backends()
    assert list(table) == ["triton", "cuda", "cpu", "reference"]
    for backend in table.values():
        assert backend.available != bool(backend.reason)
    assert set(table["reference"].ops) == OPS
    assert table["cpu"].available, table["cpu"].reason


@pytest.mark.parametrize("op", sorted(OPS))
@pytest.mark.parametrize("name", ["triton", "cuda", "cpu", "reference"])
def test_a_backend_runs_or_is_refused_with_the_reason(op, name):
    tensor = torch.zeros(1)
    backend = dispatch.backends()[name]
    gpu_only = name == "cuda" or (name == "triton" and not dispatch.interprets_triton())
    if gpu_only or op not in backend.ops:
        with pytest.raises(
            ValueError, match=rf"backend: '{name}' cannot run {op} here: .+; available: .*reference"
        ):
            dispatch.choose(op, name, tensor)
    else:
        assert dispatch.choose(op, name, tensor) == name


def test_float64_goes_to_the_reference():
    double = torch.zeros(1, dtype=torch.float64)
    assert dispatch.choose("pack_tokens", None, double) == "reference"
    with pytest.raises(ValueError, match="it runs on float32, bfloat16 or float16, got float64"):
        dispatch.choose("pack_tokens", "cpu", double)


@pytest.mark.skipif(not dispatch.interprets_triton(), reason="a GPU is here, so Triton is not interpreted")
def test_the_interpreter_runs_only_where_it_is_asked_for():
    assert dispatch.backends()["triton"].available, dispatch.backends()["triton"].reason
    for dtype in (torch.float32, torch.float16):
        tensor = torch.zeros(1, dtype=dtype)
        assert dispatch.choose("pack_tokens", "triton", tensor) == "triton"
        assert dispatch.choose("pack_tokens", None, tensor) == "cpu"
    with pytest.raises(
        ValueError, match="Triton's interpreter computes bfloat16 wrongly; available: cpu, ref"
    ):
        dispatch.choose("pack_tokens", "triton", torch.zeros(1, dtype=torch.bfloat16))


def test_without_a_gpu_triton_says_so():
    code = "import speeder_kernels as sk; print(sk.backends()['triton'])"
    environ = {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    out = python("-c", code + "; import sys; assert 'triton' not in sys.modules", **environ)
    assert "available=False" in out and "finds no CUDA device, and TRITON_INTERPRET=1 is not set" in out


HIDDEN = "import sys; sys.modules['triton'] = None\n"  # as if it were not installed
BROKEN = """
import sys
from importlib.util import spec_from_loader
class Broken:
    def find_spec(self, name, path=None, target=None):
        return spec_from_loader(name, self) if name == "triton" else None
    def create_module(self, spec):
        raise OSError("libcuda.so.1: cannot open shared object file")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Broken())
"""


@pytest.mark.parametrize(
    ("prelude", "reason"),
    [
        (HIDDEN, "triton is not installed (pip install triton)"),
        (BROKEN, "triton does not import: libcuda.so.1: cannot open"),
    ],
)
def test_works_where_triton_is_missing_or_broken(prelude, reason):
    code = (
        "import torch, speeder_kernels as sk; z = torch.zeros(2, dtype=torch.long)\n"
        "print(sk.pack_tokens(z, torch.eye(2), torch.eye(2), z - 1, z, torch.eye(2)).tolist())\n"
        "from speeder_kernels.__main__ import describe; print(describe())\n"
    )
    out = python("-c", prelude + code, TRITON_INTERPRET="1")
    assert "[[1.0, 0.0], [1.0, 0.0]]" in out
    assert f"  triton           no: {reason}" in out


def test_report():
    out = python("-m", "speeder_kernels")
    assert f"torch              {torch.__version__}" in out
    assert "instruction set    " in out and "CUDA kernels       " in out
    for backend in dispatch.backends().values():
        state = "available: " + ", ".join(backend.ops) if backend.available else "no: " + backend.reason
        assert f"  {backend.name:<16} {state}" in out


def test_imports_neither_speeder_nor_transformers():
    code = "import sys, speeder_kernels; print([m for m in ('speeder', 'transformers') if m in sys.modules])"
    assert python("-c", code).strip() == "[]"


def test_works_without_compiled_code(tmp_path):
    """A copy of the Python files alone: the reference serves, and the report says what is missing."""
    copy = tmp_path / "speeder_kernels"
    copy.mkdir()
    (copy / "triton").mkdir()
    for source in PACKAGE.rglob("*.py"):
        (copy / source.relative_to(PACKAGE)).write_text(source.read_text())
    code = (
        "import torch, speeder_kernels as sk; assert sk.__file__.startswith(TMP), sk.__file__\n"
        "z = torch.zeros(2, dtype=torch.long)\n"
        "print(sk.pack_tokens(z, torch.eye(2), torch.eye(2), z - 1, z, torch.eye(2)).tolist())\n"
        "print(sk.plan_packing([5, 3, 4, 2], 7)); print(sk.backends()['cpu'].reason)\n"
        "from speeder_kernels.__main__ import describe; print(describe())\n"
    )
    # An editable install finds modules by a hook of its own, which would find the compiled ones again.
    prelude = (
        f"TMP = {str(tmp_path)!r}; import sys; sys.path.insert(0, TMP)\n"
        "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
    )
    out = python("-P", "-c", prelude + code)
    assert "[[1.0, 0.0], [1.0, 0.0]]" in out
    assert "[[0, 3], [2, 1]]" in out
    assert "_ops.so was not built" in out and "compiled code      not built" in out


def test_a_broken_library_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    (tmp_path / "_ops.so").write_bytes(b"not a library")
    monkeypatch.setattr(dispatch, "library_path", lambda name: tmp_path / name)
    assert dispatch._load("_ops.so").startswith("_ops.so does not load: ")
    assert "was not built" in dispatch._load("_ops_cuda.so")
