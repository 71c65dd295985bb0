"""What the package says of itself: its names, its backends, and how it gets on without compiled code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import speeder_kernels
from speeder_kernels import dispatch
from speeder_kernels.__main__ import describe

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


ALL_OPS = """
import sys, torch
asked = []  # whoever wants to know of CUDA
is_available = torch.cuda.is_available
def watch():
    asked.append(sys._getframe(1).f_globals["__name__"])
    return is_available()
torch.cuda.is_available = watch
import speeder_kernels as sk

def untouched():
    assert not [name for name in asked if name.startswith("speeder")], asked
    assert "triton" not in sys.modules and not torch.cuda.is_initialized()

def all_ops(x, lengths, ids, rows, present):
    out = sk.spae_attention(x[:, None], x[:, None], x[:, None], lengths, lengths, 2, 2, ids, ids)[:, 0]
    out = sk.pack_tokens(ids, out, out, rows, ids, out)
    out, _ = sk.compress_items(out[None], x[None, :, 0], present, x[0])
    out = torch.cat((out, out))
    return sk.item_cross_entropy(out, x, ids, scale=1.0), *sk.topk_items(out, x, 1)

untouched()
x = torch.randn(2, 4, requires_grad=True)
lengths, ids, rows = torch.tensor([0, 2]), torch.tensor([0, 1]), torch.tensor([0, -1])
inputs = x, lengths, ids, rows, torch.ones(1, 2, dtype=torch.bool)
"""


def test_import_and_calls_on_a_cpu_leave_cuda_and_triton_alone():
    """CUDA that was asked for cannot be used in a worker process that is forked later."""
    calls = "loss, *_ = all_ops(*inputs); loss.sum().backward(); untouched(); print(x.grad.shape, asked)"
    assert "torch.Size([2, 4])" in python("-c", ALL_OPS + calls, TRITON_INTERPRET="1")


def test_backends_are_found_by_a_compiled_graph():
    """The first call of a process may be one that torch.compile traces whole."""
    code = """
compiled = torch.compile(all_ops, backend="aot_eager", fullgraph=True)
def run(f):
    x.grad = None
    loss, scores, items = f(*inputs)
    loss.sum().backward()
    return loss, scores, items, x.grad
assert "_ops.so" not in open("/proc/self/maps").read()
results = run(compiled)
assert "_ops.so" in open("/proc/self/maps").read()
assert all(torch.equal(a, b) for a, b in zip(results, run(all_ops), strict=True))
refused = torch.compile(lambda x: sk.topk_items(x, x, 1, backend="cuda"), backend="aot_eager", fullgraph=True)
try:
    refused(x)
except ValueError as error:
    print(error)
"""
    assert "backend: 'cuda' cannot run topk_items here: " in python("-c", ALL_OPS + code)


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("2.9.1", False),
        ("3.5.1", False),
        ("3.6.0", True),
        ("3.6.0+git9844da95", True),
        ("3.10", True),
        ("4.0", True),
    ],
)
def test_an_old_triton_is_refused(version, fits, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", version)
    monkeypatch.setattr(dispatch, "missing", dispatch.missing.__wrapped__)  # looks again
    reason = f"it needs triton 3.6 or newer, got {version}"
    table = describe().splitlines()
    if fits:
        assert dispatch.backends()["triton"].available and any(
            line.startswith("  triton           available") for line in table
        )
        return
    assert f"  triton           no: {reason}" in table
    with pytest.raises(
        ValueError, match=re.escape(f"cannot run topk_items here: {reason}; available: cpu, ref")
    ):
        dispatch.choose("topk_items", "triton", torch.zeros(1))


def gpu_tensor(size: int, device: str = "cuda:0", dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(2, 1, size, device=device, dtype=dtype)


@pytest.fixture
def gpus(monkeypatch) -> None:
    """As if there were two GPUs, a T4 and an A100, all was installed, and Triton not interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(dispatch, "missing", lambda name: "")
    capabilities = [(7, 5), (8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["T4", "A100"][index])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dispatch, "_built_archs", ["sm_80", "sm_90", "sm_100"].copy)


@pytest.mark.parametrize("op", sorted(OPS))
def test_a_gpu_that_is_too_old_gets_the_reference(op, gpus, monkeypatch):
    old, new = gpu_tensor(64, "cuda:0"), gpu_tensor(64, "cuda:1")
    assert dispatch.choose(op, None, new) == dispatch.choose(op, "triton", new) == "triton"
    assert dispatch.choose(op, None, old) == "reference"
    for name in ("triton", "cuda"):
        if op in dispatch.KERNELS[name]:
            reason = (
                f"'{name}' cannot run {op} here: it needs a GPU of compute capability 8.0 or newer, got 7.5; "
            )
            with pytest.raises(ValueError, match=re.escape(reason) + "available: reference$"):
                dispatch.choose(op, name, old)
    monkeypatch.setattr(torch.version, "hip", "6.4")  # AMD counts otherwise
    assert dispatch.choose(op, None, old) == "triton"


def test_the_report_says_which_gpus_are_too_old(gpus):
    lines = describe().splitlines()
    assert (
        "GPU 0              T4, not for triton and cuda: it needs a GPU of compute capability 8.0 or newer, got 7.5"
        in lines
    )
    assert "GPU 1              A100, fit for triton and cuda" in lines


@pytest.mark.parametrize(
    ("archs", "served"),
    [
        ("sm_80 sm_90 sm_100", "8.0 8.6 8.9 9.0 10.0 10.3 12.0"),
        ("sm_90", "9.0 10.0 10.3 12.0"),  # its PTX is compiled for what follows
        ("sm_80", "8.0 8.6 8.9 9.0 10.0 10.3 12.0"),
        ("sm_80 sm_100", "8.0 8.6 8.9 10.0 10.3 12.0"),
    ],
)
def test_a_gpu_that_was_not_built_for_is_told_so(archs, served, gpus, monkeypatch):
    monkeypatch.setattr(dispatch, "_built_archs", archs.split)
    for name in ("8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"):
        capability = tuple(map(int, name.split(".")))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        tensor = gpu_tensor(64, "cuda:1")
        assert dispatch.choose("pack_tokens", "triton", tensor) == "triton"
        if name in served.split():
            assert dispatch.choose("pack_tokens", "cuda", tensor) == "cuda"
            assert "A100, fit for triton and cuda" in describe()
        else:
            message = re.escape(f"got {name}; available: triton, reference")
            with pytest.raises(ValueError, match="it was built for GPUs of compute capability .*" + message):
                dispatch.choose("pack_tokens", "cuda", tensor)
            assert "A100, fit for triton, not for cuda: it was built for" in describe()


def test_wide_heads_go_to_another_backend(gpus):
    wide = gpu_tensor(257, "cuda:1")
    assert dispatch.choose("spae_attention", None, gpu_tensor(256, "cuda:1")) == "triton"
    assert dispatch.choose("spae_attention", None, wide) == "reference"
    assert dispatch.choose("pack_tokens", None, wide) == "triton"
    for name in ("triton", "cuda"):
        reason = f"'{name}' cannot run spae_attention here: it takes heads of at most 256 elements, got 257; "
        with pytest.raises(ValueError, match=reason + "available: reference"):
            dispatch.choose("spae_attention", name, wide)


def test_float32_attention_on_a_gpu_is_not_for_cuda(gpus, monkeypatch):
    """It has no kernel for it, and says what has; without Triton the reference serves."""
    single = gpu_tensor(64, "cuda:1", torch.float32)
    assert dispatch.choose("spae_attention", None, single) == "triton"
    reason = "'cuda' cannot run spae_attention here: it runs on bfloat16 or float16, got float32; "
    with pytest.raises(ValueError, match=reason + "available: triton, reference$"):
        dispatch.choose("spae_attention", "cuda", single)
    monkeypatch.setattr(dispatch, "missing", lambda name: "not installed" if name == "triton" else "")
    assert dispatch.choose("spae_attention", None, single) == "reference"
    for dtype in (torch.bfloat16, torch.float16):
        assert dispatch.choose("spae_attention", None, gpu_tensor(64, "cuda:1", dtype)) == "cuda"
    for op in ("pack_tokens", "compress_items"):
        assert dispatch.choose(op, None, single) == "cuda"


def test_wide_heads_on_amd_go_to_the_reference(gpus, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(dispatch, "missing", lambda name: "no CUDA" if name == "cuda" else "")
    wide = gpu_tensor(129, "cuda:1")
    assert dispatch.choose("spae_attention", None, gpu_tensor(128, "cuda:1")) == "triton"
    assert dispatch.choose("spae_attention", None, wide) == "reference"
    assert dispatch.choose("pack_tokens", None, wide) == "triton"
    reason = "on AMD GPUs it takes heads of at most 128 elements, got 129; available: reference"
    with pytest.raises(ValueError, match=reason):
        dispatch.choose("spae_attention", "triton", wide)


@pytest.mark.parametrize("backend", [None, "triton"])
def test_a_wide_head_of_an_attention(backend):
    """Through the function that users call; the largest of all backends' tests has 256 elements."""
    x, cu, ranks = torch.randn(3, 1, 272), torch.tensor([0, 3]), torch.arange(3)

    def attention(backend):
        return speeder_kernels.spae_attention(x, x, x, cu, cu, 3, 3, ranks, ranks, backend=backend)

    if backend is None:
        torch.testing.assert_close(attention(None), attention("reference"))
        return
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, so Triton is not interpreted")
    with pytest.raises(
        ValueError, match="it takes heads of at most 256 elements, got 272; available: cpu, reference"
    ):
        attention(backend)


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
    assert "CPU kernels        for " in out and "CUDA kernels       " in out
    for backend in dispatch.backends().values():
        state = "available: " + ", ".join(backend.ops) if backend.available else "no: " + backend.reason
        assert f"  {backend.name:<16} {state}" in out


def test_imports_neither_speeder_nor_transformers():
    code = "import sys, speeder_kernels; print([m for m in ('speeder', 'transformers') if m in sys.modules])"
    assert python("-c", code).strip() == "[]"


def test_works_without_compiled_code(tmp_path):
    """A copy of the Python files alone: the reference serves, and the report says what is missing."""
    copy = tmp_path / "speeder_kernels"
    for source in PACKAGE.rglob("*.py"):
        if source.name == "_build_info.py":
            continue
        target = copy / source.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
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
    assert "_ops.so was not built (pip install" in out and "compiled code      not built (pip install" in out


def test_a_broken_library_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    (tmp_path / "_ops.so").write_bytes(b"not a library")
    monkeypatch.setattr(dispatch, "library_path", lambda name: tmp_path / name)
    assert dispatch._load("_ops.so").startswith("_ops.so does not load: ")
    assert "was not built" in dispatch._load("_ops_cuda.so")
