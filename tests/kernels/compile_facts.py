"""What must hold of every GPU kernel that was compiled: each function takes rows of a table and says what is wrong.

The tests ask them of what they have compiled, and `python -m tests.kernels.gpu_resources` before it writes
gpu_resources.json: so they hold of whatever that file has the hash of.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from speeder_kernels import dispatch
from tests.kernels import compilers, cuda_resources, triton_aot

Row = dict

# --- CUDA: rows of cuda_resources.py -------------------------------------------------------------------------


def cuda_spills(rows: Collection[Row]) -> list[str]:
    """ptxas reports no spill in any kernel, and no stack: what a thread indexes stays in registers.

    But for the small kernels where they are never launched: GPUs whose blocks have 99 KiB run sm_80's code
    (sm_86, sm_89), or compile the PTX (sm_120).
    """
    launched = [row for row in rows if row["arch"] == "80" or "::SpaeSmall" not in row["kernel"]]
    spilling = [row for row in launched if row["stack"] or row["spill_stores"] or row["spill_loads"]]
    return ["no kernel was compiled"] if not launched else [f"spills: {row}" for row in spilling]


# These move rows of 16 bytes at a time where they may, and the kernels of width 1 serve elsewhere.
COPYING = ("pack_tokens/pack_tokens", "compress_items/compress_items")


def narrow_accesses(nvcc: str, name: str) -> list[str]:
    """Kernels of a file of COPYING that read or write less than 16 bytes at once, although they may."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "out.ptx"
        source = cuda_resources.SOURCES[name].relative_to(cuda_resources.ROOT)
        command = [*compilers.nvcc(nvcc), "-O3", "-std=c++17", "-Icsrc", "-arch=sm_80", "-ptx", str(source)]
        subprocess.run([*command, "-o", str(ptx)], cwd=cuda_resources.ROOT, check=True)
        kernels = re.split(r"\.visible \.entry ", ptx.read_text())[1:]
    vectorized = [text for text in kernels if re.match(r"\w*Li[48]E", text)]
    problems = [] if len(vectorized) == 6 else [f"{name}: {len(vectorized)} kernels, not 3 dtypes x 2 passes"]
    for text in vectorized:
        accesses = set(re.findall(r"(?:ld|st)\.global\.(?:nc\.)?(?:v\d\.)?[bfus]\d+", text))
        narrow = sorted(access for access in accesses if access.endswith("16"))
        if narrow or not {"ld.global.nc.v4.u32", "st.global.v4.u32"} <= accesses:
            problems.append(f"{name}: {text.split('(')[0]}: {narrow or sorted(accesses)}")
    return problems


def cuda_problems(nvcc: str, rows: Collection[Row]) -> list[str]:
    """All of the above, of the files that `rows` are of."""
    names = {row["op"] for row in rows}
    narrow = [problem for name in COPYING if name in names for problem in narrow_accesses(nvcc, name)]
    return [*cuda_spills(rows), *narrow]


# --- Triton: rows of triton_aot.py, of some of the ops or of all ---------------------------------------------


def _tuned(rows: Collection[Row]) -> list[Row]:
    return [row for row in rows if (row["op"], row["arch"]) not in triton_aot.UNTUNED]


def nothing_is_spilled(rows: Collection[Row]) -> list[str]:
    return [f"spills: {row}" for row in _tuned(rows) if row["stack"]]


def shared_memory_fits(rows: Collection[Row]) -> list[str]:
    """Also of the rows that may spill, but for the heads that the op refuses on AMD's GPUs."""

    def refused(row: Row) -> bool:
        head = row["constants"].get("D", 0) if row["op"] == "spae_attention" else 0
        return row["arch"].startswith("gfx") and head > dispatch.LARGEST_AMD_HEAD

    kept = [row for row in rows if not refused(row)]
    return [
        f"too much shared memory: {row}"
        for row in kept
        if row["shared"] > triton_aot.SHARED_LIMIT[row["arch"]]
    ]


COLUMNS = {"op", "kernel", "arch", "case", "dtype", "constants", "num_warps", "num_stages", "registers"}
COLUMNS |= {"stack", "shared", "occupancy", "matrix", "barriers"}


def the_table_is_complete(rows: Collection[Row]) -> list[str]:
    """Every target and dtype of each op; the script itself refuses a kernel or a row of tiles that is left out."""
    problems = [f"columns: {sorted(row)}" for row in rows if set(row) != COLUMNS]
    expected = {
        (op, arch, str(dtype).removeprefix("torch."))
        for op in {row["op"] for row in rows}
        for arch, dtypes in triton_aot.TARGETS.items()
        for dtype in dtypes
    }
    missing = expected - {(row["op"], row["arch"], row["dtype"]) for row in rows}
    wrong = [row for row in rows if not row["arch"].startswith("gfx") and not 0 < row["occupancy"] <= 1]
    return [
        *problems,
        *(f"no row: {one}" for one in sorted(missing)),
        *(f"occupancy: {row}" for row in wrong),
    ]


# The kernels that are mostly products, by op.
PRODUCTS = {
    "item_cross_entropy": {
        "item_cross_entropy_kernel",
        "logit_gradient_kernel",
        "grad_hidden_kernel",
        "grad_table_kernel",
    },
    "topk_items": {"item_codes_kernel"},
}
# Of attention those in which most of its time goes, with the largest head of each: the forward pass, and the gradient
# of q. The others have tiles for which Triton picks an older instruction, for some products or for all.
ATTENTION_PRODUCTS = {"forward_kernel": 256, "queries_kernel": 128}


def _absent(op: str, kernels: Collection[str], rows: Collection[Row]) -> list[str]:
    """Kernels that must be among an op's rows, where it has any: else nothing would be asked of them."""
    found = {row["kernel"] for row in rows if row["op"] == op}
    return [f"{op}: no {name} was compiled" for name in sorted(set(kernels) - found) if found]


def products_use_the_matrix_instruction(rows: Collection[Row]) -> list[str]:
    """That of their architecture, and float32 is multiplied as such, not cut to 10 bits of mantissa (TF32)."""
    problems = [problem for op, names in PRODUCTS.items() for problem in _absent(op, names, rows)]
    problems += _absent("spae_attention", ATTENTION_PRODUCTS, rows)
    for row in rows:
        products = row["kernel"] in PRODUCTS.get(row["op"], ())
        if row["op"] == "spae_attention":
            products = row["constants"].get("BLOCK_D", 512) <= ATTENTION_PRODUCTS.get(row["kernel"], 0)
        wanted = None if row["dtype"] == "float32" else triton_aot.MATRIX[row["arch"]]
        if products and row["matrix"] != wanted:
            problems.append(f"matrix instruction {row['matrix']}, expected {wanted}: {row}")
    return problems


# Of the kernels that read what their other threads have stored, as many as stand in the source: which they must be is
# tested in the interpreter (`missing_barriers_fail`).
BARRIERS = {"absolute_kernel": 2, "relative_kernel": 6}


def barriers_are_compiled(rows: Collection[Row]) -> list[str]:
    problems = _absent("spae_attention", BARRIERS, rows)
    few = [row for row in rows if row["barriers"] < BARRIERS.get(row["kernel"], 0)]
    return [
        *problems,
        *(f"{row['barriers']} barriers, expected {BARRIERS[row['kernel']]}: {row}" for row in few),
    ]


TRITON_FACTS: tuple[Callable[[Collection[Row]], list[str]], ...] = (
    nothing_is_spilled,
    shared_memory_fits,
    the_table_is_complete,
    products_use_the_matrix_instruction,
    barriers_are_compiled,
)


def triton_problems(rows: Collection[Row]) -> list[str]:
    return [problem for fact in TRITON_FACTS for problem in fact(rows)]
