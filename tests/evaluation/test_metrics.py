"""Ranks against a plain definition, and metrics against torchmetrics and ranx."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from ranx import Qrels, Run
from ranx import evaluate as ranx_evaluate
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG

from speeder.evaluation.metrics import CUTOFFS, METRICS, metric_values, target_ranks


def plain_rank(scores, target, seen=()):
    """The definition, item by item."""
    if target in seen:
        return len(scores)
    others = [item for item in range(len(scores)) if item != target and item not in seen]
    return (
        1
        + sum(scores[item] > scores[target] for item in others)
        + sum(scores[item] == scores[target] for item in others)
    )


@st.composite
def problems(draw):
    rows, items = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    # Few distinct values, infinities among them, so that ties are common.
    values = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0, np.inf])
    scores = draw(arrays(np.float32, (rows, items), elements=values))
    item = st.integers(0, items - 1)
    targets = draw(st.lists(item, min_size=rows, max_size=rows))
    histories = draw(st.lists(st.lists(item, max_size=6), min_size=rows, max_size=rows))
    return scores, targets, histories


@given(problems())
def test_ranks_are_as_defined(problem):
    scores, targets, histories = problem
    given_scores, given_targets = torch.from_numpy(scores), torch.tensor(targets)
    allowed = target_ranks(given_scores, given_targets)
    masked = target_ranks(given_scores, given_targets, histories)
    assert allowed.tolist() == [plain_rank(row, target) for row, target in zip(scores, targets, strict=True)]
    assert masked.tolist() == [plain_rank(*row) for row in zip(scores, targets, histories, strict=True)]


def test_constant_scores_get_the_worst_rank():
    assert target_ranks(torch.zeros(3, 50), torch.tensor([0, 20, 49])).tolist() == [50, 50, 50]


def test_hiding_seen_items_raises_a_target_behind_them():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    assert target_ranks(scores, torch.tensor([2])).item() == 3
    assert target_ranks(scores, torch.tensor([2]), [[0, 1]]).item() == 1


def test_a_target_that_was_seen_is_missed_where_seen_items_are_hidden():
    scores = torch.tensor([[9.0, 1.0, 1.0, 1.0]])
    assert target_ranks(scores, torch.tensor([0]), [[0, 1]]).item() == 4


@pytest.fixture(scope="module")
def ranking():
    """300 users' distinct random scores over 60 items, targets near the top so that there are hits."""
    rng = np.random.default_rng(3)
    # From 1 up: torchmetrics' MRR takes a score that is not positive for an item that was not retrieved.
    scores = torch.from_numpy(rng.permuted(np.tile(np.arange(1, 61, dtype=np.float32), (300, 1)), axis=1))
    order = scores.argsort(dim=1, descending=True)
    places = torch.from_numpy(np.minimum(rng.geometric(0.07, 300) - 1, 59))
    return scores, order[torch.arange(300), places]


def test_metrics_agree_with_torchmetrics(ranking):
    scores, targets = ranking
    ranks = target_ranks(scores, targets).numpy()
    relevant = torch.zeros_like(scores, dtype=torch.bool)
    relevant[torch.arange(300), targets] = True
    users = torch.arange(300)[:, None].expand_as(scores)
    theirs = {"MRR": RetrievalMRR()}
    theirs |= {f"HR@{k}": RetrievalHitRate(top_k=k) for k in CUTOFFS}
    theirs |= {f"NDCG@{k}": RetrievalNormalizedDCG(top_k=k) for k in CUTOFFS}
    assert set(theirs) == set(METRICS)
    for name, metric in theirs.items():
        expected = metric(scores.flatten(), relevant.flatten(), indexes=users.flatten()).item()
        assert metric_values(ranks, name).mean() == pytest.approx(expected, abs=1e-6), name


@pytest.mark.slow
def test_metrics_agree_with_ranx(ranking):
    scores, targets = ranking
    ranks = target_ranks(scores, targets).numpy()
    qrels = Qrels({f"u{user}": {f"i{int(item)}": 1} for user, item in enumerate(targets)})
    run = Run(
        {
            f"u{user}": {f"i{item}": float(value) for item, value in enumerate(row)}
            for user, row in enumerate(scores)
        }
    )
    names = {"MRR": "mrr"}
    names |= {f"HR@{k}": f"hit_rate@{k}" for k in CUTOFFS} | {f"NDCG@{k}": f"ndcg@{k}" for k in CUTOFFS}
    theirs = ranx_evaluate(qrels, run, list(names.values()))
    for name, their_name in names.items():
        assert metric_values(ranks, name).mean() == pytest.approx(theirs[their_name], abs=1e-9), name


@pytest.mark.parametrize(
    ("scores", "targets", "histories", "error", "message"),
    [
        (torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]), [0, 1], None, ValueError, "NaN, the first is row 1"),
        (torch.zeros(2, 3, dtype=torch.int64), [0, 1], None, TypeError, "floating"),
        (torch.zeros(2, 3), [0], None, ValueError, r"\(n, I\)"),
        (torch.zeros(2, 3), [0, 3], None, IndexError, "targets: expected items in 0..2"),
        (torch.zeros(2, 3), [0, 1], [[0], [-1]], IndexError, "histories: expected items in 0..2"),
        (torch.zeros(2, 3), [0, 1], [[0]], ValueError, "expected 2 of them"),
    ],
)
def test_wrong_input_is_named(scores, targets, histories, error, message):
    with pytest.raises(error, match=message):
        target_ranks(scores, torch.tensor(targets), histories)


@pytest.mark.parametrize("name", ["HR", "HR@0", "ndcg@10", "NDCG@10 ", "Recall@10"])
def test_an_unknown_metric_is_refused(name):
    with pytest.raises(ValueError, match="HR@k, NDCG@k or MRR"):
        metric_values(np.array([1]), name)
