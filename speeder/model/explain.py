"""Why an item is recommended: the modality weights of its token, and the effect of each history item on its score.

Both are exact, not approximations by another model. The gate's weights are those of the item's token. The effect of a
history item is how far the score falls when the model reads the history without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from speeder.model.content import reading_once
from speeder.model.item_store import vectors_of
from speeder.model.queries import Queries

if TYPE_CHECKING:
    from speeder.model.modeling import SpeederForCausalLM


@dataclass(frozen=True)
class HistoryEffect:
    """The effect of one entry of the history on an item's score.

    Attributes:
        item, id, title: the entry's.
        change: the score with the whole history minus the score without this entry; above 0 if the entry raises the
            score. None for the only entry.
    """

    item: int
    id: str
    title: str
    change: float | None


@dataclass(frozen=True)
class Explanation:
    """Why a model gives one item its score after a history.

    Attributes:
        item, id, title: the scored item's.
        score: its logit after the whole history.
        gates: modality -> its share of the item's token, from 0 to 1; they sum to 1, and are 0 where absent.
        history: the effect of each entry that is read (the newest `config.max_history`), oldest first.
    """

    item: int
    id: str
    title: str
    score: float
    gates: dict[str, float]
    history: list[HistoryEffect]


@torch.no_grad()
@reading_once(lambda model: model)
def leave_one_out(
    model: SpeederForCausalLM,
    history: Sequence[int | str],
    items: Sequence[int | str],
    batch_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How items' scores change when one entry of a history is left out.

    The model reads the history once whole and once without each entry: `n + 1` sequences. Entries after the one left
    out move up by a rank. An item that occurs twice is left out once at a time. If the history is longer than the
    model reads, no older entry takes the place. What the item pairs add is looked up in the same sequences.

    Args:
        history: item indices or ids, oldest first; the newest `config.max_history` are read.
        items: the `m` item indices or ids to explain.
        batch_size: sequences per batch.

    Returns:
        scores `(m,)` after the whole history, and changes `(n, m)`: that score minus the one without entry `j`; both
        float32 on the CPU, in the unit of logits. NaN for the only entry of a history.

    Raises:
        ValueError: the history or `items` is empty, an index is out of range, or a score is not finite.
        KeyError: an unknown id.
    """
    if isinstance(history, str) or isinstance(items, str):
        raise ValueError("history, items: expected lists of item indices or ids, got one string")
    if len(items) == 0:
        raise ValueError("items: expected at least one item to explain, got none")
    read = model.catalogue.indices_of(history)[-model.config.max_history :]
    asked = torch.tensor(model.catalogue.indices_of(items))
    if not read:
        raise ValueError("history: expected at least one item, got none")
    histories = [read] + [read[:j] + read[j + 1 :] for j in range(len(read))]
    readable = len(read) > 1 or bool(model.config.prompt_prefix or model.config.prompt_suffix)
    queries = Queries.cat(model.user_states(histories if readable else histories[:1], batch_size))
    asked = asked.to(queries.dense.device)
    scores = queries.scores(vectors_of(model.scoring_table(), asked), asked).cpu()
    if not scores.isfinite().all():  # in an explanation NaN means the only entry
        raise ValueError("the model gave a score that is not finite")
    if not readable:
        return scores[0], torch.full((1, len(asked)), torch.nan)
    return scores[0], scores[0] - scores[1:]


@torch.no_grad()
@reading_once(lambda model: model)
def explain(
    model: SpeederForCausalLM,
    history: Sequence[int | str],
    items: Sequence[int | str],
    batch_size: int = 64,
) -> list[Explanation]:
    """Explain the scores of items after a history; see `leave_one_out`.

    Args:
        history, items, batch_size: as in `leave_one_out`.

    Returns:
        one explanation per item, in the order of `items`.

    Raises:
        ValueError, KeyError: as `leave_one_out`.
    """
    scores, changes = leave_one_out(model, history, items, batch_size)
    catalogue = model.catalogue
    read = catalogue.indices_of(history)[-model.config.max_history :]
    asked = catalogue.indices_of(items)
    with model.evaluating():
        gates = model.mrc(torch.tensor(asked, device=model.device))[1].tolist()
    names = model.config.gate_names
    explanations = []
    for column, (item, score, weights) in enumerate(zip(asked, scores.tolist(), gates, strict=True)):
        effects = [
            HistoryEffect(
                row, catalogue.ids[row], catalogue.titles[row], None if change != change else change
            )
            for row, change in zip(read, changes[:, column].tolist(), strict=True)
        ]
        shares = dict(zip(names, weights, strict=True))
        explanations.append(
            Explanation(item, catalogue.ids[item], catalogue.titles[item], score, shares, effects)
        )
    return explanations
