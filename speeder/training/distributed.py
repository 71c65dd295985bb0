"""Training on several processes, started by `torchrun` or `accelerate launch`: how a batch is shared.

There is no launcher here. Accelerate gives each process its rank, and each stage's Hugging Face `Trainer` combines
gradients. A batch has the same examples whatever the number of processes; they share it by tokens, for balance.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.utils.data import Dataset, Sampler

from speeder.errors import SpeederError

WAIT = timedelta(minutes=30)  # for a process that evaluates or saves; after that the others count as dead

T = TypeVar("T")


def processes() -> PartialState:
    """This run's processes, joined by the first call; one without a launcher."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=WAIT)


def from_main(value: T) -> T:
    """The main process's value, on all processes; they wait for it."""
    return broadcast_object_list([value])[0] if processes().use_distributed else value


def check_shared(path: Path) -> None:
    """Wait for all processes, then check that this one sees the main one's file.

    Raises:
        SpeederError: it does not.
    """
    state = processes()
    state.wait_for_everyone()
    if not path.exists():
        raise SpeederError(
            f"{path}: process {state.process_index} of {state.num_processes} does not see what the main process"
            " wrote: the run folder must lie where all hosts share it"
        )


def share_batch(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Share the sequences of a batch among processes, with about the same number of tokens each.

    The longest first, each to the process with the fewest tokens so far. The busiest never gets more than 4/3 of the
    best plan's maximum (Graham 1969); with eight sequences each, it gets 1 % more than the mean.

    Args:
        lengths: tokens of each sequence, each at least 1.
        ranks: number of processes.

    Returns:
        for each process the positions of its sequences in `lengths`, in order; empty if there are too few sequences.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        load, rank = heapq.heappop(loads)
        shares[rank].append(place)
        heapq.heappush(loads, (load + lengths[place], rank))
    return [sorted(share) for share in shares]


class SharedBatches(Sampler[list[int]]):
    """One process's shares of an epoch's batches, as numbers of examples.

    The order depends only on seed and epoch, so that all processes, whatever their number, and a resumed run have the
    same batches.

    Args:
        examples: with `num_tokens(index)`, or sequences with `ids`.
        batch_size: examples per batch, of all processes together.
        rank, ranks: number of this process, and of all processes.
    """

    def __init__(self, examples: Dataset, batch_size: int, seed: int, rank: int = 0, ranks: int = 1):
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.rank, self.ranks, self.epoch = rank, ranks, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the pass over the data."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            if self.ranks > 1:
                shares = share_batch([self._num_tokens(index) for index in batch], self.ranks)
                batch = [batch[place] for place in shares[self.rank]]
            yield batch

    def _num_tokens(self, index: int) -> int:
        if hasattr(self.examples, "num_tokens"):
            return self.examples.num_tokens(index)
        return len(self.examples[index].ids)
