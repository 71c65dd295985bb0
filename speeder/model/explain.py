"""Why an item is recommended: what its token is made of, and which items of the history its score rests on.

Both are exact, and neither is an approximation of the model by another one: the gate's weights are those that mixed
the item's token, and what a history item matters is how far the score falls when the model reads the history
without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from speeder.model.modeling import SpeederForCausalLM


@dataclass(frozen=True)
class HistoryEffect:
    """What one entry of the history does to an item's score.

    Attributes:
        item, id, title: the entry's.
        change: the score with the whole history less the score without this entry; above 0 it speaks for the item.
            None where nothing would be left to read without it.
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
        history: one effect an entry of the history that is read (the newest `config.max_history`), oldest first.
    """

    item: int
    id: str
    title: str
    score: float
    gates: dict[str, float]
    history: list[HistoryEffect]


@torch.no_grad()
def leave_one_out(
    model: SpeederForCausalLM,
    history: Sequence[int | str],
    items: Sequence[int | str],
    batch_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How items' scores change when one entry of a history is left out.

    The model reads the history once whole and once without each entry, `n + 1` sequences. Entries after the one left
    out move up by a rank, as if it had never been; one that occurs twice is left out once at a time; and no older entry
    takes its place where the history is longer than the model reads.

    Args:
        history: item indices or ids, oldest first; the newest `config.max_history` are read.
        items: the `m` item indices or ids whose scores are asked for.
        batch_size: sequences that run at once.

    Returns:
        scores `(m,)` after the whole history, and changes `(n, m)`: that score less the one without entry `j`; both
        float32 on the CPU, in the logits' unit. NaN where nothing would be left to read.

    Raises:
        ValueError: the history or `items` is empty, an index is out of range, or a score is no finite number.
        KeyError: no such id.
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
    states = torch.cat(list(model.user_states(histories if readable else histories[:1], batch_size)))
    vectors = model._vectors()[asked.to(states.device)]
    scores = (states @ vectors.float().T).cpu()
    if not scores.isfinite().all():  # in an explanation NaN would read as "nothing left to read"
        raise ValueError("the model gave a score that is no finite number")
    if not readable:
        return scores[0], torch.full((1, len(asked)), torch.nan)
    return scores[0], scores[0] - scores[1:]


@torch.no_grad()
def explain(
    model: SpeederForCausalLM,
    history: Sequence[int | str],
    items: Sequence[int | str],
    batch_size: int = 64,
) -> list[Explanation]:
    """Why each of some items gets its score after a history; see `leave_one_out` for what is computed.

    Args:
        history, items, batch_size: as `leave_one_out` takes them.

    Returns:
        one explanation an item, in the order of `items`.

    Raises:
        ValueError, KeyError: as `leave_one_out`.
    """
    scores, changes = leave_one_out(model, history, items, batch_size)
    catalogue = model.catalogue
    read = catalogue.indices_of(history)[-model.config.max_history :]
    asked = catalogue.indices_of(items)
    with model.evaluating():
        gates = model.item_tokens()[1][torch.tensor(asked, device=model.device)].tolist()
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
