"""Where the time of a training step and of an inference batch goes: `python -m benchmarks.profile_model DATA`.

DATA is a prepared set (`speeder prepare`, or the `data` folder of a demo). The step is the last stage of a recipe: all
modalities open, everything trained, the recipe's own batch; the inference batch ranks the catalogue for 64 users.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from speeder.data.prepared import PreparedData
from speeder.loading import load_tokenizer
from speeder.model import SpeederForCausalLM
from speeder.mpo import select_parameters
from speeder.processor import template_ids
from speeder.prompts import pack_batch
from speeder.recipe import bundled_recipe, load_recipe
from speeder.training import TrainingSequences

USERS = 64  # of an inference batch


def build(folder: Path, recipe_path: Path) -> tuple[Callable[[], None], Callable[[], None], dict]:
    """A training step, an inference batch, and facts about them."""
    data = PreparedData.load(folder)
    recipe, _ = load_recipe(recipe_path).for_modalities(list(data.catalogue.modalities))
    stage = recipe.stages[-1]
    prefix, suffix = template_ids(load_tokenizer(recipe.backbone), recipe.template)
    torch.manual_seed(0)
    model = SpeederForCausalLM.from_backbone(
        recipe.backbone,
        data.catalogue,
        layers=recipe.layers,
        modalities=[name for name in data.catalogue.modalities if name in stage.open],
        **{"lora": recipe.lora, "prompt_prefix": prefix, "prompt_suffix": suffix} | recipe.model,
    )
    groups = select_parameters(model, stage, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    windows = TrainingSequences(data.split.training(), model.config, recipe.supervision)
    histories = [list(map(int, part)) for part in data.split.training()[:USERS]]
    bf16 = recipe.precision == "bf16"

    def step() -> None:
        model.train()
        batch = pack_batch([windows[n] for n in range(recipe.batch_users)], with_labels=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def infer() -> None:
        model.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            model.recommend(histories, 10)

    batch = pack_batch([windows[n] for n in range(recipe.batch_users)], with_labels=True)
    facts = {
        "layers": recipe.layers,
        "precision": recipe.precision,
        "windows": recipe.batch_users,
        "tokens": batch["input_ids"].numel(),
        "items": len(data.catalogue),
        "threads": torch.get_num_threads(),
    }
    return step, infer, facts


def measure(work: Callable[[], None], rounds: int) -> tuple[float, str]:
    """Median milliseconds, and the profiler's table of the operators that take the most time of their own."""
    for _ in range(2):
        work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(3):
            work()
    averages = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in averages)
    rows = sorted(averages, key=lambda event: -event.self_cpu_time_total)[:16]
    lines = ["| operator | share | calls |", "|---|---:|---:|"]
    lines += [f"| `{e.key}` | {e.self_cpu_time_total / total:.1%} | {e.count / 3:.0f} |" for e in rows]
    return 1000 * statistics.median(times), "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="a prepared set")
    parser.add_argument("--recipe", type=Path, default=bundled_recipe("ml-100k"))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    step, infer, facts = build(arguments.data, arguments.recipe)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for name, work in (("Training step", step), ("Inference batch", infer)):
        milliseconds, table = measure(work, arguments.rounds)
        print(f"\n{name}: {milliseconds:.0f} ms\n\n{table}")


if __name__ == "__main__":
    main()
