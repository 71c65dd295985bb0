"""Builds the compiled libraries of speeder_kernels with ninja: `pip install --no-build-isolation .`

Three libraries, placed beside the Python files: `_ops.so` (CPU kernels) and `_ops_cuda.so` (CUDA kernels) on torch's
stable ABI, and `_native`, a pybind11 module. torch's own BuildExtension refuses CUDA sources with a CPU-only torch, and
ours needs neither a GPU nor torch's CUDA libraries to build, hence this build of our own. Without a C++ compiler there
are none, and the package works through its reference; `_build_info.py`, written beside them, says what was built, and
what was left out and why.

Environment:
  SPEEDER_CPU = auto (default: leave the CPU kernels out where there is no C++ compiler) or 1 (there must be one)
  SPEEDER_CUDA = auto (default: build the CUDA kernels if torch has CUDA and nvcc is found), 0 (do not) or 1 (nvcc must
    be there; for any torch)
  SPEEDER_CUDA_ARCHS = 80, 90 or 100, or several with commas: the GPUs to build for (default: all that nvcc knows; one
    takes a third of the time)
  CXX names the C++ compiler, CXXFLAGS adds flags of your own (-fsanitize=address, say), CUDA_HOME says where CUDA lies,
    MAX_JOBS how many compilers run at once
  SPEEDER_COMPILER_LAUNCHER = ccache, say: what is put before every call of a compiler. What it is given is the same in
    every clone, whatever the clone's path: compilers run in the clone, and paths within it are relative
"""

from __future__ import annotations

import fcntl
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
    "cpu/common/isa",
    "cpu/compress_items/compress_items",
    "cpu/item_cross_entropy/item_cross_entropy",
    "cpu/pack_tokens/pack_tokens",
    "cpu/plan_packing/plan_packing",
    "cpu/topk_items/topk_items",
)
# Those that the pybind11 module needs too.
NATIVE_SOURCES = ("cpu/common/isa", "cpu/plan_packing/plan_packing")
# The sources compiled once for each, those that take longest first, and whether a product and a sum may become one
# instruction: where it is off, every instruction set gives the same bits.
ISA_SOURCES = {
    "cpu/attention/backward": "fast",
    "cpu/attention/decode": "fast",
    "cpu/item_cross_entropy/tiles": "fast",
    "cpu/attention/forward": "fast",
    "cpu/topk_items/tiles": "fast",
    "cpu/compress_items/rows": "fast",
    "cpu/pack_tokens/rows": "off",
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


def find_cxx(environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """The C++ compiler, or "" and why there is none; SystemExit with one line where there must be one."""
    wanted = environ.get("SPEEDER_CPU") or "auto"
    if wanted not in ("auto", "1"):
        raise SystemExit(f"SPEEDER_CPU: expected auto or 1, got {wanted!r}")
    cxx = environ.get("CXX") or "g++"
    if shutil.which(cxx, path=environ.get("PATH", "")):
        return cxx, ""
    if environ.get("CXX"):
        raise SystemExit(f"CXX: expected a C++ compiler, got {cxx!r}, which is not in PATH")
    if wanted == "1":
        raise SystemExit("SPEEDER_CPU=1 asks for the CPU kernels, but g++ is not in PATH")
    return "", "g++ was not in PATH; install g++ 11 or newer, and then this package again"


def find_cuda(torch_cuda: str | None, environ: Mapping[str, str] = os.environ) -> Cuda:
    """Decide by SPEEDER_CUDA, by the CUDA that torch has, and by whether nvcc is there; SystemExit with one line where
    that fails."""
    wanted = environ.get("SPEEDER_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"SPEEDER_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return Cuda(missing="switched off by SPEEDER_CUDA=0")
    if wanted == "auto" and torch_cuda is None:
        return Cuda(missing="this PyTorch has no CUDA; SPEEDER_CUDA=1 builds them all the same")
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    if environ.get("CUDA_HOME"):
        nvcc = shutil.which("nvcc", path=str(Path(environ["CUDA_HOME"]) / "bin"))
    if nvcc is None:
        where = "$CUDA_HOME/bin" if environ.get("CUDA_HOME") else "PATH"
        if wanted == "1":
            raise SystemExit(f"SPEEDER_CUDA=1 asks for the CUDA kernels, but nvcc is not in {where}")
        return Cuda(missing=f"nvcc was not in {where}; install the CUDA toolkit, and then this package again")
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


def compiler_launcher(environ: Mapping[str, str] = os.environ) -> list[str]:
    """SPEEDER_COMPILER_LAUNCHER as words; SystemExit with one line where there is no such program."""
    words = shlex.split(environ.get("SPEEDER_COMPILER_LAUNCHER", ""))
    if words and shutil.which(words[0], path=environ.get("PATH", "")) is None:
        raise SystemExit(
            f"SPEEDER_COMPILER_LAUNCHER: expected a program, got {words[0]!r}, which is not in PATH"
        )
    return words


class Ninja:
    """Collects rules and edges, writes them as a build.ninja, and runs it in the folder of this file."""

    def __init__(self, build_dir: Path, cxx: str, cuda: Cuda) -> None:
        self.build_dir = build_dir
        launcher = " ".join(map(_shell, compiler_launcher()))
        self.lines = [
            f"builddir = {_escape(build_dir)}",  # where ninja keeps what it remembers
            f"cxx = {_escape(cxx)}",
            f"nvcc = {_escape(cuda.nvcc)}",
            # Headers of torch, CUDA and the compiler are watched too (-MD, not -MMD): the folder outlives them.
            "rule cxx",
            f"  command = {launcher} $cxx -MD -MF $out.d -c $in -o $out $flags",
            "  depfile = $out.d",
            "  deps = gcc",
            # ptxas reports registers and spills; kept in a file, and shown only if nvcc fails.
            "rule nvcc",
            f"  command = {launcher} $nvcc -MD -MF $out.d -c $in -o $out $flags > $out.log 2>&1 "
            "|| (cat $out.log; false)",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx -shared $in -o $out $flags",
            "",
        ]

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
        """One run at a time in a build folder: a second one waits, and then finds what the first has compiled."""
        command = [find_ninja(), "-f", str(self.build_dir / "build.ninja")]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        with (self.build_dir / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (self.build_dir / "build.ninja").write_text("\n".join(self.lines))
            if subprocess.run(command, cwd=ROOT).returncode:
                raise SystemExit(
                    "the build of speeder_kernels' compiled libraries failed: see the messages above"
                )


def _relative(path: Path) -> str:
    """From the folder in which the compilers run, where it lies within."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _escape(path: Path | str) -> str:
    path = _relative(path) if isinstance(path, Path) else path
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


def write_build_info(folder: Path, cxx: str, cpu_missing: str, torch_version: str, cuda: Cuda) -> None:
    """speeder_kernels/_build_info.py in `folder`, which speeder_kernels/_host.py reads."""
    compiler = ""
    if cxx:
        version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
        compiler = version.splitlines()[0]
    info = {
        "compiler": compiler,
        "torch": torch_version,
        "cpu_missing": cpu_missing,
        "cuda": cuda.version,
        "cuda_missing": cuda.missing,
        "cuda_archs": " ".join(f"sm_{arch}" for arch in cuda.archs),
    }
    lines = [f"    {name!r}: {value!r},\n" for name, value in info.items()]
    path = folder / "speeder_kernels" / "_build_info.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'"""Written by setup.py."""\n\nBUILD_INFO = {{\n{"".join(lines)}}}\n')


class BuildExt(build_ext):
    """Writes a build.ninja for the extensions and runs it."""

    def finalize_options(self) -> None:
        import torch

        super().finalize_options()
        if self.editable_mode:  # else pip would compile everything anew in a folder that it throws away
            self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")
        self.cuda = find_cuda(torch.version.cuda)
        self.cxx, self.cpu_missing = find_cxx()
        if not self.cxx:
            if self.cuda.nvcc and os.environ.get("SPEEDER_CUDA") == "1":
                raise SystemExit(
                    "SPEEDER_CUDA=1 asks for the CUDA kernels, but g++, which nvcc needs, is not in PATH"
                )
            self.cuda = Cuda(missing=self.cuda.missing or self.cpu_missing)
            print(
                f"speeder: compiled kernels are left out: {self.cpu_missing}. Everything works without them, "
                "through the reference in plain PyTorch (and Triton on a GPU), but more slowly.",
                file=sys.stderr,
            )
        elif self.cuda.missing:
            print(f"speeder: CUDA kernels are left out: {self.cuda.missing}", file=sys.stderr)
        else:
            archs = ", ".join(f"sm_{arch}" for arch in self.cuda.archs)
            print(f"speeder: building with CUDA {self.cuda.version} for {archs}", file=sys.stderr)
        built = {"_ops": self.cxx, "_native": self.cxx, "_ops_cuda": self.cuda.nvcc}
        self.extensions = [e for e in self.extensions if built[e.name.split(".")[-1]]]

    def get_ext_filename(self, fullname: str) -> str:
        """The op libraries are no Python modules, so their names carry no Python version."""
        if fullname.split(".")[-1] == "_native":
            return super().get_ext_filename(fullname)
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        import torch

        super().run()
        folder = ROOT if self.inplace else Path(self.build_lib)
        write_build_info(folder, self.cxx, self.cpu_missing, torch.__version__, self.cuda)
        built = {Path(self.get_ext_filename(extension.name)).name for extension in self.extensions}
        for library in (folder / "speeder_kernels").glob("*.so"):
            if (
                library.name not in built
            ):  # of an earlier build, or of version 0.1.0: it would be loaded all the same
                library.unlink()

    def build_extensions(self) -> None:
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths

        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Icsrc", "-Wall", "-Wextra", *extra]
        host = ["-O3", *common]
        # Bindings check arguments and call kernels: optimizing them would cost time and gain nothing.
        binding = ["-O1", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *common]
        binding += [f"-isystem{_relative(Path(path))}" for path in include_paths()]
        torch_libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
        ninja = Ninja(build_dir, self.cxx, self.cuda)

        if self.cuda.nvcc:
            device = ["-O3", "-std=c++17", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
            device += gencode_flags(self.cuda.archs)
            kernels = sorted(path.relative_to(CSRC) for path in (CSRC / "cuda").glob("*/*.cu"))
            objects = [ninja.compile(str(path), device) for path in kernels]
            objects += [ninja.compile(f"{name}.cpp", binding) for name in CUDA_BINDINGS]
            runtime = [f"-L{self.cuda.home / 'lib64'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            ninja.add("link", self.output("_ops_cuda"), objects, [*torch_libraries, *runtime])

        cpu = []
        for source, contract in ISA_SOURCES.items():
            for name, flags in ISAS.items():
                if name in PRODUCT_ISAS and source not in PRODUCT_SOURCES:
                    continue
                variant = [*host, f"-ffp-contract={contract}", f"-DSPEEDER_ISA={name}", *flags]
                cpu.append(ninja.compile(f"{source}.cpp", variant, f".{name}"))
        cpu += [ninja.compile(f"{name}.cpp", binding) for name in BINDINGS]
        shared = {name: ninja.compile(f"{name}.cpp", host) for name in SHARED_SOURCES}
        ninja.add("link", self.output("_ops"), [*cpu, *shared.values()], [*extra, *torch_libraries])

        includes = dict.fromkeys([pybind11.get_include(), *self.include_dirs])
        pybind = ["-O1", *common, *(f"-isystem{_relative(Path(path))}" for path in includes)]
        module = [shared[name] for name in NATIVE_SOURCES]
        module.append(ninja.compile("bindings/native_module.cpp", pybind))
        ninja.add("link", self.output("_native"), module, extra)
        ninja.run()

    def output(self, name: str) -> Path:
        path = Path(self.get_ext_fullpath(f"speeder_kernels.{name}")).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def main() -> None:
    libraries = ("speeder_kernels._ops", "speeder_kernels._native", "speeder_kernels._ops_cuda")
    setup(
        # Without sources: BuildExt knows them. setuptools wants the names, for the wheel's platform and its
        # files.
        ext_modules=[Extension(name, sources=[]) for name in libraries],
        cmdclass={"build_ext": BuildExt},
    )


if __name__ == "__main__":
    main()
