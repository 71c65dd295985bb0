"""Negatives: the items that a target is compared with in training, if the catalogue is too large to score whole.

`full` is the softmax over all items. `sampled` draws items from one distribution for a whole batch; `in-batch` takes
the targets of the batch. Both estimate the sum over the catalogue in the softmax's denominator: each drawn item is
weighted by 1 / q, the log-Q correction (Bengio and Senécal 2003; Yi et al. 2019). The denominator's estimate is
unbiased (Horvitz and Thompson 1952), so loss and gradient approach those of the full softmax as more items are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from speeder.model.config import SpeederConfig
from speeder.model.content import Kept
from speeder_kernels import item_cross_entropy
from speeder_kernels.derivatives import is_batched

_BELOW = 30.0  # how far below the least possible logit one is that counts nothing
_LEAST = 1e-12  # of a loss whose logarithm is taken
_CLOSE = 0.05  # a loss with a rounding of 1e-6 tells the others' sum to 2e-5 from here on
_ROUNDING = 1e-5  # of a loss, by the size of its logits
_MOST = 1e6  # a logit up to which losses are exact
_LOGITS = 1 << 22  # numbers of a matrix of rows by candidates that is formed at once
_LEFT_OUT = -1e30  # a logit that counts nothing, and has a gradient of 0 also where no other is left


@dataclass(frozen=True)
class Candidates:
    """The negatives of a batch's targets.

    Attributes:
        items: `(C,)` int64 item indices, ascending, each once.
        log_q: `(C,)` float32, the log of the probability that the item is among them.
    """

    items: torch.Tensor
    log_q: torch.Tensor


class NegativeSampler(nn.Module):
    """Draws a batch's candidates; it has no weights.

    Draws depend only on the seed, the step and the number of the draw within the step. So a resumed run and every
    process of a distributed one draw the same. `in-batch` takes the targets of all processes. A loss is therefore that
    of one process with the same global batch, whatever the number of processes.

    Args:
        config: uses `negatives`, `num_negatives`, `negatives_exponent`, `negatives_seed` and `num_items`.
    """

    def __init__(self, config: SpeederConfig):
        super().__init__()
        self.config = config
        self.step = self.draw = 0
        self._counts: np.ndarray | None = None  # (I,) float64, at least 1
        self._cumulative: Kept[np.ndarray] = Kept()  # (I,) float64, of how often a draw takes each item

    def seek(self, step: int) -> None:
        """Set the optimizer step; training passes count the draws within it."""
        self.step, self.draw = step, 0

    def set_counts(self, counts: np.ndarray | torch.Tensor) -> None:
        """Set how often each item is a target in training: `(I,)`, at least 0. A count of 0 is raised to 1.

        Raises:
            ValueError: another shape, or a count below 0.
        """
        counts = np.asarray(counts, dtype=np.float64)
        if counts.ndim != 1 or not len(counts) or not counts.min() >= 0:
            raise ValueError(f"counts: expected (I,) numbers of at least 0, got shape {counts.shape}")
        self._counts = np.maximum(counts, 1.0)
        self._cumulative.clear()

    def candidates(self, targets: torch.Tensor) -> Candidates:
        """The candidates for the targets of this pass. With `in-batch`, all processes must call it.

        Args:
            targets: `(n,)` int64 item indices of this process; may be empty.

        Raises:
            ValueError: counts are needed and were not set, or have another length.
        """
        if self.config.negatives == "in-batch":
            everyone = gather_ids(targets)
            items = torch.unique(everyone)
            draws = max(len(everyone) - 1, 1)  # a row's own target is always among the candidates
        else:
            draws = self.config.num_negatives
            items = torch.from_numpy(np.unique(self._drawn(draws))).to(targets.device)
        self.draw += 1
        inclusion = -torch.expm1(draws * torch.log1p(-self._probability(items)))  # 1 - (1 - p)^draws
        return Candidates(items, inclusion.log().float())

    def _drawn(self, draws: int) -> np.ndarray:
        random = np.random.default_rng([self.config.negatives_seed, self.step, self.draw])
        if self._is_uniform():
            return random.integers(self.config.num_items, size=draws)
        cumulative = self._known()
        points = random.random(draws) * cumulative[-1]
        return np.searchsorted(cumulative, points, side="right").clip(max=len(cumulative) - 1)

    def _probability(self, items: torch.Tensor) -> torch.Tensor:
        """The probability that one draw takes each of the items: float64, below 1."""
        if self._is_uniform():
            share = torch.full(items.shape, 1.0 / self.config.num_items, dtype=torch.float64)
        else:
            # not in NumPy, which cannot read what torch.func's transforms wrap
            cumulative, rows = torch.from_numpy(self._known()), items.cpu()
            before = torch.where(rows > 0, cumulative[rows - 1], 0.0)
            share = (cumulative[rows] - before) / cumulative[-1]
        return share.clamp(max=1.0 - 1e-9).to(items.device)

    def _is_uniform(self) -> bool:
        return self.config.negatives == "sampled" and self.config.negatives_exponent == 0.0

    def _known(self) -> np.ndarray:
        known = 0 if self._counts is None else len(self._counts)
        if known != self.config.num_items:
            raise ValueError(
                f"negatives: {self.config.negatives!r} needs target counts of {self.config.num_items} items, got "
                f"{known}: call model.negatives.set_counts"
            )
        exponent = 1.0 if self.config.negatives == "in-batch" else self.config.negatives_exponent
        return self._cumulative.get((exponent,), lambda: np.cumsum(self._counts**exponent))


def candidate_cross_entropy(
    queries: torch.Tensor,
    vectors: torch.Tensor,
    targets: torch.Tensor,
    places: torch.Tensor,
    log_q: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of each row's target against the candidates, each weighted by `1 / q`.

        loss[n] = log(e^s(n, target) + sum over candidates c other than the target of e^s(n, c) / q[c]) - s(n, target)

    The target has weight 1, since it is always there; if it is among the candidates ("accidental hit"), it is not
    counted again. No `(N, C)` matrix is held.

    Losses are as exact as float32 is beside the largest possible score of the batch (the product of the longest query's
    and the longest candidate's length).

    Args:
        queries: `(N, H)`, whose dot products with `vectors` are the scores s.
        vectors: `(U, H)` of all items that are needed, in the dtype of `queries`.
        targets: `(N,)` int64 rows of `vectors`.
        places: `(C,)` int64 rows of `vectors`: the candidates, rising.
        log_q: `(C,)` float32, the logs of q.

    Returns:
        `(N,)` float32.
    """
    negatives = vectors[places]
    column = torch.searchsorted(places, targets).clamp(max=len(places) - 1)
    hit = places[column] == targets
    # in float32, so that the gradients of one item are summed in it
    positives = F.embedding(targets, vectors.float())
    positive = (queries.float() * positives).sum(dim=-1)
    # The op needs a target among the candidates. Where a row's own is none, a vector of zeros stands in, whose weight
    # is too small to count and whose logit is known: the loss then tells the candidates' sum.
    bound = queries.detach().float().norm(dim=1).max() * negatives.detach().float().norm(dim=1).max()
    # a state that is not finite gives its own row's loss, not this constant
    low = bound.nan_to_num(nan=0.0, posinf=_MOST).clamp(max=_MOST) + _BELOW
    zeros = negatives.new_zeros(1, negatives.shape[1])
    column = torch.where(hit, column, len(places))
    loss = item_cross_entropy(
        queries,
        torch.cat([negatives, zeros]),
        column,
        scale=1.0,
        log_q=torch.cat([log_q, low[None].to(log_q.dtype)]),
    )
    others = loss.clamp(min=_LEAST)
    others = others + torch.log(-torch.expm1(-others))  # log(e^loss - 1): the sum without the target
    own = log_q[column.clamp(max=len(places) - 1)]
    losses = F.softplus(torch.where(hit, others - own, loss - low - positive))
    # A target that is most of that sum, where its weight is 1 / q, leaves too little of the others beside it.
    close = hit & (loss < _CLOSE + _ROUNDING * low)
    column = column.clamp(max=len(places) - 1)
    # vmap takes no number of rows that depends on values, and nothing that is formed again once it has ended
    if is_batched(close):
        return torch.where(close, _row_losses(queries, positives, column, negatives, log_q), losses)
    rows = close.nonzero().flatten()
    if not len(rows):
        return losses
    size = max(1, _LOGITS // len(places))
    exact = [
        checkpoint(  # which forms the logits again for the gradient
            _row_losses,
            queries[part],
            positives[part],
            column[part],
            negatives,
            log_q,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for part in rows.split(size)
    ]
    return losses.masked_fill(close, 0.0).index_add(0, rows, torch.cat(exact))


def _row_losses(
    queries: torch.Tensor,
    positives: torch.Tensor,
    column: torch.Tensor,
    negatives: torch.Tensor,
    log_q: torch.Tensor,
) -> torch.Tensor:
    """The losses of some rows whose target is the candidate of a column, `(n,)`; it is left out of their sum before
    that is formed."""
    with torch.autocast(queries.device.type, enabled=False):
        queries = queries.float()
        positive = (queries * positives).sum(dim=-1)
        logits = queries @ negatives.float().T - log_q
        own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, column[:, None], True)
        others = logits.masked_fill(own, _LEFT_OUT).logsumexp(dim=-1)
        return F.softplus(others - positive)


def gather_ids(ids: torch.Tensor) -> torch.Tensor:
    """The ids of all processes, in the order of processes: `(n,)` to `(N,)` int64. All processes must call it.

    Without a process group there is one process.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return ids
    counts = [ids.new_empty(1) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, ids.new_tensor([len(ids)]))
    lengths = [int(count) for count in counts]
    mine = ids.new_zeros(max(*lengths, 1))  # collectives take tensors of one length
    mine[: len(ids)] = ids
    everyone = [torch.empty_like(mine) for _ in lengths]
    distributed.all_gather(everyone, mine)
    return torch.cat([part[:length] for part, length in zip(everyone, lengths, strict=True)])
