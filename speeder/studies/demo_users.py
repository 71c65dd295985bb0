"""Two users whom a demo shows after every stage: what they saw last, and what each model recommends to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from speeder.data.prepared import PreparedData
from speeder.evaluation.scorer import Scorer
from speeder.io.files import read_json, write_json
from speeder.studies.evaluate_run import item_title

# Their last films have much in common, science fiction and comedies, so that a reader can judge what fits them. They
# were chosen by what they saw, not by what any model recommends.
USERS = ("702", "684")
SHOWN = 5  # films of a list
_WIDTH = 38  # of a column; two stand side by side on a terminal of 80
_FILE = "examples.json"


class DemoUsers:
    """Shows recommendations side by side, and keeps them in the demo's folder, for when it goes on after a stop.

    Args:
        data: of the demo.
        out: the demo's folder; `examples.json` in it holds model -> a list of titles for each user.
        say: takes the lines.
    """

    def __init__(self, data: PreparedData, out: Path, say: Callable[[str], None]):
        self._data, self._path, self._say = data, out / _FILE, say
        self._kept: dict[str, list[list[str]]] = read_json(self._path) if self._path.exists() else {}
        every = [data.interactions.user_ids[user] for user in data.split.users("test")]
        spread = [every[len(every) // 3], every[2 * len(every) // 3]]  # where the data are others
        self.users = list(USERS) if set(USERS) <= set(every) else spread
        rows = [every.index(user) for user in self.users]
        self._histories = [data.split.histories("test")[row] for row in rows]
        self._targets = [int(data.split.targets("test")[row]) for row in rows]

    def __contains__(self, name: str) -> bool:
        """Whether a model's recommendations are kept."""
        return name in self._kept

    def show_histories(self) -> None:
        """What the users saw last, and the next film, which no model is told."""
        lengths = map(len, self._histories)
        heads = [
            f"User {user}, {length} films, the last:"
            for user, length in zip(self.users, lengths, strict=True)
        ]
        last = [[self._title(item) for item in history[-SHOWN:]] for history in self._histories]
        held_out = [["held out, to be predicted:", self._title(item)] for item in self._targets]
        self._show(heads, [seen + more for seen, more in zip(last, held_out, strict=True)])

    def show(self, name: str, model: Scorer) -> None:
        """What a model recommends of what a user has not seen; the held-out film is marked by a star."""
        found = []
        for history, target in zip(self._histories, self._targets, strict=True):
            scores = model.score([history])[0].clone()
            scores[torch.from_numpy(np.asarray(history))] = -torch.inf
            best = scores.topk(min(SHOWN, len(scores))).indices.tolist()
            found.append([("* " if item == target else "") + self._title(item) for item in best])
        self._kept[name] = found
        write_json(self._path, self._kept)
        self.show_kept(name)

    def show_kept(self, name: str) -> None:
        """What a model recommended when it was there."""
        self._show([f"For user {user}:" for user in self.users], self._kept[name])

    def _title(self, item: int) -> str:
        return item_title(self._data, item)

    def _show(self, heads: Sequence[str], columns: Sequence[Sequence[str]]) -> None:
        longest = max(map(len, columns))
        for line in range(-1, longest):
            texts = heads if line < 0 else [column[line] if line < len(column) else "" for column in columns]
            cells = [("" if line < 0 else "  ") + text for text in texts]
            self._say("  " + "  ".join(_cut(cell).ljust(_WIDTH) for cell in cells).rstrip())


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"
