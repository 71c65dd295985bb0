"""Evaluation from end to end: ranks per user, protocols, slices, round trips, tables and refusals."""

import json

import numpy as np
import pytest
import torch

from speeder.baselines import Popularity
from speeder.data.fingerprints import training_hash
from speeder.data.interactions import Interactions, LeaveOneOut
from speeder.errors import SpeederError
from speeder.evaluation.evaluate import evaluate
from speeder.evaluation.leaks import LeakError
from speeder.evaluation.metrics import METRICS
from speeder.evaluation.result import Evaluation
from speeder.evaluation.tables import comparison_table

NUM_ITEMS = 40


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 15, 70)
    users = np.repeat(np.arange(70), lengths)
    items = np.minimum(rng.geometric(0.08, len(users)) - 1, NUM_ITEMS - 1)
    return LeaveOneOut(Interactions(users, items, np.arange(len(users)), [f"u{user}" for user in range(70)]))


class Random:
    """Scores that depend on the history alone, and on all of it."""

    def __init__(self, seed=0):
        self.seed, self.batches = seed, []

    def score(self, histories):
        self.batches.append(len(histories))
        seeds = [[self.seed, *map(int, history)] for history in histories]
        rows = [np.random.default_rng(seed).permutation(NUM_ITEMS) for seed in seeds]
        return torch.from_numpy(np.stack(rows)).float()


class Constant:
    def score(self, histories):
        return torch.zeros(len(histories), NUM_ITEMS)


class Oracle:
    """Knows every target of the split."""

    def __init__(self, split, name):
        pairs = zip(split.histories(name), split.targets(name), strict=True)
        self.next_item = {tuple(history): target for history, target in pairs}

    def score(self, histories):
        scores = torch.zeros(len(histories), NUM_ITEMS)
        for row, history in enumerate(histories):
            scores[row, self.next_item[tuple(history)]] = 1
        return scores


@pytest.mark.parametrize("name", ["test", "validation"])
def test_an_oracle_is_perfect_and_a_constant_is_last(split, name):
    oracle = evaluate(Oracle(split, name), split, name)
    assert all(oracle.mean(metric, "allowed") == 1 for metric in METRICS)
    constant = evaluate(Constant(), split, name)
    assert set(constant.ranks["allowed"]) == {NUM_ITEMS}
    for user_rank, history, target in zip(
        constant.ranks["masked"], split.histories(name), split.targets(name), strict=True
    ):
        hidden = set(map(int, history))
        assert user_rank == (NUM_ITEMS if int(target) in hidden else NUM_ITEMS - len(hidden))


def test_the_batch_size_does_not_matter(split):
    whole, single = Random(), Random()
    first, second = evaluate(whole, split, batch_size=1000), evaluate(single, split, batch_size=7)
    assert len(whole.batches) == 1 and max(single.batches) == 7
    for seen in ("masked", "allowed"):
        assert np.array_equal(first.ranks[seen], second.ranks[seen])


def test_what_an_evaluation_holds(split):
    result = evaluate(Random(), split)
    assert np.array_equal(result.users, split.users("test"))
    assert np.array_equal(result.targets, split.targets("test"))
    assert result.split_hash == split.hash() and result.num_items == NUM_ITEMS
    assert result.history_lengths.tolist() == [len(history) for history in split.histories("test")]
    occurrences = np.concatenate(split.training()).tolist()
    assert result.target_counts.tolist() == [occurrences.count(target) for target in result.targets]
    for metric in METRICS:
        interval = result.metrics["masked"][metric]
        assert interval.low <= interval.value <= interval.high
        assert interval.value == pytest.approx(result.values(metric, "masked").mean())


def test_slices_average_to_the_whole(split):
    result = evaluate(Random(), split)
    assert set(result.slices) == {"history length", "target popularity"}
    for slices in result.slices.values():
        assert sum(part["users"] for part in slices.values()) == len(result)
        for seen in ("masked", "allowed"):
            total = sum(part["users"] * part["metrics"][seen]["MRR"].value for part in slices.values())
            assert total / len(result) == pytest.approx(result.mean("MRR", seen))


def test_popularity_does_better_on_popular_targets(split):
    by_popularity = evaluate(Popularity(split.training(), NUM_ITEMS), split).slices["target popularity"]
    values = [part["metrics"]["allowed"]["MRR"].value for part in by_popularity.values()]
    assert values == sorted(values) and values[0] < values[-1]


def test_saved_and_loaded_is_the_same(split, tmp_path):
    result = evaluate(Random(), split, resamples=50, seed=5)
    result.save(tmp_path / "results" / "random.json")
    loaded = Evaluation.load(tmp_path / "results" / "random.json")
    assert json.dumps(loaded.to_dict()) == json.dumps(result.to_dict())
    assert loaded.metrics == result.metrics and loaded.slices == result.slices
    assert list((tmp_path / "results").iterdir()) == [tmp_path / "results" / "random.json"]


def test_a_failed_save_leaves_the_earlier_file(split, tmp_path, monkeypatch):
    path = tmp_path / "random.json"
    evaluate(Random(), split, resamples=5).save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        evaluate(Random(1), split, resamples=5).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_table_holds_every_number_and_how_it_was_measured(split):
    results = {"Random": evaluate(Random(), split), "Constant": evaluate(Constant(), split)}
    table = comparison_table(results)
    for name, result in results.items():
        for seen in ("masked", "allowed"):
            cells = []
            for metric in METRICS:
                value, low, high = result.metrics[seen][metric]
                best = value == max(other.metrics[seen][metric].value for other in results.values())
                cells.append(f"**{value:.4f}**" if best else f"{value:.4f}")
                cells[-1] += f" [{low:.4f}, {high:.4f}]"
            assert f"| {name} | " + " | ".join(cells) + " |" in table.splitlines()
    assert split.hash() in table and f"{len(results['Random'])} users" in table
    blocks = [block.splitlines() for block in table.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 4  # two protocols, two kinds of slice
    for block in blocks:
        assert len(block) == 4 and len({line.count("|") for line in block}) == 1


def test_tables_refuse_to_compare_what_is_not_comparable(split):
    test, validation = evaluate(Constant(), split), evaluate(Constant(), split, "validation")
    with pytest.raises(ValueError, match="split of 'a' is test, but of 'b' it is validation"):
        comparison_table({"a": test, "b": validation})
    with pytest.raises(ValueError, match="at least one"):
        comparison_table({})


def test_a_model_fitted_on_more_than_training_is_refused(split):
    model = Random()
    model.training_hash = training_hash(split.training())
    evaluate(model, split, resamples=5)
    model.training_hash = training_hash(split.histories("test"))
    with pytest.raises(LeakError, match="Random: fitted on"):
        evaluate(model, split)


def test_a_model_that_does_not_tell_what_it_was_fitted_on_is_named(split, tmp_path):
    """A table of the targets is perfect, and nothing can be checked: then at least it is said."""
    told = evaluate(Popularity(split.training(), NUM_ITEMS), split, resamples=5)
    untold = evaluate(Oracle(split, "test"), split, resamples=5)
    assert untold.mean("HR@5", "allowed") == 1
    for result, fitted_on in ((told, "the split's training part"), (untold, "not told")):
        result.save(tmp_path / "result.json")
        assert json.loads((tmp_path / "result.json").read_text())["fitted_on"] == fitted_on
        assert Evaluation.load(tmp_path / "result.json").fitted_on == fitted_on
    assert comparison_table({"a": told, "b": untold}).endswith(" Fitted on: unknown for b.\n")
    assert "Fitted on" not in comparison_table({"a": told})


@pytest.mark.parametrize("part", [("ranks", "masked"), ("targets",), ("protocol",)])
def test_a_damaged_evaluation_is_refused(split, tmp_path, part):
    content = evaluate(Constant(), split, resamples=5).to_dict()
    where = content if part == ("protocol",) else content["per_user"]
    for key in part[:-1]:
        where = where[key]
    where[part[-1]] = where[part[-1]][:-1]
    (tmp_path / "damaged.json").write_text(json.dumps(content))
    with pytest.raises(SpeederError, match=f"not a readable evaluation: {part[0]}"):
        Evaluation.load(tmp_path / "damaged.json")


class Shaped:
    def __init__(self, make):
        self.make = make

    def score(self, histories):
        return self.make(len(histories))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda n: torch.full((n, NUM_ITEMS), torch.nan), ValueError, "NaN"),
        (lambda n: torch.zeros(n + 1, NUM_ITEMS), ValueError, "scores: expected"),
        (lambda n: torch.zeros(n), ValueError, "scores, targets: expected"),
        (lambda n: torch.zeros(n, NUM_ITEMS, dtype=torch.int32), TypeError, "floating"),
        (lambda n: torch.zeros(n, 3), IndexError, "targets"),
        (lambda n: torch.zeros(n, NUM_ITEMS + n), ValueError, "scores: expected"),
    ],
)
def test_wrong_scores_are_refused(split, make, error, message):
    with pytest.raises(error, match=message):
        evaluate(Shaped(make), split, batch_size=len(split.users("test")) - 1)


def test_wrong_arguments_are_refused(split):
    with pytest.raises(ValueError, match='"test" or "validation"'):
        evaluate(Constant(), split, "train")
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(Constant(), split, batch_size=0)
    short = LeaveOneOut(Interactions(np.array([0, 0]), np.array([1, 2]), np.array([0, 1]), ["u"]))
    with pytest.raises(ValueError, match="3 interactions"):
        evaluate(Constant(), short)
    with pytest.raises(ValueError, match="seen"):
        evaluate(Constant(), split, resamples=5).values("MRR", "hidden")
