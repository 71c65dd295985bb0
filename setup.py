"""Builds the compiled libraries of speeder_kernels with ninja: `pip install --no-build-isolation .`

Three libraries, placed beside the Python files: `_ops.so` (CPU kernels on torch's stable ABI), `_host` (a
pybind11 module), and `_ops_cuda.so` (CUDA kernels, where nvcc is found). torch's own BuildExtension refuses
CUDA sources with a CPU-only torch, and ours needs neither a GPU nor torch's CUDA libraries to build, hence
this build of our own.

Environment: SPEEDER_CUDA = auto (default: build the CUDA kernels if nvcc is found), 0 (do not) or 1 (nvcc
must be there). SPEEDER_CUDA_ARCHS = 80, 90 or 100, or several with commas: the GPUs to build for (default: all
that nvcc knows; one takes a third of the time). CXX names the C++ compiler, CXXFLAGS adds flags of your own
(-fsanitize=address, say), CUDA_HOME says where CUDA lies, MAX_JOBS how many compilers run at once.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# A100, H100, B200. Without the suffix of sm_90a: the kernels use no instruction that is one GPU's own (the
# tests compile them for sm_90a and sm_100a too), and plain code runs on the others of a family as well.
CUDA_ARCHS = (80, 90, 100)
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10, the oldest we support

# Compiled once for each: what the instruction set's name in C++ is, and the flags that allow it.
ISAS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = [*ISAS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    ISAS["avx512_bf16"] = [*ISAS["avx512"], "-mavx512bf16"]
    ISAS["avx512_amx"] = [*ISAS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]

# Those that register CPU kernels with torch, and CUDA kernels. Every csrc/cuda/*/*.cu is compiled beside them.
BINDINGS = ("bindings/cpu_attention", "bindings/cpu_items")
CUDA_BINDINGS = ("bindings/cuda_attention", "bindings/cuda_items")
# Those that share an op's work out among threads, compiled once.
SHARED_SOURCES = (
    "cpu/attention/attention",
    "cpu/compress_items/compress_items",
    "cpu/item_cross_entropy/item_cross_entropy",
    "cpu/pack_tokens/pack_tokens",
    "cpu/topk_items/topk_items",
)
# The sources compiled once for each, and whether a product and a sum may become one instruction: where it
# is off, every instruction set gives the same bits.
ISA_SOURCES = {
    "cpu/attention/backward": "fast",
    "cpu/attention/decode": "fast",
    "cpu/attention/forward": "fast",
    "cpu/compress_items/rows": "fast",
    "cpu/item_cross_entropy/tiles": "fast",
    "cpu/pack_tokens/rows": "off",
    "cpu/topk_items/tiles": "fast",
}
# Those that multiply matrices, and have variants of their own for bfloat16 dot products and for AMX; the others'
# AVX-512 code serves there too.
PRODUCT_ISAS = ("avx512_bf16", "avx512_amx")
PRODUCT_SOURCES = (
    "cpu/attention/backward",
    "cpu/attention/forward",
    "cpu/item_cross_entropy/tiles",
    "cpu/topk_items/tiles",
)


@dataclass(frozen=True)
class Cuda:
    """The CUDA compiler to use, or why there is none."""

    nvcc: str = ""
    version: str = ""
    archs: tuple[int, ...] = ()
    missing: str = ""

    @property
    def home(self) -> Path:
        return Path(self.nvcc).resolve().parent.parent


def find_cuda(environ: Mapping[str, str] = os.environ) -> Cuda:
    """Decide by SPEEDER_CUDA and by whether nvcc is there; SystemExit with one line where that fails."""
    wanted = environ.get("SPEEDER_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"SPEEDER_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return Cuda(missing="switched off by SPEEDER_CUDA=0")
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    if environ.get("CUDA_HOME"):
        nvcc = shutil.which("nvcc", path=str(Path(environ["CUDA_HOME"]) / "bin"))
    if nvcc is None:
        where = "$CUDA_HOME/bin" if environ.get("CUDA_HOME") else "PATH"
        if wanted == "1":
            raise SystemExit(f"SPEEDER_CUDA=1 asks for the CUDA kernels, but nvcc is not in {where}")
        return Cuda(missing=f"nvcc was not in {where}")
    # A symlink or a wrapper may stand on PATH: nvcc itself knows where its toolkit lies.
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-"], input="", capture_output=True, text=True)
    top = re.search(r"#\$ TOP=(\S+)", dry_run.stderr)
    if top:
        nvcc = str((Path(top.group(1)) / "bin" / "nvcc").resolve())
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = tuple(arch for arch in CUDA_ARCHS if f"compute_{arch}\n" in listed + "\n")
    archs = known
    if asked := environ.get("SPEEDER_CUDA_ARCHS"):
        names = {name.strip() for name in asked.split(",")}
        archs = tuple(arch for arch in known if str(arch) in names)
        if len(archs) < len(names):
            choice = ", ".join(map(str, known))
            raise SystemExit(f"SPEEDER_CUDA_ARCHS: expected some of {choice} with commas, got {asked!r}")
    return Cuda(nvcc=nvcc, version=re.search(r"release ([\d.]+)", version).group(1), archs=archs)


def gencode_flags(archs: tuple[int, ...]) -> list[str]:
    """Machine code for each architecture, and PTX of the newest for what comes after it."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class Ninja:
    """Collects rules and edges and writes them as a build.ninja."""

    def __init__(self, build_dir: Path, cxx: str, cuda: Cuda) -> None:
        self.build_dir = build_dir
        lines = [f"cxx = {_escape(cxx)}", f"nvcc = {_escape(cuda.nvcc)}", ""]
        lines += [
            "rule cxx",
            "  command = $cxx -MMD -MF $out.d -c $in -o $out $flags",
            "  depfile = $out.d",
            "  deps = gcc",
            # ptxas reports registers and spills; kept in a file, and shown only if nvcc fails.
            "rule nvcc",
            "  command = $nvcc -MMD -MF $out.d -c $in -o $out $flags > $out.log 2>&1 "
            "|| (cat $out.log; false)",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx -shared $in -o $out $flags",
            "",
        ]
        self.lines = lines

    def add(self, rule: str, output: Path, inputs: list[Path], flags: list[str]) -> Path:
        sources = " ".join(_escape(path) for path in inputs)
        self.lines += [
            f"build {_escape(output)}: {rule} {sources}",
            f"  flags = {' '.join(map(_shell, flags))}",
            "",
        ]
        return output

    def compile(self, source: str, flags: list[str], tag: str = "") -> Path:
        name = source.replace("/", "_") + tag + ".o"
        rule = "nvcc" if source.endswith(".cu") else "cxx"
        return self.add(rule, self.build_dir / name, [CSRC / source], flags)

    def run(self) -> None:
        (self.build_dir / "build.ninja").write_text("\n".join(self.lines))
        command = [find_ninja(), "-C", str(self.build_dir)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command).returncode:
            raise SystemExit(
                "the build of speeder_kernels' compiled libraries failed: see the messages above"
            )


def _escape(path: Path | str) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _shell(flag: str) -> str:
    quoted = f"'{flag}'" if re.search(r"[^\w=,./:@%+$-]", flag) else flag
    return quoted.replace("$", "$$")


def find_ninja() -> str:
    """The ninja on PATH, or the one in Python's ninja package."""
    found = shutil.which("ninja")
    if found:
        return found
    try:
        import ninja
    except ImportError:
        raise SystemExit("ninja is needed to build speeder_kernels: pip install ninja") from None
    return str(Path(ninja.BIN_DIR) / "ninja")


def write_build_info(path: Path, cxx: str, torch_version: str, cuda: Cuda) -> None:
    """build_info.h, left alone where nothing changed so that nothing is compiled again."""
    compiler = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    archs = " ".join(f"sm_{arch}" for arch in cuda.archs)
    values = {
        "COMPILER": compiler.splitlines()[0],
        "TORCH": torch_version,
        "CUDA_VERSION": cuda.version,
        "CUDA_MISSING": cuda.missing,
        "CUDA_ARCHS": archs,
    }
    lines = ["// Written by setup.py.", "#pragma once"]
    for name, value in values.items():
        text = value.replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'#define SPEEDER_{name} "{text}"')
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class BuildExt(build_ext):
    """Writes a build.ninja for the extensions and runs it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.cuda = find_cuda()
        if self.cuda.missing:
            print(f"speeder: building for the CPU only ({self.cuda.missing})", file=sys.stderr)
            self.extensions = [e for e in self.extensions if e.name != "speeder_kernels._ops_cuda"]
        else:
            archs = ", ".join(f"sm_{arch}" for arch in self.cuda.archs)
            print(f"speeder: building with CUDA {self.cuda.version} for {archs}", file=sys.stderr)

    def get_ext_filename(self, fullname: str) -> str:
        """The op libraries are no Python modules, so their names carry no Python version."""
        if fullname.split(".")[-1] in ("_ops", "_ops_cuda"):
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths

        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "g++")
        write_build_info(build_dir / "build_info.h", cxx, torch.__version__, self.cuda)

        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        base = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", f"-I{CSRC}", *extra]
        host = [*base, "-Wall", "-Wextra"]
        torch_flags = [*host, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        torch_flags += [f"-isystem{path}" for path in include_paths()]
        torch_libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
        pybind = [*base, f"-isystem{pybind11.get_include()}", f"-I{build_dir}"]
        pybind += [f"-isystem{path}" for path in dict.fromkeys(self.include_dirs)]

        ninja = Ninja(build_dir, cxx, self.cuda)
        isa = ninja.compile("cpu/common/isa.cpp", host)
        cpu = [isa, *(ninja.compile(f"{name}.cpp", torch_flags) for name in BINDINGS)]
        cpu += [ninja.compile(f"{name}.cpp", host) for name in SHARED_SOURCES]
        for name, flags in ISAS.items():
            for source, contract in ISA_SOURCES.items():
                if name in PRODUCT_ISAS and source not in PRODUCT_SOURCES:
                    continue
                variant = [*host, f"-ffp-contract={contract}", f"-DSPEEDER_ISA={name}", *flags]
                cpu.append(ninja.compile(f"{source}.cpp", variant, f".{name}"))
        ninja.add("link", self.output("_ops"), cpu, [*extra, *torch_libraries])

        module = [isa, ninja.compile("cpu/plan_packing/plan_packing.cpp", host)]
        module.append(ninja.compile("bindings/host_module.cpp", pybind))
        ninja.add("link", self.output("_host"), module, extra)

        if self.cuda.nvcc:
            device = ["-O3", "-std=c++17", f"-I{CSRC}", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
            device += gencode_flags(self.cuda.archs)
            kernels = sorted(path.relative_to(CSRC) for path in (CSRC / "cuda").glob("*/*.cu"))
            objects = [ninja.compile(str(path), device) for path in kernels]
            objects += [ninja.compile(f"{name}.cpp", torch_flags) for name in CUDA_BINDINGS]
            runtime = [f"-L{self.cuda.home / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            ninja.add("link", self.output("_ops_cuda"), objects, [*torch_libraries, *runtime])
        ninja.run()

    def output(self, name: str) -> Path:
        path = Path(self.get_ext_fullpath(f"speeder_kernels.{name}")).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


if __name__ == "__main__":
    libraries = ("speeder_kernels._ops", "speeder_kernels._host", "speeder_kernels._ops_cuda")
    setup(
        # Without sources: BuildExt knows them. setuptools wants the names, for the wheel's platform and its
        # files.
        ext_modules=[Extension(name, sources=[]) for name in libraries],
        cmdclass={"build_ext": BuildExt},
    )
