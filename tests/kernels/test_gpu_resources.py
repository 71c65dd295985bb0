"""gpu_resources.json: what is worse than it, what its hashes are of, and when it may be written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import compile_facts, cuda_launches, cuda_resources, gpu_resources, triton_aot

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("op", "arch", "kernel", "dtype", "case", "registers", "stack", "shared", "occupancy")
ROW = dict(zip(NAMES, ("pack", "90", "k", "float32", "H", 40, 0, 1024, 0.5), strict=True))


def test_what_has_become_worse_is_named():
    """More registers, less occupancy, a kernel that is new or gone, and another compiler; better is no problem."""
    rows = gpu_resources.by_key("triton", [ROW, ROW])
    assert list(rows) == ["pack 90 k float32 H", "pack 90 k float32 H #2"]
    numbers = {"pack 90 k float32 H": [40, 0, 1024, 0.5]}
    agreed = {"triton": {"compiler": "3.9.0", "parts": {"pack": {"rows": numbers}}}}

    def worse(*table: dict, release: str = "3.9.0") -> str:
        return "\n".join(gpu_resources.worse("triton", list(table), agreed=agreed, release=release))

    assert worse(ROW) == worse({**ROW, "registers": 32, "occupancy": 0.75}) == ""
    assert worse({**ROW, "registers": 41}).startswith(
        "pack 90 k float32 H: registers 41, was 40; if it is worth"
    )
    assert worse({**ROW, "occupancy": 0.25}).startswith("pack 90 k float32 H: occupancy 0.25, was 0.5;")
    assert worse() == f"pack 90 k float32 H: gone; {gpu_resources.REWRITE}"
    assert worse(ROW, ROW) == f"pack 90 k float32 H #2: new; {gpu_resources.REWRITE}"
    assert worse(ROW, release="4.0").startswith("triton 4.0 is installed, the file is of 3.9.0")


def test_the_table_in_the_docs_is_of_the_file():
    lines = (ROOT / "docs" / "kernels.md").read_text().splitlines()
    rows = [line.split("|")[1:6] for line in lines if line.startswith(("  | triton | `", "  | cuda | `"))]
    assert len(rows) >= 10
    for section, key, registers, shared, occupancy in (map(str.strip, row) for row in rows):
        key = key.strip("`")
        numbers = gpu_resources.agreed_rows(section)[key]
        if section == "cuda":
            numbers = [*numbers, *gpu_resources.agreed_rows("launches")[key.split(" ", 1)[1]]]
        expected = [str(numbers[0]), f"{numbers[2] / 1024:.1f}", f"{numbers[3]:.3f}"]
        assert [registers, shared, occupancy] == expected, f"docs/kernels.md: {key}"


# --- what a hash is of -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cuda_resources.SOURCES)
def test_every_file_that_nvcc_reads_is_hashed(name):
    if shutil.which("nvcc") is None:
        pytest.skip("no CUDA compiler: nvcc is not in PATH")
    source = cuda_resources.SOURCES[name]
    command = ["nvcc", "-M", "-std=c++17", f"-I{ROOT / 'csrc'}", str(source)]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    read = {Path(word).resolve() for word in words if word not in ("\\",) and not word.endswith(":")}
    ours = {path for path in read if path.is_relative_to(ROOT / "csrc")}
    assert source in ours and len(ours) > 3
    assert ours <= set(cuda_resources.included(source))


IMPORTED = """
import sys
from tests.kernels import gpu_resources, triton_aot
for op, cases in triton_aot.CASES.items():
    for name in [name for name in sys.modules if name.startswith("speeder_kernels.triton")]:
        del sys.modules[name]
    next(iter(cases(triton_aot.F32)))
    files = {module.__file__ for name, module in sys.modules.items() if name.startswith("speeder_kernels.triton")}
    missing = files - {str(path) for path in gpu_resources.triton_sources(op)}
    assert len(files) > 2 and not missing, (op, missing)
"""


def test_every_module_that_an_op_imports_is_hashed():
    result = subprocess.run([sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """A copy of the sources, and a file that was written for them."""
    for name in ("csrc/cuda", "csrc/cpu", "speeder_kernels/triton"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    aot = tmp_path / "tests" / "kernels" / "triton_aot.py"
    shutil.copy(triton_aot.__file__, aot)
    shutil.copy(ROOT / "csrc" / "dtype.h", tmp_path / "csrc")
    monkeypatch.setattr(cuda_resources, "ROOT", tmp_path)
    moved = {name: tmp_path / path.relative_to(ROOT) for name, path in cuda_resources.SOURCES.items()}
    monkeypatch.setattr(cuda_resources, "SOURCES", moved)
    monkeypatch.setattr(gpu_resources, "ROOT", tmp_path)
    monkeypatch.setattr(triton_aot, "__file__", str(aot))
    monkeypatch.setattr(gpu_resources, "FILE", tmp_path / "gpu_resources.json")
    monkeypatch.setattr(gpu_resources, "compiler", {"cuda": "13.0", "triton": "3.9"}.get)
    monkeypatch.delenv("SPEEDER_COMPILE_ALL", raising=False)
    sections = {
        section: {
            part: {"hash": gpu_resources.fingerprint(section, part), "rows": {f"{part} 80 k": [1, 0]}}
            for part in parts
        }
        for section, parts in gpu_resources.PARTS.items()
    }
    gpu_resources.write({**sections, "launches": {"all": {"rows": {}}}})
    return tmp_path


ATTENTION = [name for name in cuda_resources.SOURCES if name.startswith("attention/")]


@pytest.mark.parametrize(
    ("section", "file", "parts"),
    [
        ("cuda", "csrc/cuda/pack_tokens/kernels.cuh", ["pack_tokens/pack_tokens"]),
        ("cuda", "csrc/cuda/attention/softmax.cuh", ATTENTION),
        ("cuda", "csrc/cpu/attention/attention.h", ATTENTION),
        ("cuda", "csrc/dtype.h", list(cuda_resources.SOURCES)),
        ("cuda", "csrc/cpu/topk_items/tiles.cpp", []),
        ("triton", "speeder_kernels/triton/tiles.py", list(triton_aot.CASES)),
        ("triton", "tests/kernels/triton_aot.py", list(triton_aot.CASES)),
        ("triton", "csrc/dtype.h", []),
    ],
)
def test_a_change_is_compiled_and_nothing_else(copy, section, file, parts):
    assert gpu_resources.changed("cuda") == gpu_resources.changed("triton") == []
    with (copy / file).open("a") as text:
        text.write("\n")
    assert gpu_resources.changed(section) == parts


def test_an_ops_own_module_in_triton_is_its_own(copy):
    (source,) = (copy / "speeder_kernels" / "triton").rglob("topk_items.py")
    source.write_text(source.read_text() + "\n")
    assert gpu_resources.changed("triton") == ["topk_items"]


def test_another_compiler_or_the_wish_compiles_everything(copy, monkeypatch):
    monkeypatch.setattr(gpu_resources, "compiler", lambda section: "another")
    for section, parts in gpu_resources.PARTS.items():
        assert gpu_resources.changed(section) == list(parts)
    monkeypatch.undo()
    monkeypatch.setenv("SPEEDER_COMPILE_ALL", "1")
    assert gpu_resources.changed("cuda") == list(cuda_resources.SOURCES)


def test_the_summary_says_what_was_compiled_and_what_was_not(monkeypatch):
    monkeypatch.delenv("SPEEDER_COMPILE_ALL", raising=False)
    first, *others = gpu_resources.PARTS["triton"]
    some = gpu_resources.summary("triton", [first])
    assert f"compiled and checked {first} (sources, flags, compiler or checks are not those of" in some
    assert f"not compiled: {', '.join(others)} (the same sources" in some
    assert "compiled and checked" not in gpu_resources.summary("triton", [])
    monkeypatch.setenv("SPEEDER_COMPILE_ALL", "1")
    everything = gpu_resources.summary("triton", [first, *others])
    assert "(asked for by SPEEDER_COMPILE_ALL=1)" in everything and "not compiled" not in everything


def test_the_summary_is_printed_once_also_by_several_processes(tmp_path):
    """Of skipped tests too."""
    (tmp_path / "conftest.py").write_text(
        "from tests.kernels.compile_summary import pytest_terminal_summary  # noqa: F401\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import pytest\nfrom tests.kernels.compile_summary import PROPERTY\n"
        "@pytest.mark.parametrize('n', range(4))\n"
        "def test(n, record_property):\n"
        "    record_property(PROPERTY, 'GPU kernels, cuda: kept')\n"
        "    if n % 2: pytest.skip('kept')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", str(tmp_path)]
    command += ["--rootdir", str(tmp_path), "-c", str(tmp_path / "none.ini")]
    (tmp_path / "none.ini").write_text("[pytest]\n")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.count("GPU kernels, cuda: kept") == 1, result.stdout
    assert "2 passed, 2 skipped" in result.stdout


# --- when it is written ------------------------------------------------------------------------------------------


def row_of(name: str, **changes: int) -> dict:
    row = {"op": name, "kernel": "k", "arch": "80", "registers": 9, "stack": 0, "spill_stores": 0}
    return {**row, "spill_loads": 0, **changes}


@pytest.mark.parametrize("spilled", [0, 8])
def test_the_file_is_written_only_where_all_checks_pass(copy, monkeypatch, capsys, spilled):
    """Of what changed alone; the other parts stay as they were."""
    changed = "attention/forward_bfloat16"
    with cuda_resources.SOURCES[changed].open("a") as text:
        text.write("\n")
    before = gpu_resources.FILE.read_text()
    rows = [row_of(changed, spill_stores=spilled)]
    monkeypatch.setattr(
        cuda_resources, "compile_all", lambda nvcc, names: rows if names == [changed] else None
    )
    monkeypatch.setattr(cuda_launches, "launches", list)
    monkeypatch.setattr(sys, "argv", ["gpu_resources"])
    if spilled:
        with pytest.raises(SystemExit, match=r"spills: .*\n.* is left as it was: 1 checks failed"):
            gpu_resources.main()
        assert gpu_resources.FILE.read_text() == before
        return
    gpu_resources.main()
    old, new = json.loads(before), json.loads(gpu_resources.FILE.read_text())
    assert new["cuda"]["parts"][changed]["rows"] == {f"{changed} 80 k": [9, 0]}
    assert gpu_resources.changed("cuda") == []
    del old["cuda"]["parts"][changed], new["cuda"]["parts"][changed]
    assert new == old


# --- what is checked of Triton's kernels -------------------------------------------------------------------------


def sound() -> list[dict]:
    """Rows of all ops, with which nothing is wrong."""
    kernels = {op: set(names) for op, names in compile_facts.PRODUCTS.items()}
    kernels["spae_attention"] = {*compile_facts.ATTENTION_PRODUCTS, *compile_facts.BARRIERS}
    rows = []
    for op in triton_aot.CASES:
        for arch, dtypes in triton_aot.TARGETS.items():
            for dtype in (str(dtype).removeprefix("torch.") for dtype in dtypes):
                matrix = None if dtype == "float32" else triton_aot.MATRIX[arch]
                row = {"op": op, "arch": arch, "dtype": dtype, "case": "c", "constants": {"BLOCK_D": 64}}
                row |= {"num_warps": 4, "num_stages": 2, "registers": 9, "stack": 0, "shared": 1024}
                row |= {"occupancy": None if arch.startswith("gfx") else 0.5, "matrix": matrix, "barriers": 6}
                rows += [{**row, "kernel": kernel} for kernel in sorted(kernels.get(op, {"k"}))]
    return rows


def test_sound_kernels_have_no_problem_also_without_some_ops():
    assert compile_facts.triton_problems(sound()) == []
    for op in triton_aot.CASES:
        assert compile_facts.triton_problems([row for row in sound() if row["op"] == op]) == []


@pytest.mark.parametrize(
    ("fact", "kernel", "changes"),
    [
        (compile_facts.nothing_is_spilled, "forward_kernel", {"stack": 8}),
        (compile_facts.shared_memory_fits, "forward_kernel", {"shared": 228 << 10}),
        (compile_facts.the_table_is_complete, "k", {"occupancy": 0}),
        (compile_facts.the_table_is_complete, "k", {"dtype": "float64"}),
        (compile_facts.products_use_the_matrix_instruction, "grad_table_kernel", {"matrix": "other"}),
        (compile_facts.products_use_the_matrix_instruction, "queries_kernel", {"matrix": "other"}),
        (compile_facts.products_use_the_matrix_instruction, "item_codes_kernel", {"kernel": "another"}),
        (compile_facts.barriers_are_compiled, "relative_kernel", {"barriers": 5}),
        (compile_facts.barriers_are_compiled, "absolute_kernel", {"kernel": "another"}),
    ],
)
def test_what_is_wrong_is_found(fact, kernel, changes):
    rows = [{**row, **changes} if row["kernel"] == kernel and row["arch"] == "90" else row for row in sound()]
    if "kernel" in changes:  # it is nowhere
        rows = [{**row, **changes} if row["kernel"] == kernel else row for row in rows]
    assert fact(rows)
    assert [other for other in compile_facts.TRITON_FACTS if other(rows)] == [fact]
