"""Writes docs/kernels-roofline.md: what an A100 and an H100 allow the GPU kernels at most. Computed; nothing is run.

    python -m benchmarks.gpu_roofline

Needs nvcc and Triton, but no GPU. Shape letters: B sequences, S tokens of each, Hq and Hkv heads, D head size,
N positions, I items, H hidden size, U items to compress of M modalities, T tokens.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import gpu_shapes
from benchmarks.gpu_loops import RATES, Loop, disassemble, main_loop
from benchmarks.spae_attention import BUCKETS, POSITIONS
from speeder_kernels import dispatch
from tests.kernels.triton_aot import compile_calls, meta

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "kernels-roofline.md"
DTYPE, BYTES = torch.bfloat16, 2


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str  # as Triton is told
    nvcc_arch: str
    flops: float  # a second, 16-bit products with float32 sums, no sparsity
    bandwidth: float  # bytes a second


GPUS = (
    Gpu("A100", "80", "80", 312e12, 2.039e12),
    Gpu("H100", "90", "90a", 989e12, 3.35e12),
)


@dataclass(frozen=True)
class Work:
    """What one kernel does for one shape: `kernel` is Triton's name or a part of the CUDA kernel's."""

    op: str
    kernel: str
    shape: str
    flops: float
    bytes: float
    triton: str = ""
    cuda: str = ""


@dataclass(frozen=True)
class Attention:
    B: int
    S: int
    Hq: int
    Hkv: int
    D: int

    @property
    def name(self) -> str:
        return f"{self.B} x {self.S} tokens, {self.Hq}/{self.Hkv} heads of {self.D}"

    def launches(self) -> Iterator[Callable[[], object]]:
        from speeder_kernels.triton.attention.ops import spae_attention, spae_attention_backward

        tokens = self.B * self.S
        q, lse = meta(tokens, self.Hq, self.D, dtype=DTYPE), meta(tokens, self.Hq)
        k = v = meta(tokens, self.Hkv, self.D, dtype=DTYPE)
        cu, rank = meta(self.B + 1, dtype=torch.int32), meta(tokens, dtype=torch.int32)
        layout = (cu, cu, rank, rank, meta(self.Hq, BUCKETS), meta(self.Hq, POSITIONS), self.S, self.S)
        yield functools.partial(spae_attention, q, k, v, *layout, 0.1, True)
        yield functools.partial(spae_attention_backward, q, q, k, v, q, lse, *layout, 0.1, True, 31)

    def works(self) -> Iterator[Work]:
        """A product of queries and keys is 2 D flops for each pair that the causal mask leaves."""
        product = 2 * self.D * self.Hq * self.B * self.S * (self.S + 1) / 2
        query = self.B * self.S * self.Hq * self.D * BYTES
        key = self.B * self.S * self.Hkv * self.D * BYTES
        row = self.B * self.S * self.Hq * 4  # a float32 for each query
        size = f"Li{self.D}E"
        moved_q = 3 * query + 2 * key + 2 * row
        for kernel, products, moved, triton, cuda in (
            ("forward", 2, 2 * query + 2 * key + row, "forward_kernel", f"SpaeForward.*{size}"),
            ("gradients of k and v", 4, 2 * query + 4 * key + 2 * row, "keys_kernel", f"SpaeGradKV.*{size}"),
            ("gradient of q", 3, moved_q, "queries_kernel", ""),
            # In half precision, where a table takes a gradient, CUDA first goes over the keys for delta.
            ("delta, then gradient of q", 5, moved_q, "", f"SpaeGradQ.*{size}"),
        ):
            yield Work("spae_attention", kernel, self.name, products * product, moved, triton, cuda)
        # Triton's kernel for the relative table, with two products for the pairs that are not in the last bucket; CUDA
        # sums it beside the gradient of q.
        near = self.B * self.Hq * sum(min(i + 1, BUCKETS - 1) for i in range(self.S))
        moved = 2 * query + 2 * key + 2 * row
        yield Work("spae_attention", "gradient of the relative table", self.name, 4 * self.D * near, moved)


@dataclass(frozen=True)
class CrossEntropy:
    N: int
    I: int  # noqa: E741
    H: int

    @property
    def name(self) -> str:
        return f"{self.N} positions, {self.I:,} items, H {self.H}"

    def launches(self) -> Iterator[Callable[[], object]]:
        from speeder_kernels.triton.items.item_cross_entropy import (
            item_cross_entropy,
            item_cross_entropy_backward,
        )

        h, table = meta(self.N, self.H, dtype=DTYPE), meta(self.I, self.H, dtype=DTYPE)
        targets, rows = meta(self.N, dtype=torch.int64), meta(self.N)
        yield functools.partial(item_cross_entropy, h, table, targets, 0.05, None)
        yield functools.partial(item_cross_entropy_backward, rows, h, table, targets, rows, 0.05, None, 3)

    def works(self) -> Iterator[Work]:
        hidden, table = self.N * self.H * BYTES, self.I * self.H * BYTES
        logits = self.N * self.I * BYTES
        for kernel, moved, triton in (
            ("forward", hidden + table, "item_cross_entropy_kernel"),
            ("gradient of the logits", hidden + table + logits, "logit_gradient_kernel"),
            ("gradient of the positions", logits + table + hidden, "grad_hidden_kernel"),
            ("gradient of the table", logits + hidden + table, "grad_table_kernel"),
        ):
            flops = 2 * self.N * self.I * self.H
            yield Work("item_cross_entropy", kernel, self.name, flops, moved, triton)


@dataclass(frozen=True)
class TopK:
    N: int
    I: int  # noqa: E741
    H: int
    k: int

    def launches(self) -> Iterator[Callable[[], object]]:
        from speeder_kernels.triton.items.topk_items import topk_items

        h, table = meta(self.N, self.H, dtype=DTYPE), meta(self.I, self.H, dtype=DTYPE)
        yield functools.partial(topk_items, h, table, self.k, None, None)

    def works(self) -> Iterator[Work]:
        shape = f"{self.k} of {self.I:,} items, {self.N} positions, H {self.H}"
        moved = (self.N + self.I) * self.H * BYTES
        flops = 2 * self.N * self.I * self.H
        yield Work("topk_items", "scores of groups", shape, flops, moved, "item_codes_kernel")


def bandwidth_bound() -> Iterator[Work]:
    """Kernels that memory bounds whatever their code: each tensor once. Half the tokens are items."""
    for B, S, Hq, Hkv, D in gpu_shapes.DECODING:
        keys, queries = B * S * Hkv * D * BYTES, B * Hq * D * BYTES
        shape = f"{B} new tokens, cache {S}, {Hq}/{Hkv} heads of {D}"
        flops = 4 * B * S * Hq * D
        yield Work("spae_attention", "decoding", shape, flops, 2 * keys + 2 * queries)
    for T, H in gpu_shapes.PACK_TOKENS:
        yield Work("pack_tokens", "forward", f"{T} tokens, H {H}", 0, 2 * T * H * BYTES + 3 * T * 8)
    for U, M, H in gpu_shapes.COMPRESS_ITEMS:
        shape, experts, tokens = f"{U} items of {M} modalities, H {H}", U * M * H * BYTES, U * H * BYTES
        yield Work("compress_items", "forward", shape, 0, experts + tokens)
        yield Work("compress_items", "backward", shape, 0, 2 * experts + tokens)


CASES = (
    *(Attention(*shape) for shape in gpu_shapes.ATTENTION),
    *(CrossEntropy(*shape) for shape in gpu_shapes.CROSS_ENTROPY),
    *(TopK(*shape) for shape in gpu_shapes.TOPK_ITEMS),
)


def triton_loops(case: Attention | CrossEntropy | TopK, gpu: Gpu) -> dict[str, Loop]:
    """The main loop of each Triton kernel that `case` launches."""
    calls = (({}, launch) for launch in case.launches())
    rows, _, _ = compile_calls(calls, gpu.arch, lambda compiled, options: {"cubin": compiled.asm["cubin"]})
    loops = {
        row["kernel"]: main_loop(next(iter(disassemble(row["cubin"]).values())), gpu.arch) for row in rows
    }
    return {name: loop for name, loop in loops.items() if loop}


def cuda_loops(gpu: Gpu) -> dict[str, Loop]:
    """The main loop of each of spae_attention's CUDA kernels in bfloat16, by its mangled name."""
    loops = {}
    for part in ("forward", "backward"):
        source = ROOT / "csrc" / "cuda" / "attention" / f"{part}_bfloat16.cu"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            command = [
                "nvcc",
                "-O3",
                "-std=c++17",
                f"-I{ROOT / 'csrc'}",
                "-cubin",
                f"-arch=sm_{gpu.nvcc_arch}",
            ]
            subprocess.run([*command, str(source), "-o", file.name], check=True)
            kernels = disassemble(Path(file.name).read_bytes())
        loops |= {name: loop for name, code in kernels.items() if (loop := main_loop(code, gpu.arch))}
    return loops


def _digits(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"


def bounds_table() -> list[str]:
    """Markdown: each kernel's work, and the least time by memory and by products."""
    head = [f"{gpu.name} {what}" for gpu in GPUS for what in ("memory, ms", "products, ms")]
    lines = [f"| op | kernel | shape | GFLOP | MB | {' | '.join(head)} |", "|" + "---|" * (5 + len(head))]
    for work in [work for case in CASES for work in case.works()] + list(bandwidth_bound()):
        cells = [work.op, work.kernel, work.shape, _digits(work.flops / 1e9), _digits(work.bytes / 1e6)]
        for gpu in GPUS:
            memory, products = work.bytes / gpu.bandwidth * 1e3, work.flops / gpu.flops * 1e3
            for bound, other in ((memory, products), (products, memory)):
                cells.append(f"**{_digits(bound)}**" if bound >= other else _digits(bound))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def loops_table() -> list[str]:
    """Markdown: what each main loop takes, the share of the peak that it allows, and the time that follows."""
    lines = [
        "| op | kernel | shape | GPU | backend | products | exp2 | issue slots | share of peak | bound, ms |",
        "|" + "---|" * 10,
    ]
    cuda = {gpu: cuda_loops(gpu) for gpu in GPUS}
    listed = set()
    for case in CASES:
        triton = {gpu: triton_loops(case, gpu) for gpu in GPUS}
        for work, gpu in itertools.product(case.works(), GPUS):
            found = [("triton", triton[gpu][work.triton])] if work.triton else []
            found += [
                ("cuda", loop) for name, loop in cuda[gpu].items() if work.cuda and re.search(work.cuda, name)
            ]
            for backend, loop in found:
                key = (work.op, work.kernel, gpu, backend, loop)
                if key not in listed:
                    lines.append(_loop_row(work, gpu, backend, loop))
                listed.add(key)
    return lines


def _loop_row(work: Work, gpu: Gpu, backend: str, loop: Loop) -> str:
    shares = [loop.share(slots) for slots in (loop.most, loop.fewest)]
    times = [max(work.flops / gpu.flops / share, work.bytes / gpu.bandwidth) * 1e3 for share in shares[::-1]]
    cells = [work.op, work.kernel, work.shape, gpu.name, backend, f"{loop.matrix:.0f} ({loop.instructions})"]
    cells += [str(loop.special), _range(str(loop.fewest), str(loop.most))]
    cells += [_range(*(f"{share:.0%}" for share in shares)), _range(*map(_digits, times))]
    return f"| {' | '.join(cells)} |"


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


TEXT = """# A roofline on paper for the GPU kernels

**Computed, not measured.** The kernels have not run on a GPU yet. What follows are least times: what the shapes, the
datasheets and the compiled code allow, not what the kernels reach. `python -m benchmarks.gpu_roofline` writes this file
(bfloat16; tables of {buckets} buckets and {positions} positions; every token an item).

## By memory and by products

Peaks, of NVIDIA's datasheets (SXM, 80 GB; 16-bit products without sparsity): {peaks}.
Flops count a product that is computed again each time; of causal attention, the pairs that the mask leaves. Bytes
count each tensor of a kernel once, and between the cross-entropy's kernels the logits' gradient in 16 bits. The larger
bound is bold.

{bounds}

## By instructions

The inner loop of the compiled kernel (of those with products, the one over whole tiles without a mask), counted in
its machine code. A processor has four parts; each issues one instruction a cycle. In the table, cycles of a part for
one turn of one warp: of the matrix unit, of the unit for special functions (16 results a cycle and processor, so 8
cycles for a warp's exp2), and issue slots. Where the loop has branches, two numbers: the ways with the fewest and
with the most instructions. Which is taken, the ranks of a tile decide: the fewest may leave out a tile's bias or the
loads of the next, the most is that of tiles whose ranks repeat or spread wide; loops inside without products count as
one turn. The share is what the products would take at the datasheet's rate / the largest of the three numbers: it
supposes that warps overlap perfectly. Kernels of Triton whose tiles have one stage (`num_stages=1` in `tiles.py`: the
gradients of k and v, that of q on an A100 and for heads of 128, that of the relative table) cannot load the next tile
while they multiply this one: only other warps cover the wait, of which few are resident. Not counted, so that the
true bound is higher: waiting, the rates of shared memory and of the float32 and integer units, tiles that the mask
cuts, the last wave of programs, and what stands around the inner loop (where that runs over parts of H: the softmax
of `item_cross_entropy`, the choice of `topk_items`). A kernel whose loop is the same for two shapes stands here once;
decoding and the gradient of the relative table, whose loops are mostly other work, are left out.

On an H100 only the instructions of a warp group (HGMMA) reach the peak. Those of one warp (HMMA) are counted at
{warp_rate:.1%} of it: an assumption, after published microbenchmarks (arXiv 2402.13499), not a figure of
NVIDIA's. The CUDA kernels are written with them, so that is the most they can reach there.

{loops}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT.relative_to(ROOT)}")
    args = parser.parse_args()
    if dispatch.interprets_triton():
        raise SystemExit("TRITON_INTERPRET is set: interpreted kernels are not compiled")
    peaks = "; ".join(
        f"{gpu.name} {gpu.flops / 1e12:.0f} TFLOP/s and {gpu.bandwidth / 1e9:,.0f} GB/s" for gpu in GPUS
    )
    text = TEXT.format(
        buckets=BUCKETS,
        positions=POSITIONS,
        peaks=peaks,
        warp_rate=RATES["90"]["HMMA"] / RATES["90"]["HGMMA"],
        bounds="\n".join(bounds_table()),
        loops="\n".join(loops_table()),
    )
    args.out.write_text(text)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
