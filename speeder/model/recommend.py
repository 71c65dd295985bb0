"""A model as a recommender: score histories, recommend items, add new items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from speeder.data.catalogue import ItemCatalogue
from speeder.data.interactions import Split
from speeder.data.item_indices import check_ordered, is_single
from speeder.errors import SpeederError
from speeder.evaluation.evaluate import evaluate
from speeder.evaluation.metrics import metric_values
from speeder.io.progress import showing
from speeder.model.choice import FALLBACKS, Choice, Where, best_among, check_word
from speeder.model.content import read_once
from speeder.model.item_store import ItemStore, vectors_of
from speeder.model.kv_cache import SharedPrefix, positions_move, text_content
from speeder.model.offload import check_own_parts
from speeder.model.popularity import ItemCounts
from speeder.model.queries import Queries
from speeder.model.sequences import TokenSequence, build_sequence, pack_batch
from speeder_kernels import topk_items


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
        item: its index in the catalogue.
        id: its external id.
        title: its title, "" if it has none.
        score: its logit; comparable within one user.
    """

    item: int
    id: str
    title: str
    score: float


class RecommenderMixin:
    """`score`, `recommend`, `gates` and `add_items` of [`SpeederForCausalLM`]. All run without gradients."""

    item_counts: ItemCounts | None = None  # of training; for the fallback "popularity"

    @property
    def shared_prefix(self) -> list[int]:
        """The text ids that every sequence begins with."""
        return self.config.prompt_prefix

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode in this context; afterwards every module has its earlier mode again."""
        if not self.training:
            yield
            return
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            self.train()  # drops what was kept in evaluation mode
            for module, mode in modes:
                module.training = mode

    def sequence(
        self, history: Sequence[int], target: int | None = None, supervision: str = "all"
    ) -> TokenSequence:
        """A history of item indices, and in training its next item, as tokens; see `build_sequence`."""
        return build_sequence(history, self.config, target, supervision)

    def training_examples(self, supervision: str) -> dict:
        """Arguments of `TrainingSequences` for this model's examples; by default none."""
        return {}

    def validation_metrics(self, split: Split) -> dict[str, float]:
        """NDCG@10 and HR@10 of the validation items among all items, by which checkpoints are chosen."""
        if self.config.negatives != "full":  # the tokens of all items may be too many
            from speeder.model.streamed_ranking import streamed_ranks

            ranks = streamed_ranks(self, split.histories("validation"), split.targets("validation"))
            return {name: float(metric_values(ranks, name).mean()) for name in ("NDCG@10", "HR@10")}
        ranking = evaluate(self, split, "validation", resamples=1)
        return {name: ranking.mean(name) for name in ("NDCG@10", "HR@10")}

    @torch.no_grad()
    def user_states(
        self, histories: Sequence[Sequence[int | str]], batch_size: int = 64
    ) -> Iterator[Queries]:
        """Run histories through the backbone, packed, a batch at a time.

        The text before the history is computed once and kept as long as the model is the same.

        Yields:
            queries of up to `batch_size` users, which rank items by dot products with `item_vectors` and by what the
            item pairs add.
        """
        with self.evaluating():
            for start in range(0, len(histories), batch_size):
                chunk = [
                    self.catalogue.indices_of(history) for history in histories[start : start + batch_size]
                ]
                with read_once(self):
                    states = self._sequence_states([self.sequence(history) for history in chunk])
                yield Queries(self.item_queries(states), self.pair_scores(chunk))

    def _sequence_states(self, sequences: list[TokenSequence]) -> torch.Tensor:
        """The final states of sequences' last tokens: `(B, H)`."""
        if not self.shared_prefix or positions_move(self.config.text_config):
            batch = {name: tensor.to(self.device) for name, tensor in pack_batch(sequences).items()}
            return self.last_states(**batch)
        prefix = self._kept_prefix.get(text_content(self), lambda: SharedPrefix(self))
        return prefix.states(self, self.item_table(), sequences)

    @torch.no_grad()
    def score(self, histories: Sequence[Sequence[int | str]], batch_size: int = 64) -> torch.Tensor:
        """Score the whole catalogue as each history's next item.

        Args:
            histories: item indices or ids, oldest first.

        Returns:
            `(n, I)` float32 logits on the CPU.

        Raises:
            ValueError: no history, an empty one, or an index out of range. KeyError: an unknown id. TypeError: an item
                is neither an integer nor a string.
        """
        self._check_histories(histories)
        with self.evaluating(), read_once(self):
            queries = Queries.cat(self.user_states(histories, batch_size))
            return self.item_logits(queries, self.item_table()).cpu()

    @torch.no_grad()
    def recommend(
        self,
        histories: Sequence[Sequence[int | str]],
        k: int = 10,
        exclude_seen: bool = True,
        batch_size: int = 64,
        progress: bool = False,
        *,
        allow: Sequence[int | str] | None = None,
        deny: Sequence[int | str] = (),
        where: Where | None = None,
        unknown: str = "error",
        fallback: str | None = None,
    ) -> list[list[Recommendation]]:
        """The `k` best next items of each history, best first. One forward pass, no decoding, always valid items.

        Args:
            histories: item indices or ids, oldest first; the newest `config.max_history` are read.
            k: number of items, at most the catalogue's size (minus the seen ones).
            exclude_seen: leave out every item of the history, also those too old to be read.
            allow: recommend these items alone, indices or ids; None: all.
            deny: never recommend these.
            where: column of the catalogue -> the value, or one of the values, that an item must have in it.
            unknown: `"error"`, or `"skip"`: ids that the catalogue lacks are left out, of histories and of lists.
            fallback: what an empty history gets: `"popularity"`, the items most frequent in training, whose scores are
                their counts; None: an error. Counts are saved with a trained recommender; see `set_item_counts`.

        Raises:
            SpeederError: `fallback` is given and there are no counts. ValueError: no history, an empty one, an index
            out of range, a column that the catalogue lacks, or `k` out of range. KeyError: an unknown id.
            TypeError: an item is neither an integer nor a string.
        """
        choice = Choice.of(self.catalogue, allow, deny, where, unknown)
        if fallback is not None:
            self.check_fallback(fallback)
        self._check_histories(histories, may_be_empty=fallback is not None or unknown == "skip")
        if unknown == "skip":
            histories = [self.catalogue.known(history) for history in histories]
            self._check_histories(histories, may_be_empty=fallback is not None)
        rows = [self.catalogue.indices_of(history) for history in histories]
        hidden = [choice.hidden(row if exclude_seen else ()) for row in rows]
        check_left(choice, hidden, len(self.catalogue), k)
        read = [number for number, row in enumerate(rows) if row or fallback is None]
        results: list[list[Recommendation]] = [[] for _ in rows]
        for number in set(range(len(rows))).difference(read):
            results[number] = self.popular(k, hidden[number], choice)
        batches = [read[start : start + batch_size] for start in range(0, len(read), batch_size)]
        with (
            self.evaluating(),
            read_once(self),
            showing("recommending", len(batches), "batch", show=progress) as work,
        ):
            vectors = self.scoring_table() if read else None
            states = self.user_states([rows[number] for number in read], batch_size)
            for batch, state in zip(batches, states, strict=True):
                found = self.best_items(
                    state, vectors, k, [hidden[number] for number in batch], choice.allowed
                )
                for number, items in zip(batch, found, strict=True):
                    results[number] = items
                work.update()
        return results

    def set_item_counts(self, sequences: Sequence[Sequence[int]]) -> None:
        """Count the items of users' sequences, such as `data.split.training()`, for the fallback `"popularity"`.

        `train` does it. The counts are saved with the model.

        Raises:
            IndexError: an item outside the catalogue. TypeError: an item is not an integer.
        """
        self.item_counts = ItemCounts.of_sequences(sequences, self.catalogue)

    def check_fallback(self, fallback: str) -> None:
        """Raise `ValueError` for an unknown fallback, `SpeederError` without the counts that it needs."""
        check_word("fallback", fallback, FALLBACKS)
        if self.item_counts is None:
            raise SpeederError(
                "fallback: expected a recommender with training counts, found none; give them by "
                "model.set_item_counts(data.split.training()), or train again"
            )

    def popular(self, k: int, hidden: Sequence[int], choice: Choice) -> list[Recommendation]:
        """The `k` items most frequent in training, without hidden ones, of those that may be chosen."""
        order, counts = self.item_counts.ordered(self.catalogue)
        free = ~np.isin(order, np.asarray(hidden, dtype=np.int64))
        if choice.allowed is not None:
            free &= np.isin(order, choice.allowed)
        places = np.flatnonzero(free)[:k]
        return [
            self._recommendation(int(item), float(count))
            for item, count in zip(order[places], counts[places], strict=True)
        ]

    @torch.no_grad()
    def gates(self, sample: int | None = None) -> dict[str, torch.Tensor]:
        """The gate's weights: modality -> `(I,)` float32 on the CPU; they sum to 1 over the modalities.

        Args:
            sample: only this many items, evenly spaced over the catalogue.
        """
        with self.evaluating():
            if sample is not None and sample < self.config.num_items:
                rows = torch.arange(sample, device=self.device) * self.config.num_items // sample
                weights = self.mrc(rows)[1].cpu()
            elif self.config.negatives == "full":
                weights = self.item_tokens()[1].cpu()
            else:  # without ever holding all tokens
                weights = torch.cat([gates.cpu() for _, gates in self.mrc.pieces()])
        return {  # copies, as the kept ones are not to be written into
            name: column.clone()
            for name, column in zip(self.config.gate_names, weights.unbind(dim=1), strict=True)
        }

    def add_items(self, new_items: ItemCatalogue) -> range:
        """Append items to the catalogue without training; they can be read and recommended at once.

        Args:
            new_items: ids that the catalogue does not have, with features of at least one modality each.

        Returns:
            the new items' indices.

        Raises:
            ValueError: an id exists already, or features have another width. SpeederError: an item has no modality.
        """
        before = len(self.catalogue)
        self.set_catalogue(self.catalogue.concat(new_items))
        return range(before, len(self.catalogue))

    def scoring_table(self) -> torch.Tensor | ItemStore:
        """The scoring vectors, or the store, that `best_items` searches."""
        with self.evaluating():
            table = self.item_table()
        return self.item_vectors(table) if isinstance(table, torch.Tensor) else table

    def best_items(
        self,
        queries: Queries | torch.Tensor,
        vectors: torch.Tensor | ItemStore,
        k: int,
        seen: Sequence[Sequence[int]] | None,
        allowed: np.ndarray | None = None,
    ) -> list[list[Recommendation]]:
        """The `k` best items of each of `n` queries, without the items that each user has seen, and of the allowed
        ones alone.

        The catalogue is read in the item tokens' dtype, with float32 sums: a bfloat16 model reads half the bytes.
        """
        if allowed is not None:
            return self._recommendations(
                *best_among(queries, vectors, k, seen or [[]] * len(queries), allowed)
            )
        queries = Queries.of(queries)
        dense = queries.dense
        if isinstance(vectors, torch.Tensor):
            scores, items = self._searched(dense, vectors, k, seen)
        else:
            scores, items = vectors.topk(dense, k, seen)
        return self._recommendations(*queries.best_of_sum(scores, items, partial(vectors_of, vectors), seen))

    def _searched(
        self, queries: torch.Tensor, vectors: torch.Tensor, k: int, seen: Sequence[Sequence[int]] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`topk_items` of dense queries."""
        excluded: dict[str, torch.Tensor] = {}
        if seen is not None:
            indptr = np.cumsum([0, *map(len, seen)])
            excluded = {
                "exclude_indptr": torch.as_tensor(indptr, device=queries.device),
                "exclude_items": torch.tensor(
                    [i for row in seen for i in row], dtype=torch.long, device=queries.device
                ),
            }
        try:
            return topk_items(queries.to(vectors.dtype), vectors, k, **excluded)
        except ValueError as error:
            raise self._explained(error, vectors) from error

    def _explained(self, error: ValueError, vectors: torch.Tensor) -> ValueError:
        """An error of `topk_items`; of NaN in the tokens it names the item."""
        bad = vectors.isnan().any(dim=1).nonzero()
        if not len(bad):
            return error
        item = self.catalogue.ids[int(bad[0])]
        return ValueError(f"the model's tokens of {len(bad)} item(s) hold NaN, the first: item {item!r}")

    def _recommendations(self, scores: torch.Tensor, items: torch.Tensor) -> list[list[Recommendation]]:
        return [
            [self._recommendation(i, s) for i, s in zip(row, row_scores, strict=True)]
            for row, row_scores in zip(items.tolist(), scores.tolist(), strict=True)
        ]

    def _recommendation(self, item: int, score: float) -> Recommendation:
        return Recommendation(item, self.catalogue.ids[item], self.catalogue.titles[item], score)

    def _check_histories(self, histories: Sequence[Sequence[int | str]], may_be_empty: bool = False) -> None:
        check_own_parts(self)
        if len(histories) == 0:
            raise ValueError("histories: expected at least one history, got none")
        if is_single(histories) or any(is_single(history) for history in histories):
            raise ValueError(
                "histories: expected a list of histories, such as [[3, 7]], got a single history"
            )
        for row, history in enumerate(histories):
            check_ordered(f"histories, row {row}", history)
        if not may_be_empty and not self.config.prompt_prefix and not self.config.prompt_suffix:
            for row, history in enumerate(histories):
                if len(history) == 0:
                    raise ValueError(
                        f"histories: expected at least one item in each, got an empty history at {row}"
                    )


def check_left(choice: Choice, hidden: Sequence[Sequence[int]], items: int, k: int) -> None:
    """Raise `ValueError`, or `TypeError`, unless each user can have `k` items."""
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k: expected a whole number, got {type(k).__name__}")
    left = [choice.left(row, items) for row in hidden]
    most = min(left)
    if not 1 <= k <= most:
        after = "the history" if len(left) == 1 else f"history {left.index(most)}"
        raise ValueError(
            f"k: expected 1..{most}, the items of {items} that can be recommended after {after}, got {k}"
        )
