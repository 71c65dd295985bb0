"""Compiles every Triton kernel as it can be launched, with no GPU, and lists what the machine code takes.

    python tests/kernels/triton_aot.py --out table.json [--only pack_tokens topk_items] [--arch 90] [--jobs 2]
    python tests/kernels/triton_aot.py --dry

It calls the launchers themselves, on meta tensors, as if each architecture's GPU were there: Triton specialises
and compiles as it would there, and what would be launched is recorded. So a configuration cannot be forgotten
here that a launcher knows; what must be listed (`CASES`) is which calls there are. A kernel that no case
launches, or a row of the table of tiles that none uses, is an error; `--dry` compiles nothing and looks only for these.

Run it as a process of its own, without TRITON_INTERPRET. What it compiles has no line numbers: they take a sixth to a
quarter of the time, and no register. The table is a JSON list of rows:
    op, kernel, arch, case, dtype; constants, num_warps, num_stages; registers (a thread), stack (bytes a thread:
    spilled registers, for these kernels have nothing else to put there), shared (bytes a block), occupancy
    (share of the processor's warps that can be resident; null for AMD), matrix (the instruction that multiplies
    matrices, of those in `MATRIX`, or null: float32 is multiplied without one), barriers (those between a program's
    threads that stand in Triton's own code: what the kernel asks for).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

Case = tuple[str, Callable[[], object]]  # what it is called, and the call
F32, BF16, F16, I64 = torch.float32, torch.bfloat16, torch.float16, torch.int64
# What is compiled. float16 has bfloat16's tiles and the same instructions in another variant, so that one
# architecture says enough; and one dtype does for an AMD GPU.
TARGETS: dict[str, tuple[torch.dtype, ...]] = {
    "80": (F32, BF16),
    "90": (F32, BF16, F16),
    "100": (F32, BF16),
    "gfx942": (BF16,),
}
# Compiled, so that they stay possible, but with another GPU's tiles: they may spill.
UNTUNED = {("spae_attention", "gfx942")}
UNTUNED_CASES = ("D64", "D128")  # these say enough there
# Bytes a block. An A100 has 163 KiB, but its rows serve smaller GPUs of its generation and after it, too.
SHARED_LIMIT = {"80": 99 << 10, "90": 227 << 10, "100": 227 << 10, "gfx942": 64 << 10}
# The instruction that multiplies matrices: an older one would leave most of a GPU's rate unused.
MATRIX = {"80": "mma.sync", "90": "wgmma", "100": "tcgen05.mma", "gfx942": "v_mfma"}
PROCESSORS = {"80": 108, "90": 132, "100": 148, "gfx942": 304}


def meta(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# --- what is called: for each op, the calls whose kernels differ -------------------------------------------

# Rows that start at multiples of 16 bytes, rows that do not, and the number that Triton makes a constant.
WIDTHS = (576, 577, 1)
ODD = "-odd"  # ends the names of cases that are compiled for ODD_ARCH only: they cost much and add little elsewhere
ODD_ARCH = "90"
# Ends the name of a case whose batch has other lengths than the case before: it must compile no kernel of its own.
LENGTHS = "-lengths"


def width(hidden: int) -> str:
    return f"H{hidden}" + (ODD if hidden % 16 else "")


def pack_tokens(dtype: torch.dtype) -> Iterator[Case]:
    from speeder_kernels.triton.items.pack_tokens import pack_tokens, sum_rows

    for hidden in WIDTHS:
        text, items, prompts = (meta(n, hidden, dtype=dtype) for n in (49152, 600, 50))
        ids = meta(8192, dtype=I64)
        yield width(hidden), functools.partial(pack_tokens, ids, text, items, ids, ids, prompts)
        grad, starts = meta(8192, hidden, dtype=dtype), meta(601, dtype=I64)
        yield width(hidden), functools.partial(sum_rows, grad, ids, starts)


def compress_items(dtype: torch.dtype) -> Iterator[Case]:
    """All gradients at once: where fewer are wanted, parts of the same kernel are left out."""
    from speeder_kernels.triton.items.compress_items import compress_items, compress_items_backward

    for hidden in (*WIDTHS, 8192):
        modalities = 1 if hidden == 1 else 3
        experts, weight = meta(5000, modalities, hidden, dtype=dtype), meta(hidden)
        logits, present = meta(5000, modalities), meta(5000, modalities, dtype=torch.bool)
        args = (experts, logits, present, weight, 1e-6)
        yield width(hidden), functools.partial(compress_items, *args)
        grad = meta(5000, hidden, dtype=dtype)
        yield width(hidden), functools.partial(compress_items_backward, grad, logits, *args, 7)


def item_cross_entropy(dtype: torch.dtype) -> Iterator[Case]:
    """One width: all are padded to a multiple of 16."""
    from speeder_kernels.triton.items.item_cross_entropy import (
        item_cross_entropy,
        item_cross_entropy_backward,
    )

    h, table = meta(8192, 576, dtype=dtype), meta(12101, 576, dtype=dtype)
    targets, rows = meta(8192, dtype=I64), meta(8192)
    for name, log_q in (("H576", None), ("H576-log_q", meta(12101))):
        yield name, functools.partial(item_cross_entropy, h, table, targets, 0.05, log_q)
        args = (rows, h, table, targets, rows, 0.05, log_q, 3)
        yield name, functools.partial(item_cross_entropy_backward, *args)


def topk_items(dtype: torch.dtype) -> Iterator[Case]:
    """One width: all are padded to a multiple of 16."""
    from speeder_kernels.triton.items.topk_items import topk_items

    h, table = meta(1024, 576, dtype=dtype), meta(12101, 576, dtype=dtype)
    excluded = (meta(1025, dtype=I64), meta(50000, dtype=I64))
    for name, lists in (("H576", (None, None)), ("H576-excluded", excluded)):
        yield name, functools.partial(topk_items, h, table, 20, *lists)


def spae_attention(dtype: torch.dtype) -> Iterator[Case]:
    """A head size for each padded one; at one of them float16, which compiles like bfloat16, and variants: no bias,
    frozen tables, no mask, other lengths."""
    from speeder_kernels.triton.attention.ops import spae_attention, spae_attention_backward

    def calls(
        tokens_q, tokens_k, heads, key_heads, size, sequences, buckets, positions, causal=True, needs=31
    ):
        q, k = meta(tokens_q, heads, size, dtype=dtype), meta(tokens_k, key_heads, size, dtype=dtype)
        cu, rank_q, rank_k = (meta(n, dtype=torch.int32) for n in (sequences + 1, tokens_q, tokens_k))
        tables = [meta(heads, columns) if columns else None for columns in (buckets, positions)]
        arguments = (cu, cu, rank_q, rank_k, *tables)
        yield functools.partial(spae_attention, q, k, k, *arguments, 512, 512, 0.1, causal)
        yield functools.partial(spae_attention, q, k, k, *arguments, 1, 64, 0.1, causal)
        one = (cu[:2], cu[:2], rank_q[:1], rank_k, *tables)
        yield functools.partial(spae_attention, q[:1], k, k, *one, 1, 8192, 0.1, causal)
        backward = (q, q, k, k, q, meta(tokens_q, heads), *arguments, 512, 512, 0.1, causal, needs)
        yield functools.partial(spae_attention_backward, *backward)

    batch = (8192, 8192, 32, 8)
    sizes = (64,) if dtype == F16 else (16, 32, 64, 128, 256)
    cases = [(f"D{size}", calls(*batch, size, 64, 512, 512)) for size in sizes]
    if dtype == BF16:
        cases += [
            ("D64-no_bias", calls(*batch, 64, 64, 0, 0, needs=7)),
            ("D64-frozen", calls(*batch, 64, 64, 512, 512, needs=7)),
            ("D64-not_causal", calls(*batch, 64, 64, 512, 512, causal=False)),
            (f"D80{ODD}", calls(*batch, 80, 64, 512, 512)),
            # 1 and multiples of 16, which Triton would compile kernels of their own for.
            (f"D64{LENGTHS}", calls(1, 17, 3, 1, 64, 1, 1, 16)),
            (f"D64{LENGTHS}", calls(16, 1, 16, 16, 64, 16, 17, 1)),
        ]
    for name, each in cases:
        for call in each:
            yield name, call


CASES: dict[str, Callable[[torch.dtype], Iterator[Case]]] = {
    "pack_tokens": pack_tokens,
    "compress_items": compress_items,
    "item_cross_entropy": item_cross_entropy,
    "topk_items": topk_items,
    "spae_attention": spae_attention,
}


# --- how it is compiled -------------------------------------------------------------------------------------


class Driver:
    """Stands in for Triton's driver where there is no GPU: all that compiling asks of it."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.arch = arch
        is_amd = arch.startswith("gfx")
        self.target = GPUTarget("hip", arch, 64) if is_amd else GPUTarget("cuda", int(arch), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0


def calls_of(op: str, arch: str, dtype: torch.dtype) -> Iterator[Case]:
    """The cases of one op that are compiled for an architecture."""
    for name, call in CASES[op](dtype):
        if (name.endswith(ODD) and arch != ODD_ARCH) or ((op, arch) in UNTUNED and name not in UNTUNED_CASES):
            continue
        yield name, call


def compile_op(
    op: str, arch: str, dtype: torch.dtype, dry: bool = False
) -> tuple[list[dict], set[str], set[tuple]]:
    """Every launch of one op for one architecture and dtype, compiled: rows of the table, the kernels launched, and the
    keys of the table of tiles that were used. `dry`: nothing is compiled, and there are no rows.

    Raises:
        RuntimeError: a kernel was compiled for the lengths of a batch alone.
    """
    calls = (
        ({"op": op, "case": name, "dtype": str(dtype).removeprefix("torch.")}, call)
        for name, call in calls_of(op, arch, dtype)
    )
    rows, kernels, used = compile_calls(calls, arch, None if dry else measure)
    anew = sorted({row["kernel"] for row in rows if row["case"].endswith(LENGTHS)})
    if anew:
        raise RuntimeError(f"{op} {arch}: compiled anew for other lengths: {', '.join(anew)}")
    return rows, kernels, used


def compile_jobs(
    jobs: list[tuple[str, str, torch.dtype]], processes: int
) -> list[tuple[list[dict], set[str], set[tuple]]]:
    """`compile_op` of each job, in their order. The longest begin first, so that none is left for the end."""
    weight = [(op == "spae_attention", sum(1 for _ in calls_of(op, arch, dtype))) for op, arch, dtype in jobs]
    order = sorted(range(len(jobs)), key=weight.__getitem__, reverse=True)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        results = pool.starmap(compile_op, [jobs[n] for n in order], chunksize=1)
    return [results[order.index(n)] for n in range(len(jobs))]


def compile_calls(
    calls: Iterable[tuple[dict, Callable[[], object]]], arch: str, look: Callable[[Any, dict], dict] | None
) -> tuple[list[dict], set[str], set[tuple]]:
    """Every launch of `calls`, each with what its rows begin with; they end with `look(compiled kernel, options)` and
    the kernel's hash. Without `look` nothing is compiled."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from speeder_kernels.triton import tiles

    driver.set_active(Driver(arch))
    rows, seen, kernels, used = [], set(), set(), set()
    run = JITFunction.run

    class Table(dict):
        def __getitem__(self, key):
            used.add(key)
            return super().__getitem__(key)

    def record(kernel, *args, grid, warmup, **options):
        kernels.add(kernel.__name__)
        if look is None:
            return None
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            row = {"kernel": kernel.__name__, "arch": arch, **context, **look(compiled, options)}
            rows.append({**row, "hash": compiled.hash})
        return compiled

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(tiles, "architecture", lambda device: int(arch) if arch.isdigit() else 80),
        mock.patch.object(tiles, "limits_registers", arch.isdigit),
        mock.patch.object(tiles, "processors", lambda device: PROCESSORS[arch]),
        mock.patch.object(tiles, "TILES", Table(tiles.TILES)),
    ):
        for context, call in calls:  # noqa: B007 (`record` reads the context)
            call()
    return rows, kernels, used


def measure(compiled, options: dict) -> dict:
    """What a compiled kernel takes. Registers and stack stand in the machine code's own headers."""
    metadata = compiled.metadata
    constants = {name: value for name, value in options.items() if name.isupper() and name != "FAR_TILE"}
    if "TILE" in constants:  # attention's named tuple: its members stand for themselves
        constants |= {name: member.value for name, member in constants.pop("TILE")._asdict().items()}
    row = {"constants": constants, "num_warps": metadata.num_warps, "num_stages": metadata.num_stages}
    assembly = compiled.asm["amdgcn" if "amdgcn" in compiled.asm else "ptx"]
    row["barriers"] = len(re.findall(r"\b(?:ttg|gpu)\.barrier\b", compiled.asm["ttgir"]))
    row["matrix"] = next((name for name in reversed(MATRIX.values()) if name in assembly), None)
    if "amdgcn" in compiled.asm:
        found = {
            name: int(re.search(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"]).group(1))
            for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        }
        stack = found["private_segment_fixed_size"]
        return {
            **row,
            "registers": found["vgpr_count"],
            "stack": stack,
            "shared": metadata.shared,
            "occupancy": None,
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [cuobjdump(), "--dump-resource-usage", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text).group(1)) for name in ("REG", "STACK"))
    threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", compiled.asm["ptx"]).group(1))
    share = occupancy(registers, metadata.shared, threads // 32, metadata.target.arch)
    return {**row, "registers": registers, "stack": stack, "shared": metadata.shared, "occupancy": share}


def cuobjdump() -> str:
    """The one in Triton's own wheel."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def occupancy(registers: int, shared: int, warps: int, arch: int) -> float:
    """Resident warps of the 64 a processor has room for, by registers (65536, given out to a warp in units of 256),
    shared memory (1 KiB of each block's is the system's) and blocks (32)."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    by_shared = (164 if arch == 80 else 228) * 1024 // (shared + 1024)
    return min(32, 64 // warps, by_registers, by_shared) * warps / 64


def jit_kernels() -> set[str]:
    """Every kernel in speeder_kernels.triton, by name: the functions that are decorated and called *_kernel."""
    package = Path(__file__).resolve().parents[2] / "speeder_kernels" / "triton"
    names = set()
    for path in package.rglob("[!_]*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        module = importlib.import_module(".".join(("speeder_kernels", "triton", *parts)))
        names |= {name for name in vars(module) if name.endswith("_kernel")}
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="where the table goes, as JSON")
    parser.add_argument("--dry", action="store_true", help="compile nothing")
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES), help="some ops")
    parser.add_argument("--arch", choices=TARGETS, help="one architecture")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("TRITON_INTERPRET is set: interpreted kernels are not compiled")
    from speeder_kernels.triton import tiles

    if args.dry == bool(args.out):
        parser.error("expected --out, or --dry")
    targets = [(arch, dtype) for arch in ([args.arch] if args.arch else TARGETS) for dtype in TARGETS[arch]]
    jobs = [(op, *target) for op, target in itertools.product(args.only, targets)]
    if args.dry:
        results = [compile_op(*job, dry=True) for job in jobs]
    else:
        os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # of the processes that compile
        results = compile_jobs(jobs, args.jobs)
        table, seen = [], set()
        for row in itertools.chain(*(rows for rows, _, _ in results)):
            kernel = row.pop("hash")
            if kernel not in seen:  # one that serves several dtypes has one row
                seen.add(kernel)
                table.append(row)
        Path(args.out).write_text(json.dumps(table, indent=0))
        print(f"{len(table)} configurations compiled")
    if set(args.only) == set(CASES) and not args.arch:
        unlaunched = jit_kernels().difference(*(kernels for _, kernels, _ in results))
        unused = set(tiles.TILES).difference(*(used for _, _, used in results))
        if unlaunched or unused:
            raise SystemExit(
                f"no case launches {sorted(unlaunched)}, none uses the rows {sorted(unused, key=str)}"
            )


if __name__ == "__main__":
    main()
