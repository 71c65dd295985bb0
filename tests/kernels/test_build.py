"""The build: what its environment variables mean, what setup.py writes, and a build without a compiler.

That CUDA code compiles: test_cuda_compiles.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speeder_kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build():
    """setup.py as a module; importing it builds nothing."""
    spec = importlib.util.spec_from_file_location("speeder_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path) -> Path:
    """A CUDA toolkit whose nvcc only answers questions: release 12.4, which does not know sm_100."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        '--dryrun) echo "#\\$ TOP=$(dirname "$0")/.." >&2;;\n'
        "--version) echo 'Cuda compilation tools, release 12.4, V12.4.131';;\n"
        "--list-gpu-arch) printf 'compute_80\\ncompute_90\\n';;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc.parent.parent


def test_cuda_0_and_unknown_values(build, toolkit):
    path = {"PATH": f"{toolkit}/bin:/usr/bin:/bin"}
    off = build.find_cuda("13.0", {**path, "SPEEDER_CUDA": "0"})
    assert (off.nvcc, off.missing) == ("", "switched off by SPEEDER_CUDA=0")
    for value in ("yes", "2", "AUTO"):
        with pytest.raises(SystemExit, match=f"SPEEDER_CUDA: expected auto, 0 or 1, got '{value}'"):
            build.find_cuda("13.0", {**path, "SPEEDER_CUDA": value})


def test_a_torch_without_cuda_gets_no_cuda_kernels_unless_asked_for(build, toolkit):
    """They take minutes to compile, and nothing would load them."""
    path = {"PATH": f"{toolkit}/bin:/usr/bin:/bin"}
    for auto in ({}, {"SPEEDER_CUDA": "auto"}):
        cuda = build.find_cuda(None, {**path, **auto})
        assert cuda.nvcc == ""
        assert cuda.missing == "this PyTorch has no CUDA; SPEEDER_CUDA=1 builds them all the same"
    assert build.find_cuda(None, {**path, "SPEEDER_CUDA": "1"}).version == "12.4"


@pytest.mark.parametrize("hidden", [{"PATH": "/nonexistent"}, {"PATH": "/bin", "CUDA_HOME": "/nonexistent"}])
def test_without_nvcc(build, hidden):
    """auto builds for the CPU and says why; 1 is an error."""
    where = "$CUDA_HOME/bin" if "CUDA_HOME" in hidden else "PATH"
    for auto in ({}, {"SPEEDER_CUDA": ""}, {"SPEEDER_CUDA": "auto"}):
        cuda = build.find_cuda("12.4", {**hidden, **auto})
        assert cuda.nvcc == "" and cuda.missing.startswith(f"nvcc was not in {where}; install")
    with pytest.raises(SystemExit, match=re.escape(f"but nvcc is not in {where}")):
        build.find_cuda("12.4", {**hidden, "SPEEDER_CUDA": "1"})


@pytest.mark.parametrize("wanted", ["auto", "1"])
def test_with_nvcc(build, toolkit, wanted):
    for environ in (
        {"PATH": f"{toolkit}/bin:/usr/bin:/bin"},
        {"PATH": "/usr/bin:/bin", "CUDA_HOME": str(toolkit)},
    ):
        cuda = build.find_cuda("12.4", {**environ, "SPEEDER_CUDA": wanted})
        assert (cuda.version, cuda.archs, cuda.missing) == ("12.4", (80, 90), "")
        assert cuda.home == toolkit.resolve()


def test_architectures_to_build_for(build, toolkit):
    path = {"PATH": f"{toolkit}/bin:/usr/bin:/bin"}
    for asked, archs in (("", (80, 90)), ("90", (90,)), ("90, 80", (80, 90))):
        assert build.find_cuda("12.4", {**path, "SPEEDER_CUDA_ARCHS": asked}).archs == archs
    for asked in ("100", "9.0", "80,sm_90", "80 90", ","):  # this nvcc does not know sm_100
        message = re.escape(f"SPEEDER_CUDA_ARCHS: expected some of 80, 90 with commas, got {asked!r}")
        with pytest.raises(SystemExit, match=message):
            build.find_cuda("12.4", {**path, "SPEEDER_CUDA_ARCHS": asked})


def test_the_cxx_compiler(build):
    """There may be none, unless one is asked for."""
    gxx, nothing = {"PATH": "/usr/bin:/bin"}, {"PATH": "/nonexistent"}
    for wanted in ({}, {"SPEEDER_CPU": "auto"}, {"SPEEDER_CPU": "1"}):
        assert build.find_cxx({**gxx, **wanted}) == ("g++", "")
    assert build.find_cxx({**gxx, "CXX": "/usr/bin/g++"}) == ("/usr/bin/g++", "")
    cxx, missing = build.find_cxx(nothing)
    assert cxx == "" and missing.startswith("g++ was not in PATH; install g++ 11 or newer")
    with pytest.raises(SystemExit, match=r"SPEEDER_CPU=1 asks for the CPU kernels, but g\+\+ is not in PATH"):
        build.find_cxx({**nothing, "SPEEDER_CPU": "1"})
    with pytest.raises(
        SystemExit, match=r"CXX: expected a C\+\+ compiler, got 'nocxx', which is not in PATH"
    ):
        build.find_cxx({**gxx, "CXX": "nocxx"})
    with pytest.raises(SystemExit, match="SPEEDER_CPU: expected auto or 1, got '0'"):
        build.find_cxx({**gxx, "SPEEDER_CPU": "0"})


def build_elsewhere(folder: Path, **environ: str) -> subprocess.CompletedProcess:
    """The whole way through setuptools, with what it makes in `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPEEDER_", "C"))}
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    return subprocess.run(command, cwd=ROOT, env={**kept, **environ}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SPEEDER_CUDA": "1"}, "SPEEDER_CUDA=1 asks for the CUDA kernels, but nvcc is not in PATH"),
        ({"SPEEDER_CPU": "1"}, "SPEEDER_CPU=1 asks for the CPU kernels, but g++ is not in PATH"),
    ],
)
def test_the_command_fails_in_one_line(tmp_path, environ, message):
    """What is asked for and is not there stops the build before it starts."""
    result = build_elsewhere(tmp_path, PATH="/nonexistent", **environ)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == message
    assert not list(tmp_path.iterdir())


WITHOUT = """
import sys, warnings
# An editable install finds modules by a hook of its own, which would find the compiled ones again.
sys.meta_path = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
import torch, speeder, speeder_kernels as sk
assert sk.__file__.startswith(sys.argv[1]) and speeder.__file__.startswith(sys.argv[1]), sk.__file__
from speeder.io.machine import describe as machine
from speeder_kernels.__main__ import describe
from tests.model.worlds import tiny_backbone, tiny_catalogue

x = torch.randn(2, 4, requires_grad=True)
lengths, ids, rows = torch.tensor([0, 2]), torch.tensor([0, 1]), torch.tensor([0, -1])
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    out = sk.spae_attention(x[:, None], x[:, None], x[:, None], lengths, lengths, 2, 2, ids, ids)[:, 0]
    out = sk.pack_tokens(ids, out, out, rows, ids, out)
    out, _ = sk.compress_items(out[None], x[None, :, 0], torch.ones(1, 2, dtype=torch.bool), x[0])
    out = torch.cat((out, out))
    sk.item_cross_entropy(out, x, ids, scale=1.0).sum().backward()
    scores, items = sk.topk_items(out, x, 1)
assert x.grad.isfinite().all() and x.grad.any() and items.shape == (2, 1)
print("warned", len(told), told[0].message)

model = speeder.SpeederForCausalLM.from_backbone(tiny_backbone(), tiny_catalogue())
ids = torch.tensor([[1, 66, 67, 68]])
model(input_ids=ids, labels=ids).loss.backward()
print("model", sum(p.grad is not None for p in model.parameters()) > 10)
print("planned", sk.plan_packing([5, 3, 4, 2], 7), "on", machine(1)["instruction set"])
print(describe())
"""


def test_without_a_compiler_everything_works_through_the_reference(tmp_path):
    """The install goes through and says what it left out; kernels, model and report do what they do elsewhere."""
    result = build_elsewhere(tmp_path, PATH="/nonexistent")
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("speeder: ")]
    assert "compiled kernels are left out: g++ was not in PATH; install g++ 11 or newer" in line
    assert [path.name for path in tmp_path.rglob("*.*")] == ["_build_info.py"]
    unpacked = tmp_path / "lib"
    skipped = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    for package in ("speeder", "speeder_kernels"):
        shutil.copytree(ROOT / package, unpacked / package, ignore=skipped, dirs_exist_ok=True)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(unpacked), str(ROOT)))}
    command = [sys.executable, "-P", "-c", WITHOUT, str(unpacked)]
    result = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert (
        "warned 1 speeder_kernels has no compiled CPU kernels, and runs on its slower reference: _ops" in out
    )
    assert "model True" in out and "planned [[0, 3], [2, 1]] on none" in out
    missing = "g++ was not in PATH; install g++ 11 or newer, and then this package again"
    assert f"CPU kernels        no: {missing}" in out and "CUDA kernels       no: " in out
    assert "  cpu              no: _ops.so was not built (g++ was not in PATH; install g++ 11 or newer" in out


def test_gencode(build):
    assert build.gencode_flags((80, 90)) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_no_flag_binds_the_build_to_this_machine(build):
    assert "-march=native" not in (ROOT / "setup.py").read_text()
    assert build.ISAS["portable"] == []


def test_ninja_runs_what_is_written(build, tmp_path):
    """Paths with spaces, and flags with quotes, come through; a second run has nothing to do."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    source = folder / "x.cpp"
    source.write_text("#include <cstdio>\nint main() { std::puts(TEXT); }\n")
    ninja = build.Ninja(folder, "g++", build.Cuda(missing="not wanted"))
    ninja.lines[ninja.lines.index("  command = $cxx -shared $in -o $out $flags")] = (
        "  command = $cxx $in -o $out $flags"
    )
    compiled = ninja.add("cxx", folder / "x.o", [source], ['-DTEXT="a $b:c"'])
    program = ninja.add("link", folder / "x", [compiled], [])
    ninja.run()
    assert subprocess.run([program], capture_output=True, text=True).stdout == "a $b:c\n"
    stamp = program.stat().st_mtime_ns
    ninja.run()
    assert program.stat().st_mtime_ns == stamp


def test_build_info(build, tmp_path):
    both = ("g++", "", build.Cuda(nvcc="/cuda/bin/nvcc", version="13.0", archs=(80, 90)))
    for cxx, missing, cuda in (both, ("", 'no "g++"', build.Cuda(missing="no 'nvcc'"))):
        build.write_build_info(tmp_path, cxx, missing, "2.10.0", cuda)
        written: dict = {}
        exec((tmp_path / "speeder_kernels" / "_build_info.py").read_text(), written)
        info = written["BUILD_INFO"]
        assert info.pop("compiler").startswith("g++ (") == bool(cxx)
        archs = "sm_80 sm_90" if cxx else ""
        rest = ("2.10.0", missing, cuda.version, cuda.missing, archs)
        assert info == dict(
            zip(("torch", "cpu_missing", "cuda", "cuda_missing", "cuda_archs"), rest, strict=True)
        )


def test_a_launcher_comes_before_every_compiler(build, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDER_COMPILER_LAUNCHER", "nosuchlauncher --fast")
    with pytest.raises(
        SystemExit, match="SPEEDER_COMPILER_LAUNCHER: expected a program, got 'nosuchlauncher'"
    ):
        build.Ninja(tmp_path, "g++", build.Cuda())
    monkeypatch.setenv("SPEEDER_COMPILER_LAUNCHER", "env A=1")
    lines = build.Ninja(tmp_path, "g++", build.Cuda()).lines
    compiling = [line for line in lines if " -c $in " in line]
    assert [line.split()[2:5] for line in compiling] == [["env", "A=1", "$cxx"], ["env", "A=1", "$nvcc"]]


def test_a_clones_path_does_not_reach_the_compilers(build, tmp_path):
    """So that a launcher that keeps objects finds those of another clone."""
    ninja = build.Ninja(build.ROOT / "build" / "here", "g++", build.Cuda())
    ninja.compile("cpu/common/isa.cpp", ["-Icsrc"])
    assert str(ROOT) not in "\n".join(ninja.lines)


def test_kernel_files_know_no_torch():
    """Only the bindings include torch, so that kernels can be built and tested without it."""
    for source in (ROOT / "csrc").rglob("*.*"):
        includes = re.findall(r"#include [<\"](\S+)[>\"]", source.read_text())
        if any("torch" in include for include in includes):
            assert source.parent.name == "bindings", source


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (0, "_ops_cuda.so was built with CUDA 13.1, and the driver has no CUDA: update it"),
        (12090, "_ops_cuda.so was built with CUDA 13.1, and the driver has CUDA 12.9: update it"),
        (13000, ""),  # of the same major version: it serves newer ones within it
        (14000, ""),
    ],
)
def test_a_driver_that_is_too_old(monkeypatch, driver, reason):
    """The CUDA runtime is linked into our library: torch may run on a driver on which that does not."""
    monkeypatch.setattr(dispatch, "_cuda_versions", lambda: (13010, driver))
    monkeypatch.setattr(dispatch, "_load", lambda name: "")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dispatch._load_cuda() == reason


def test_the_library_tells_its_cuda(build):
    if not dispatch.library_path("_ops_cuda.so").exists():
        pytest.skip("_ops_cuda.so was not built: no nvcc at build time, or SPEEDER_CUDA=0")
    runtime, driver = dispatch._cuda_versions()
    assert runtime >= 12000 and driver >= 0
    if shutil.which("nvcc"):
        cuda = build.find_cuda("12.4", {**os.environ, "SPEEDER_CUDA": "1"})
        assert f"{runtime // 1000}.{runtime % 1000 // 10}" == cuda.version
