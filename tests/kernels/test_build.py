"""The build: what SPEEDER_CUDA means, what setup.py writes, and that CUDA code compiles without spills."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speeder_kernels import dispatch
from tests.kernels import cuda_launches, cuda_resources, gpu_resources

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
    assert build.find_cuda({**path, "SPEEDER_CUDA": "0"}).missing == "switched off by SPEEDER_CUDA=0"
    for value in ("yes", "2", "AUTO"):
        with pytest.raises(SystemExit, match=f"SPEEDER_CUDA: expected auto, 0 or 1, got '{value}'"):
            build.find_cuda({**path, "SPEEDER_CUDA": value})


@pytest.mark.parametrize("hidden", [{"PATH": "/nonexistent"}, {"PATH": "/bin", "CUDA_HOME": "/nonexistent"}])
def test_without_nvcc(build, hidden):
    """auto builds for the CPU and says why; 1 is an error."""
    where = "$CUDA_HOME/bin" if "CUDA_HOME" in hidden else "PATH"
    for auto in ({}, {"SPEEDER_CUDA": ""}, {"SPEEDER_CUDA": "auto"}):
        cuda = build.find_cuda({**hidden, **auto})
        assert (cuda.nvcc, cuda.missing) == ("", f"nvcc was not in {where}")
    with pytest.raises(SystemExit, match=re.escape(f"but nvcc is not in {where}")):
        build.find_cuda({**hidden, "SPEEDER_CUDA": "1"})


@pytest.mark.parametrize("wanted", ["auto", "1"])
def test_with_nvcc(build, toolkit, wanted):
    for environ in (
        {"PATH": f"{toolkit}/bin:/usr/bin:/bin"},
        {"PATH": "/usr/bin:/bin", "CUDA_HOME": str(toolkit)},
    ):
        cuda = build.find_cuda({**environ, "SPEEDER_CUDA": wanted})
        assert (cuda.version, cuda.archs, cuda.missing) == ("12.4", (80, 90), "")
        assert cuda.home == toolkit.resolve()


def test_architectures_to_build_for(build, toolkit):
    path = {"PATH": f"{toolkit}/bin:/usr/bin:/bin"}
    for asked, archs in (("", (80, 90)), ("90", (90,)), ("90, 80", (80, 90))):
        assert build.find_cuda({**path, "SPEEDER_CUDA_ARCHS": asked}).archs == archs
    for asked in ("100", "9.0", "80,sm_90", "80 90", ","):  # this nvcc does not know sm_100
        message = re.escape(f"SPEEDER_CUDA_ARCHS: expected some of 80, 90 with commas, got {asked!r}")
        with pytest.raises(SystemExit, match=message):
            build.find_cuda({**path, "SPEEDER_CUDA_ARCHS": asked})


def test_the_command_fails_in_one_line(tmp_path):
    """The whole way through setuptools: SPEEDER_CUDA=1 with nvcc hidden stops the build before it starts."""
    environ = {**os.environ, "PATH": "/nonexistent", "SPEEDER_CUDA": "1"}
    environ.pop("CUDA_HOME", None)
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        tmp_path,
        "--build-temp",
        tmp_path,
    ]
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == (
        "SPEEDER_CUDA=1 asks for the CUDA kernels, but nvcc is not in PATH"
    )
    assert not list(tmp_path.iterdir())


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


def test_build_info_is_written_once(build, tmp_path):
    path = tmp_path / "build_info.h"
    build.write_build_info(path, "g++", "2.10.0", build.Cuda(missing='no "nvcc"'))
    assert '#define SPEEDER_CUDA_MISSING "no \\"nvcc\\""' in path.read_text()
    stamp = path.stat().st_mtime_ns
    build.write_build_info(path, "g++", "2.10.0", build.Cuda(missing='no "nvcc"'))
    assert path.stat().st_mtime_ns == stamp


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
    cuda = build.find_cuda()
    if not cuda.missing:
        assert f"{runtime // 1000}.{runtime % 1000 // 10}" == cuda.version


@pytest.fixture(scope="module")
def compiled(build) -> dict[tuple[str, str], list[dict]]:
    """The kernels of each source and architecture that the installed nvcc knows; compiled once, several at a time."""
    cuda = build.find_cuda()
    if cuda.missing:
        pytest.skip(f"no CUDA compiler: {cuda.missing}")
    known = [arch for arch in cuda_resources.ARCHS if int(arch.rstrip("a")) in cuda.archs]
    table: dict[tuple[str, str], list[dict]] = {}
    for row in cuda_resources.compile_all(cuda.nvcc, archs=known):
        table.setdefault((row["op"], row["arch"]), []).append(row)
    return table


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", cuda_resources.ARCHS)
@pytest.mark.parametrize("source", cuda_resources.SOURCES, ids=cuda_resources.source_name)
def test_cuda_compiles_without_spills(build, compiled, source, arch):
    """ptxas reports no spill in any kernel, and no stack: what a thread indexes stays in registers.

    But for the small kernels where they are never launched: GPUs whose blocks have 99 KiB run sm_80's code
    (sm_86, sm_89), or compile the PTX (sm_120).
    """
    cuda = build.find_cuda()
    if int(arch.rstrip("a")) not in cuda.archs:
        pytest.skip(f"CUDA {cuda.version} does not know sm_{arch}")
    name = cuda_resources.source_name(source)
    rows = compiled[name, arch]
    launched = [row for row in rows if arch == "80" or "::SpaeSmall" not in row["kernel"]]
    assert launched
    assert not [row for row in launched if row["stack"] or row["spill_stores"] or row["spill_loads"]]
    problems = gpu_resources.worse("cuda", rows, f"{name} {arch} ", release=cuda.version)
    assert not problems, "\n".join(problems)


@pytest.mark.slow
def test_cuda_launches_take_no_more_than_agreed():
    """Shared memory of the CUDA kernels, and how many warps can be resident; within what an A100 has."""
    agreed = json.loads(gpu_resources.FILE.read_text())
    launches = cuda_launches.launches()
    assert max(launch["shared"] for launch in launches) <= 163 * 1024
    rows = gpu_resources.occupied(launches, agreed["cuda"]["rows"])
    problems = gpu_resources.worse("launches", rows, release=agreed["launches"]["compiler"])
    assert not problems, "\n".join(problems)


def test_agreed_cuda_kernels_have_a_source():
    """No rows are left of a file that is gone."""
    keys = json.loads(gpu_resources.FILE.read_text())["cuda"]["rows"]
    assert {key.split()[0] for key in keys} == set(map(cuda_resources.source_name, cuda_resources.SOURCES))
    assert {key.split()[1] for key in keys} == set(cuda_resources.ARCHS)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["pack_tokens", "compress_items"])
def test_cuda_moves_16_bytes_at_once(build, tmp_path, op):
    """Where rows allow it (all kernels but those of width 1), elements come and go in the widest access."""
    cuda = build.find_cuda()
    if cuda.missing:
        pytest.skip(f"no CUDA compiler: {cuda.missing}")
    source, ptx = ROOT / "csrc" / "cuda" / op / f"{op}.cu", tmp_path / "out.ptx"
    flags = ["-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-arch=sm_80"]
    subprocess.run([cuda.nvcc, *flags, "-ptx", str(source), "-o", str(ptx)], check=True)
    kernels = re.split(r"\.visible \.entry ", ptx.read_text())[1:]
    wide = [text for text in kernels if re.match(r"\w*Li[48]E", text)]
    assert len(wide) == 6  # three dtypes, two kernels
    for text in wide:
        accesses = re.findall(r"(?:ld|st)\.global\.(?:nc\.)?(?:v\d\.)?[bfus]\d+", text)
        assert {"ld.global.nc.v4.u32", "st.global.v4.u32"} <= set(accesses)
        assert not [access for access in accesses if access.endswith("16")], accesses
