"""Where a training step spends its time, by groups of operators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

PREPARATION = "data preparation"
# The first group that an operator's name fits; each word stands for any name that holds it.
_GROUPS = (
    ("attention", ("spae_attention", "scaled_dot_product", "flash_attention")),
    ("item cross-entropy", ("item_cross_entropy",)),
    ("item tokens", ("compress_items", "pack_tokens")),
    ("other Speeder operators", ("speeder::",)),
    ("optimizer and clipping", ("adam", "Optimizer", "_foreach", "clip_grad")),
    ("matrix products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn_linear", "onednn")),
    ("copies and casts", ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::cat", "aten::stack",
                          "aten::contiguous", "aten::fill_", "aten::zero_")),
    ("dropout", ("bernoulli", "dropout")),
    (PREPARATION, (PREPARATION,)),
)  # fmt: skip
NORMS = "norms and elementwise"
OVERHEAD = "autograd's bookkeeping"


def group_of(operator: str) -> str:
    """The group of an operator or of another event of the profiler, by its name."""
    for group, words in _GROUPS:
        if any(word in operator for word in words):
            return group
    return NORMS if operator.startswith("aten::") else OVERHEAD


def profile_step(step: Callable[[], object], rounds: int = 2) -> dict[str, float]:
    """Share of the profiler's self time by group, largest first."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(rounds):
            step()
    times: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        times[group_of(event.key)] += event.self_cpu_time_total
    total = sum(times.values())
    return {group: times[group] / total for group in sorted(times, key=times.get, reverse=True)}
