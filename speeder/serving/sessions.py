"""Returning users: keys and values of their histories are kept, and only new events run through the backbone."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from speeder.data.item_indices import is_single
from speeder.model.choice import Choice, Where
from speeder.model.content import for_later, reading_once
from speeder.model.kv_cache import (
    KeyValuePool,
    PackedCache,
    as_tokens,
    common_length,
    continued_states,
    positions_move,
    prefix_tokens,
    session_content,
)
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.queries import Queries
from speeder.model.recommend import Recommendation, check_left


@dataclass
class KeptState:
    """A sequence's prefix whose keys and values are in the pool.

    Attributes:
        tokens: `(2, n)` ids and ranks.
        slots: `(n,)` the tokens' slots in the pool.
        shared: how many of the slots belong to the instruction that all sequences begin with.
        last: `(H,)` the last token's final state, if the sequence ends with it; else None.
    """

    tokens: np.ndarray
    slots: np.ndarray
    shared: int = 0
    last: torch.Tensor | None = None


@dataclass(frozen=True)
class SessionMemory:
    """The memory of a [`UserSessions`].

    Attributes:
        histories: users with known events.
        users: users with kept keys and values.
        tokens: tokens with kept keys and values, the shared instruction's counted once.
        max_tokens: the limit.
        bytes: bytes reserved for `max_tokens`, from the first pass on.
    """

    histories: int
    users: int
    tokens: int
    max_tokens: int
    bytes: int


class UserSessions:
    """Recommendations for returning users, computed from their new events only.

    The keys and values of a user's tokens are kept. The next visit runs only the new events' tokens and the prompt's
    suffix through the backbone. Scores equal those of `model.score` over the whole history, but for rounding. The
    longest common prefix of the old and the new sequence is reused. So a history longer than `config.max_history` runs
    again at each visit: its window slides, and every rank changes.

    When the room is used up, the states of the least recently used users are dropped. Their events, as indices of the
    catalogue, stay until `forget` (8 bytes each), and their next visit runs the whole history. So does every user's
    after a change of the model: its weights, adapters, catalogue, prompt or autocast's dtype. To notice any change,
    each call reads all weights once. Of a model with hooks, or one that is partly in training mode, nothing is kept.
    Known events follow their ids into another catalogue; those of items that it lacks are forgotten. Not safe for
    several threads at once.

    Args:
        max_tokens: tokens whose keys and values are kept at most, with those of the running batch and the instruction.
            A token takes `2 * layers * key/value heads * head size` numbers, with the history look-up `H + 1` more.
        batch_size: most users per batch.

    Raises:
        ValueError: an argument is not positive, `max_tokens` cannot hold one longest history, or the backbone's keys
            cannot be kept.
    """

    def __init__(self, model: SpeederForCausalLM, max_tokens: int, batch_size: int = 64):
        for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        if positions_move(model.config.text_config):
            raise ValueError(
                "model: expected a backbone whose keys can be kept, got rotary embeddings of the type 'dynamic' or "
                "'longrope', which turn all keys anew as a history grows; use model.recommend"
            )
        self.model, self.batch_size = model, batch_size
        self._pool = KeyValuePool(max_tokens)
        self._check_length(len(model.sequence([0] * model.config.max_history).ids))
        self._histories: dict[Hashable, array] = {}
        self._catalogue = model.catalogue  # whose indices the histories hold
        self._states: OrderedDict[Hashable, KeptState] = OrderedDict()  # the least recently used comes first
        self._root = self._content = self._table = None
        self._all_words = False  # whether kept states are of text beyond the instruction

    def __getstate__(self) -> dict:
        """A copy has the events, and computes its states anew."""
        return vars(self) | {
            "_pool": KeyValuePool(self._pool.capacity),
            "_histories": {user: array("q", items) for user, items in self._histories.items()},
            "_states": OrderedDict(),
            "_root": None,
            "_content": None,
        }

    @torch.no_grad()
    @reading_once(lambda self: self.model)
    def recommend(
        self,
        events: Mapping[Hashable, Sequence[int | str]],
        k: int = 10,
        exclude_seen: bool = True,
        *,
        allow: Sequence[int | str] | None = None,
        deny: Sequence[int | str] = (),
        where: Where | None = None,
        unknown: str = "error",
    ) -> dict[Hashable, list[Recommendation]]:
        """Add users' new events and return the `k` best next items of each, best first.

        Args:
            events: user -> item indices or ids since the last call, oldest first; of a new user the whole history.
            k: number of items, at most the catalogue's size (minus the seen ones).
            exclude_seen: leave out every item of the whole history, also those too old to be read.
            allow, deny, where, unknown: as `SpeederForCausalLM.recommend` takes them.

        Raises:
            ValueError: no user, a user without any event, an index out of range, or `k` out of range. KeyError: an
                unknown id. TypeError: an item is neither an integer nor a string. Then no event is added.
        """
        choice = Choice.of(self.model.catalogue, allow, deny, where, unknown)
        histories = self._extended(events, unknown)
        hidden = [choice.hidden(history if exclude_seen else ()) for history in histories.values()]
        check_left(choice, hidden, len(self.model.catalogue), k)
        queries = self._queries(histories)
        found = self.model.best_items(queries, self.model.scoring_table(), k, hidden, choice.allowed)
        self._take_in(histories)
        return dict(zip(histories, found, strict=True))

    @torch.no_grad()
    @reading_once(lambda self: self.model)
    def score(self, events: Mapping[Hashable, Sequence[int | str]]) -> torch.Tensor:
        """Add users' new events and score the whole catalogue as each one's next item.

        Returns:
            `(n, I)` float32 logits on the CPU, in the order of `events`.

        Raises:
            ValueError, KeyError: as `recommend`.
        """
        histories = self._extended(events)
        with self.model.evaluating():
            scores = self.model.item_logits(self._queries(histories), self.model.item_table()).cpu()
        self._take_in(histories)
        return scores

    @torch.no_grad()
    @reading_once(lambda self: self.model)
    def extend(self, events: Mapping[Hashable, Sequence[int | str]]) -> None:
        """Add users' new events and run them, so that the next `recommend` has less to compute.

        Raises:
            ValueError, KeyError: as `recommend`.
        """
        histories = self._extended(events)
        self._run(histories, answer=False)
        self._take_in(histories)

    def history(self, user: Hashable) -> list[int]:
        """The item indices of a user's events, oldest first; empty for an unknown user."""
        self._follow_catalogue()
        return list(self._histories.get(user, ()))

    def forget(self, user: Hashable) -> None:
        """Drop a user's events and state, if there are any."""
        self._histories.pop(user, None)
        self._drop(user)

    def clear(self) -> None:
        """Drop all states and free their memory; events stay."""
        self._states.clear()
        self._pool = KeyValuePool(self._pool.capacity)
        self._root = self._content = None

    def memory(self) -> SessionMemory:
        """How much is kept."""
        pool = self._pool
        used = pool.capacity - pool.free
        return SessionMemory(len(self._histories), len(self._states), used, pool.capacity, pool.nbytes)

    # ---- events -------------------------------------------------------------------------------------------

    def _extended(
        self, events: Mapping[Hashable, Sequence[int | str]], unknown: str = "error"
    ) -> dict[Hashable, list[int]]:
        """Each user's whole history with the new events, which are not added yet."""
        if not isinstance(events, Mapping):
            raise ValueError(f"events: expected a mapping from users to items, got {type(events).__name__}")
        for user, items in events.items():
            if is_single(items):
                raise ValueError(f"events: expected a list of items for {user!r}, got {items!r}")
        if unknown == "skip":
            events = {user: self.model.catalogue.known(items) for user, items in events.items()}
        histories = {
            user: self.history(user) + list(self.model.catalogue.indices_of(items))
            for user, items in events.items()
        }
        self.model._check_histories(list(histories.values()))
        return histories

    def _follow_catalogue(self) -> None:
        old, new = self._catalogue, self.model.catalogue
        if new is old:
            return
        self._catalogue = new
        if new.ids[: len(old)] != old.ids:  # more than new items at the end
            place = {external: row for row, external in enumerate(new.ids)}
            rows = [place.get(external) for external in old.ids]
            for user, items in self._histories.items():
                self._histories[user] = array("q", [rows[i] for i in items if rows[i] is not None])

    def _take_in(self, histories: dict[Hashable, list[int]]) -> None:
        for user, history in histories.items():
            known = self._histories.setdefault(user, array("q"))
            known.extend(history[len(known) :])

    # ---- states -------------------------------------------------------------------------------------------

    def _queries(self, histories: dict[Hashable, list[int]]) -> Queries:
        """Run the new tokens and return the queries."""
        states = self._run(histories, answer=True)
        with self.model.evaluating():
            return Queries(self.model.item_queries(states), self.model.pair_scores(list(histories.values())))

    def _run(self, histories: dict[Hashable, list[int]], answer: bool) -> torch.Tensor | None:
        """Update users' states; with `answer`, return the `(n, H)` final states that items are scored from."""
        with self.model.evaluating():
            suffix = len(self.model.config.prompt_suffix)
            prefix, sequences = prefix_tokens(self.model), {}
            for user, history in histories.items():
                tokens = as_tokens(self.model.sequence(history))
                self._check_length(tokens.shape[1])
                kept = tokens[:, : tokens.shape[1] - suffix]
                own_ids = kept[0, common_length(prefix, kept) :]
                self._all_words |= bool((own_ids < self.model.config.text_vocab_size).any())
                sequences[user] = tokens if answer else kept
            content = session_content(self.model, self._all_words)
            if content is None or content != self._content:
                self.clear()
                self._content = content
            self._table = self.model.item_table()
            if self._root is None:
                self._root = self._computed_root()
            try:
                states = [self._run_batch(batch, suffix, answer) for batch in self._batches(sequences)]
            finally:
                self._table = None
        return torch.cat(states) if answer else None

    def _check_length(self, tokens: int) -> None:
        if tokens > self._pool.capacity:
            raise ValueError(
                f"max_tokens: expected at least {tokens}, the tokens of one history, got {self._pool.capacity}"
            )

    def _computed_root(self) -> KeptState:
        """The state without any event: the instruction that every sequence begins with."""
        self._pool = KeyValuePool(self._pool.capacity)
        tokens = prefix_tokens(self.model)
        root = KeptState(tokens[:, :0], np.arange(0))
        if tokens.shape[1]:
            root.last = self._continue([root], [tokens])[0].clone()
        root.shared = tokens.shape[1]
        return root

    def _batches(self, sequences: dict[Hashable, np.ndarray]) -> Iterator[dict[Hashable, np.ndarray]]:
        """Batches of up to `batch_size` users, and of no more tokens than the pool holds."""
        batch, used = {}, self._root.shared
        for user, tokens in sequences.items():
            own = tokens.shape[1] - common_length(tokens, self._root.tokens)
            if len(batch) == self.batch_size or (batch and used + own > self._pool.capacity):
                yield batch
                batch, used = {}, self._root.shared
            batch[user], used = tokens, used + own
        yield batch

    def _run_batch(self, batch: dict[Hashable, np.ndarray], suffix: int, answer: bool) -> torch.Tensor | None:
        """Run the tokens of sequences that are not kept yet. With `answer` they end with the suffix, and their last
        states are returned. The suffix is not kept."""
        root = self._root
        for user, tokens in batch.items():
            state = self._states.pop(user, None) or KeptState(root.tokens, root.slots, root.shared, root.last)
            self._states[user] = state  # now the newest
            common = common_length(state.tokens, tokens)
            if answer and common == tokens.shape[1] and (common < len(state.slots) or state.last is None):
                # the requested state was not kept: its token runs again, an item's with all of the item
                is_item = tokens[0, -1] >= self.model.config.text_vocab_size
                common -= self.model.config.tokens_per_item if is_item else 1
            self._crop(state, common)
        states = [self._states[user] for user in batch]
        runs = [(s, t) for s, t in zip(states, batch.values(), strict=True) if len(s.slots) < t.shape[1]]
        try:
            needed = sum(tokens.shape[1] - len(state.slots) for state, tokens in runs)
            while self._pool.free < needed:
                self._drop(next(iter(self._states)))  # never one of the batch, which fits on its own
            if runs:
                hidden = self._continue(*zip(*runs, strict=True))
                for (state, _), last in zip(runs, hidden, strict=True):
                    state.last = last.clone()
        except BaseException:
            for user in batch:
                self._drop(user)
            raise
        if not answer:
            return None
        answers = torch.stack([state.last for state in states])
        for state in states:
            self._crop(state, len(state.slots) - suffix)
        return answers

    def _continue(self, states: Sequence[KeptState], sequences: Sequence[np.ndarray]) -> torch.Tensor:
        """Run sequences from where their states end; the states then cover them. Returns `(B, H)` final states."""
        kept = [len(state.slots) for state in states]
        new = self._pool.take(sum(tokens.shape[1] for tokens in sequences) - sum(kept))
        borders = np.cumsum([0, *(t.shape[1] - k for t, k in zip(sequences, kept, strict=True))])
        for state, tokens, (start, end) in zip(states, sequences, pairwise(borders), strict=True):
            state.tokens, state.slots = tokens, np.concatenate([state.slots, new[start:end]])
        device = self.model.device
        write = partial(self._pool.write, torch.as_tensor(new, device=device))
        order = torch.as_tensor(np.concatenate([state.slots for state in states]), device=device)
        with for_later(self.model.device.type):
            return continued_states(self.model, self._table, sequences, kept, PackedCache(write, order))

    def _crop(self, state: KeptState, length: int) -> None:
        """Keep a state's first tokens and free the others' slots."""
        if length < len(state.slots):
            self._pool.give_back(state.slots[max(length, state.shared) :])
            state.tokens, state.slots = state.tokens[:, :length], state.slots[:length]
            state.shared, state.last = min(state.shared, length), None

    def _drop(self, user: Hashable) -> None:
        state = self._states.pop(user, None)
        if state is not None:
            self._pool.give_back(state.slots[state.shared :])
