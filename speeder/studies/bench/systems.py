"""The compared systems, each trained as its recipe says, on one backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from speeder.baselines.auto import baseline_class
from speeder.data.prepared import PreparedData
from speeder.model.loading import load_tokenizer
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.processor import template_ids
from speeder.model.sequences import TokenSequence, pack_batch
from speeder.recipes.load import bundled_recipe, load_recipe
from speeder.recipes.schema import Recipe
from speeder.studies.bench.flops import ranking_flops, training_flops
from speeder.studies.bench.workload import TITLE_TOKENS, Users, Workload, choose_users, with_texts
from speeder.training.dataset import TrainingSequences
from speeder.training.mpo import select_parameters

SYSTEMS = {  # name -> (label in tables, recipe)
    "speeder": ("Speeder", "ml-100k"),
    "text-prompt": ("text-prompt: one forward over titles", "ml-100k-text-prompt"),
    "title-generation": ("title-generation, LLaRA's prompt", "ml-100k-title-generation"),
    "yes-no": ("yes-no, MLLM-MSR's prompt", "ml-100k-yes-no"),
}
TRAINING_TOKENS = 8192  # per batch, on average; at least one sequence
SAMPLED_EXAMPLES = 2048  # most examples that training batches are made of
GOLDEN_SECTION = (5**0.5 - 1) / 2
RANKING_TOKENS = 16_384
SAMPLED_USERS = 16  # fewest users for the mean length of prompts
BATCHES = 8  # different training batches, used in turns
K = 10  # items recommended


@dataclass(frozen=True)
class Batch:
    """One training batch: the numbers of its examples, and its size.

    `prompts` and `targets` are those of an average batch, times this batch's flops over the average batch's. So a batch
    of shorter examples does not show a higher rate.
    """

    examples: list[int]
    tokens: int
    prompts: float
    targets: float
    flops: int


class System:
    """A model with its optimizer, on a workload. `rank` must come before `prepare`, which reads all item texts.

    Args:
        name: one of [`SYSTEMS`].
        backbone: asset, folder or Hub id.
        layers: the number of the backbone's layers to keep.
        precision: `"bf16"` or `"fp32"`.

    Raises:
        SpeederError: the backbone or the data cannot be used.
    """

    def __init__(
        self, name: str, data: PreparedData, workload: Workload, backbone: str, layers: int, precision: str
    ):
        recipe, _ = load_recipe(bundled_recipe(SYSTEMS[name][1])).for_modalities(data.catalogue.readable)
        self.name, self.recipe, self.workload = name, replace(recipe, precision=precision), workload
        self.users: Users = choose_users(data, workload)
        longest = max(len(set(history.tolist())) for history in self.users.histories)
        self._k = min(K, len(data.catalogue) - longest)
        self.model = build_model(recipe, data, workload, backbone, layers)
        self._optimizer: torch.optim.Optimizer | None = None

    def for_ranking(self) -> None:
        """Put the weights into the bench's precision, as a server would hold them: without gradients, autocast would
        cast them again at every call. Not possible once trained."""
        if self.recipe.precision == "bf16":
            self.model.to(torch.bfloat16)
        self.model.eval()

    def for_training(self) -> None:
        """Put the weights into float32 and make the optimizer; a second call changes nothing."""
        if self._optimizer is None:
            self.model.float().train()
            groups = select_parameters(self.model, self.recipe.stages[-1], self.recipe.weight_decay)
            self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    def prepare(self) -> None:
        """Lay out training batches and the batch of users, by tokens."""
        examples = self.model.training_examples(self.recipe.supervision)
        self._dataset = TrainingSequences(
            self.users.training, self.model.config, self.recipe.supervision, **examples
        )
        self.batches = self._representative()
        lengths: list[int] = []
        self.ranked_users = 0  # of a batch
        for user in range(len(self.users.histories)):
            prompts = self.prompt_lengths(user)
            fits = sum(lengths) + sum(prompts) <= RANKING_TOKENS
            if user and not fits and user >= SAMPLED_USERS:
                break
            lengths += prompts
            self.ranked_users += self.ranked_users == user and (fits or user == 0)
        self.mean_prompt = float(np.mean(lengths))

    def _representative(self) -> list[Batch]:
        """Batches of about TRAINING_TOKENS, with short and long examples as in all of the data."""
        sample = np.random.default_rng(1).permutation(len(self._dataset))[:SAMPLED_EXAMPLES]
        sequences = {int(number): self._dataset[number] for number in sample}
        lengths = np.array([len(sequence.ids) for sequence in sequences.values()])
        size = min(len(sample), max(1, round(TRAINING_TOKENS / lengths.mean())))
        parts = training_flops(self.model, list(sequences.values()))
        once = parts.pop("item tokens", 0)  # a step compresses the catalogue once, whatever the batch
        mean = sum(parts.values()) / len(sample)
        targets = np.mean([self._targets(sequence) for sequence in sequences.values()])
        strata = np.array_split(sample[np.argsort(lengths, kind="stable")], size)
        batches = []
        for number in range(BATCHES):
            # one of each stratum, at places that golden sections spread evenly over strata and batches
            places = [(0.5 + (number + index) * GOLDEN_SECTION) % 1 for index in range(size)]
            examples = [int(part[int(place * len(part))]) for part, place in zip(strata, places, strict=True)]
            drawn = [sequences[example] for example in examples]
            flops, tokens = (
                sum(training_flops(self.model, drawn).values()),
                sum(len(one.ids) for one in drawn),
            )
            share = flops / (once + size * mean)
            batches.append(Batch(examples, tokens, share * size, share * size * targets, flops))
        return batches

    def _targets(self, sequence: TokenSequence) -> float:
        """Number of targets in a prompt."""
        if self.recipe.supervision == "all":  # every label is one
            return sum(label >= 0 for label in sequence.labels)
        return 1 / self._dataset.per_window

    def train(self, number: int) -> Batch:
        """One optimizer step on one of the batches, which is built again, as by a loader."""
        batch = self.batches[number % len(self.batches)]
        with torch.profiler.record_function("data preparation"):
            packed = pack_batch([self._dataset[example] for example in batch.examples], with_labels=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            loss = self.model(**packed).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return batch

    def rank(self, users: Sequence[int]) -> None:
        """Answer for users as the system is used: ranked items, a written title, or 20 scores."""
        histories = [self.users.histories[user].tolist() for user in users]
        candidates = self.users.candidates[list(users)]
        if self.name == "title-generation":
            self.model.generate_titles(histories, candidates)
        elif self.name == "yes-no":
            self.model.score_candidates(histories, candidates)
        else:
            self.model.recommend(histories, self._k, batch_size=len(histories))

    def prompt_lengths(self, user: int) -> list[int]:
        """Tokens to read for one user's answer, one number per sequence."""
        history = self.users.histories[user].tolist()
        candidates = self.users.candidates[user].tolist()
        if self.name == "title-generation":
            return [len(self.model.prompt(history, candidates))]
        if self.name == "yes-no":
            return [len(self.model.prompt(history, candidate)) for candidate in candidates]
        return [len(self.model.sequence(history).ids)]

    def rank_flops(self, users: Sequence[int]) -> int:
        """Model flops of `rank`, without what generation computes after its prompt."""
        lengths = [length for user in users for length in self.prompt_lengths(user)]
        return ranking_flops(self.model, lengths, self.name in ("speeder", "text-prompt"))

    def tokens_an_item(self) -> float:
        """Mean over the items of the users' histories."""
        if self.name == "speeder":
            return float(self.model.config.tokens_per_item)
        items = np.concatenate([history[-self.workload.max_history :] for history in self.users.histories])
        return float(np.mean([len(self.model.title(item)) for item in items.tolist()]))


def build_model(
    recipe: Recipe, data: PreparedData, workload: Workload, backbone: str, layers: int
) -> SpeederForCausalLM:
    """A new model of the recipe, with another backbone, number of layers, and the workload's lengths."""
    tokenizer = load_tokenizer(backbone)
    settings = recipe.model | {"max_history": workload.max_history}
    torch.manual_seed(recipe.seed)
    if recipe.baseline is None:
        prefix, suffix = template_ids(tokenizer, recipe.template)
        opened = recipe.stages[-1].open
        settings |= {
            "prompt_prefix": prefix,
            "prompt_suffix": suffix,
            "modalities": [name for name in data.catalogue.modalities if name in opened],
        }
        return SpeederForCausalLM.from_backbone(backbone, data.catalogue, layers=layers, **settings)
    settings |= {"tokenizer": tokenizer, "max_title_tokens": workload.max_text}
    catalogue = with_texts(data.catalogue, workload, tokenizer)
    model = baseline_class(recipe.baseline).from_backbone(backbone, catalogue, layers=layers, **settings)
    if recipe.baseline == "title-generation":
        titles = tokenizer(data.catalogue.titles, add_special_tokens=False)["input_ids"]
        mean = np.mean([min(max(1, len(ids)), TITLE_TOKENS) for ids in titles])
        model.generate = _writes(model.generate, 1 + round(float(mean)))
    return model


def _writes(generate: Callable, tokens: int) -> Callable:
    """`generate` that writes exactly `tokens` tokens, a title's mean length and its end. Trained models stop there; an
    untrained one may write to the limit, which would be unfair."""

    def exactly(*args, **kwargs):
        return generate(*args, **kwargs | {"min_new_tokens": tokens, "max_new_tokens": tokens})

    return exactly
