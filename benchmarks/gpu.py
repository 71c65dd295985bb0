"""`python -m benchmarks.gpu`: our Triton and CUDA kernels beside what else a GPU user has, on this machine's GPU.

Prints a table and writes it to bench/gpu.md. All sides of a case are timed in turns in one run, by CUDA events.
Without a GPU it says so and exits with 1. Shape letters: B sequences, S tokens of each, Hq and Hkv heads, D head
size, R buckets, A positions, N positions, I items, H hidden size.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import compress_items, pack_tokens, topk_items
from benchmarks.case import FORWARD, TRAINING, Inputs, Results, Side, leaves, size_of, training
from benchmarks.gpu_shapes import ATTENTION, CROSS_ENTROPY, DECODING
from benchmarks.spae_attention import BUCKETS, POSITIONS, dense_bias, unbatched
from speeder_kernels import backends, item_cross_entropy, spae_attention

DTYPE = torch.bfloat16
WARM_UP, ROUNDS = 3, 30
AHEAD = 20_000_000  # cycles, about 10 ms: longer than the host needs to launch what is measured


@dataclass(frozen=True)
class Case:
    op: str
    what: str
    # From the device, our backends that have the op, and whether shapes are to be tiny.
    build: Callable[[torch.device, tuple[str, ...], bool], Inputs]


class Others:
    """Sides that are not ours: those that fail, for want of a package or memory, are kept with the reason."""

    def __init__(self) -> None:
        self.sides: dict[str, Side] = {}
        self.missing: dict[str, str] = {}

    def add(self, name: str, make: Callable[[], Side]) -> None:
        try:
            side = make()
            side.run()  # what is compiled is compiled now
            self.sides[name] = side
        except Exception as error:  # whatever stands in the way of a program that is not ours
            first = (str(error).splitlines() or [""])[0]
            self.missing[name] = f"{type(error).__name__}: {first}"


def _run(forward: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor | None) -> Callable[[], Results]:
    """Forward, and backward where there is a gradient."""
    if grad is None:
        return lambda: (forward(*(x.detach() for x in inputs)),)
    return training(forward, inputs, grad)


# --- spae_attention ------------------------------------------------------------------------------------------


def _flex(queries: int, S: int, compiled: bool, device: torch.device) -> Callable[..., Tensor]:
    """The last `queries` of S tokens."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    before = S - queries
    mask = create_block_mask(lambda b, h, i, j: i + before >= j, None, None, queries, S, device=device)
    attend = torch.compile(flex_attention) if compiled else flex_attention

    def forward(q: Tensor, k: Tensor, v: Tensor, relative_HR: Tensor, absolute_HA: Tensor) -> Tensor:
        def add_bias(score: Tensor, _b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            by_distance = relative_HR[h, (i + before - j).clamp(0, BUCKETS - 1)]
            return score + by_distance + absolute_HA[h, j.clamp(max=POSITIONS - 1)]

        return attend(q, k, v, score_mod=add_bias, block_mask=mask, enable_gqa=True)

    return forward


def _flash(alibi: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash-attn on (B, S, H, D); fewer queries than keys are the last ones."""
    from flash_attn import flash_attn_func

    slopes = None
    if alibi:
        slopes = 2.0 ** -torch.linspace(1, 8, q.shape[2], device=q.device)
    return flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)


def attention(
    shape: tuple[int, int, int, int, int],
    with_backward: bool,
    decoding: bool,
    device: torch.device,
    ours: tuple[str, ...],
    quick: bool,
) -> Inputs:
    """Causal attention where every token is an item. `shape`: B, S, Hq, Hkv, D. Decoding has the last query alone."""
    B, S, Hq, Hkv, D = (2, 96, 4, 2, 32) if quick else shape
    Q = 1 if decoding else S
    q = torch.randn(B, Q, Hq, D, device=device).to(DTYPE)
    k, v = torch.randn(2, B, S, Hkv, D, device=device).to(DTYPE)
    tables = [torch.randn(Hq, n, device=device) for n in (BUCKETS, POSITIONS)]
    grad = torch.randn_like(q) if with_backward else None

    cu_q, cu_k = (torch.arange(B + 1, dtype=torch.int32, device=device) * length for length in (Q, S))
    rank = torch.arange(S, dtype=torch.int32, device=device)
    layout = (cu_q, cu_k, Q, S, rank[S - Q :].repeat(B), rank.repeat(B))
    packed = leaves(*(x.flatten(0, 1) for x in (q, k, v)), *tables)
    packed_grad = None if grad is None else grad.flatten(0, 1)

    def attend(backend: str, q: Tensor, k: Tensor, v: Tensor, relative: Tensor, absolute: Tensor) -> Tensor:
        return spae_attention(q, k, v, *layout, relative, absolute, backend=backend)

    sides = {name: Side(_run(partial(attend, name), packed, packed_grad)) for name in ours}
    others = Others()
    by_token = leaves(q, k, v)
    for name, alibi in (("flash-attn, no bias", False), ("flash-attn, ALiBi", True)):
        others.add(name, lambda alibi=alibi: Side(_run(partial(_flash, alibi), by_token, grad), None))

    by_head = leaves(*(x.transpose(1, 2).contiguous() for x in (q, k, v)))
    head_grad = None if grad is None else grad.transpose(1, 2).contiguous()
    sdpa = partial(F.scaled_dot_product_attention, enable_gqa=True)
    learned = leaves(*tables)
    fixed = None if with_backward else dense_bias(*tables, Q, S).to(DTYPE)

    def dense(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=dense_bias(*tables, Q, S).to(DTYPE) if fixed is None else fixed)

    others.add("SDPA, no bias", lambda: Side(_run(partial(sdpa, is_causal=Q == S), by_head, head_grad), None))
    others.add("SDPA, dense bias", lambda: Side(_run(dense, by_head + learned, head_grad), unbatched))
    others.add(
        "FlexAttention, same bias",
        lambda: Side(_run(_flex(Q, S, not quick, device), by_head + learned, head_grad), unbatched),
    )
    pairs = B * Hq * Q * (S + S - Q + 1) / 2
    moved = size_of(*packed, q)
    return Inputs(
        {**sides, **others.sides}, 4 * D * pairs * (3.5 if with_backward else 1), moved, others.missing
    )


# --- item_cross_entropy -----------------------------------------------------------------------------------------


def _liger(hidden_NH: Tensor, table_IH: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Liger's fused loss takes no scale: the positions are multiplied by it."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(table_IH, hidden_NH * scale, targets)


def cross_entropy(
    shape: tuple[int, int, int], device: torch.device, ours: tuple[str, ...], quick: bool
) -> Inputs:
    """Mean loss over all items, with both gradients. `shape`: N, I, H."""
    N, I, H = (32, 1000, 64) if quick else shape  # noqa: E741
    inputs = leaves(torch.randn(N, H, device=device).to(DTYPE), torch.randn(I, H, device=device).to(DTYPE))
    targets, scale = torch.randint(I, (N,), device=device), H**-0.5

    def fused(backend: str, hidden_NH: Tensor, table_IH: Tensor) -> Tensor:
        return item_cross_entropy(hidden_NH, table_IH, targets, scale=scale, backend=backend).mean()

    def eager(hidden_NH: Tensor, table_IH: Tensor) -> Tensor:
        return F.cross_entropy(((hidden_NH * scale) @ table_IH.T).float(), targets)

    def liger(hidden_NH: Tensor, table_IH: Tensor) -> Tensor:
        return _liger(hidden_NH, table_IH, targets, scale)

    one = torch.ones((), device=device)
    sides = {name: Side(training(partial(fused, name), inputs, one)) for name in ours}
    others = Others()
    others.add("full logits + F.cross_entropy", lambda: Side(training(eager, inputs, one)))
    others.add("Liger", lambda: Side(training(liger, inputs, one)))
    moved = 3 * size_of(*inputs)
    return Inputs({**sides, **others.sides}, 8 * N * I * H, moved, others.missing)


# --- the other ops have the CPU benchmarks' shapes -----------------------------------------------------------------


def shared(build: Callable[..., Inputs], device: torch.device, ours: tuple[str, ...], quick: bool) -> Inputs:
    """A case of the CPU suite with its tensors on `device`, once for each backend with the same numbers."""
    built = {}
    for name in ours:
        torch.manual_seed(0)
        with device:
            built[name] = build(quick, name)
    first = built[ours[0]]
    sides = {name: inputs.sides["ours"] for name, inputs in built.items()}
    others = {name: side for name, side in first.sides.items() if name not in ("ours", "reference")}
    return Inputs({**sides, **others}, first.flops, first.bytes, first.missing)


CASES = [
    Case(
        "spae_attention",
        f"{B} x {S} tokens, {Hq}/{Hkv} heads of {D}, {TRAINING if with_backward else FORWARD}",
        partial(attention, (B, S, Hq, Hkv, D), with_backward, False),
    )
    for B, S, Hq, Hkv, D in ATTENTION
    for with_backward in (False, True)
]
CASES += [
    Case(
        "spae_attention",
        f"{B} new tokens, cache {S}, {Hq}/{Hkv} heads of {D}",
        partial(attention, (B, S, Hq, Hkv, D), False, True),
    )
    for B, S, Hq, Hkv, D in DECODING
]
CASES += [
    Case(
        "item_cross_entropy",
        f"{shape[0]} positions, {shape[1]:,} items, H {shape[2]}, {TRAINING}",
        partial(cross_entropy, shape),
    )
    for shape in CROSS_ENTROPY
]
CASES += [
    Case(case.op, case.what, partial(shared, case.build))
    for module in (pack_tokens, compress_items, topk_items)
    for case in module.benchmarks()
    if case.dtype == DTYPE
]


# --- timing ---------------------------------------------------------------------------------------------------


def by_events(run: Callable[[], Results]) -> float:
    """Milliseconds on the GPU from the first kernel's start to the last one's end.

    The GPU first waits, while the host launches: else small kernels would wait for it, and its time would be measured.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(AHEAD)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def medians(
    sides: dict[str, Side], clock: Callable[[Callable[[], Results]], float], rounds: int = ROUNDS
) -> dict[str, float]:
    """The median of each side's times, in turns; a round begins with another side each time."""
    names = list(sides)
    for name in names:
        for _ in range(WARM_UP):
            sides[name].run()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(clock(sides[name].run))
    return {name: statistics.median(values) for name, values in times.items()}


def rows(case: Case, inputs: Inputs, times: dict[str, float]) -> list[str]:
    """Markdown: a row a side, with the time of each of our backends as a share of the side's."""
    out = []
    for name, time in times.items():
        ratios = [
            f"{times[backend] / time:.2f}" if backend in times else "" for backend in ("triton", "cuda")
        ]
        cells = [case.op, case.what, name, f"{time:.3f}", *ratios]
        out.append(f"| {' | '.join(cells)} |")
    for name, reason in inputs.missing.items():
        out.append(f"| {case.op} | {case.what} | {name} | did not run: {reason} | | |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder to write to (default: bench)")
    parser.add_argument("--only", default="", help="ops whose name contains this")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: PyTorch finds no CUDA device, so there is nothing to measure")
    about = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, {DTYPE}"
    lines = [about, "", "| op | what | side | median, ms | triton / side | cuda / side |", "|" + "---|" * 6]
    for name, backend in backends().items():
        if name in ("triton", "cuda") and not backend.available:
            lines.insert(1, f"{name} is left out: {backend.reason}")
    for case in CASES:
        if args.only not in case.op:
            continue
        ours = tuple(
            name
            for name in ("triton", "cuda")
            if backends()[name].available and case.op in backends()[name].ops
        )
        if not ours:
            continue
        torch.manual_seed(0)
        inputs = case.build(torch.device("cuda"), ours, False)
        lines += rows(case, inputs, medians(inputs.sides, by_events))
        del inputs
        torch.cuda.empty_cache()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
