"""Serving: `python -m benchmarks.sessions` times returning users and a long instruction, with and without what is kept.

The backbone has SmolLM2-135M's shape, cut to some layers, and random weights, which cost the same. All users of a
batch come back with one new event and get their 10 best items; one side reads the whole histories (`recommend`), the
other continues from kept states (`UserSessions`). Sides run in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from speeder.data.catalogue import ItemCatalogue
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.sequences import pack_batch
from speeder.serving.sessions import UserSessions

ITEMS = 1682  # as many as MovieLens-100K has
HISTORIES = (10, 50, 100, 200)
PREFIX, PREFIX_HISTORY = 100, 20  # tokens of a long instruction, and items of the histories after it


def build(layers: int, dtype: torch.dtype, **config) -> SpeederForCausalLM:
    """A recommender with random weights over random items."""
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    )
    ids = [str(i) for i in range(ITEMS)]
    catalogue = ItemCatalogue(
        ids, ids, features={"text": torch.randn(ITEMS, 384)}, present={"text": torch.ones(ITEMS).bool()}
    )
    return SpeederForCausalLM.from_backbone(backbone, catalogue, **config).eval().to(dtype)


def in_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each side; the first round is not measured."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def returning_users(model: SpeederForCausalLM, users: int, rounds: int) -> None:
    """One new event of each user, at several lengths of history."""
    print("\n| history | whole | kept | ratio | kept memory a user |\n|---:|---:|---:|---:|---:|")
    for length in HISTORIES:
        histories = {user: torch.randint(ITEMS, (length,)).tolist() for user in range(users)}
        sessions = UserSessions(model, max(users * (length + rounds + 2), model.config.max_history))
        sessions.extend(histories)

        def kept(histories=histories, sessions=sessions) -> None:
            new = {user: torch.randint(ITEMS, (1,)).tolist() for user in histories}
            for user, items in new.items():
                histories[user] += items
            sessions.recommend(new)

        def whole(histories=histories) -> None:
            model.recommend(list(histories.values()))

        times = in_turns({"kept": kept, "whole": whole}, rounds)
        memory = sessions.memory()
        share = memory.bytes / memory.max_tokens * memory.tokens / users / 2**20
        print(
            f"| {length} | {times['whole']:.1f} ms | {times['kept']:.1f} ms | "
            f"{times['whole'] / times['kept']:.1f} | {share:.2f} MiB |",
            flush=True,
        )


@torch.no_grad()
def long_prefix(model: SpeederForCausalLM, users: int, rounds: int) -> None:
    """New users after a long instruction, which one side computes for each of them again."""
    histories = [torch.randint(ITEMS, (PREFIX_HISTORY,)).tolist() for _ in range(users)]

    def again() -> None:
        model.item_queries(model.last_states(**pack_batch([model.sequence(h) for h in histories])))

    def once() -> None:
        list(model.user_states(histories, batch_size=users))

    times = in_turns({"once": once, "again": again}, rounds)
    print(
        f"\nInstruction of {PREFIX} tokens, {PREFIX_HISTORY} items: for each user {times['again']:.1f} ms, "
        f"once {times['once']:.1f} ms, ratio {times['again'] / times['once']:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="of SmolLM2-135M's 30")
    parser.add_argument("--users", type=int, default=32, help="in a batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    print(f"{arguments.users} users, {arguments.layers} layers, {dtype}, {torch.get_num_threads()} threads")
    most = max(HISTORIES) + arguments.rounds + 2
    returning_users(
        build(arguments.layers, dtype, max_history=most, max_rank=512), arguments.users, arguments.rounds
    )
    prefix = torch.randint(49152, (PREFIX,)).tolist()
    long_prefix(build(arguments.layers, dtype, prompt_prefix=prefix), arguments.users, arguments.rounds)


if __name__ == "__main__":
    main()
