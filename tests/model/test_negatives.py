"""Sampled and in-batch negatives: the loss is an estimate of the full softmax's, and reads only what it needs."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import LlamaConfig

from speeder.evaluation.metrics import target_ranks
from speeder.model import negatives
from speeder.model.config import SpeederConfig
from speeder.model.negatives import NegativeSampler, candidate_cross_entropy
from speeder.model.streamed_ranking import streamed_ranks
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.load import recipe_from_dict
from speeder.training.run_folder import stage_logs
from speeder.training.train import train
from speeder_kernels import item_cross_entropy
from tests.model.worlds import TEXT, save_tiny_backbone, tiny_model

HISTORY = torch.tensor([[TEXT + item for item in (3, 7, 1, 12, 5, 3, 19)]])


def sampler(num_items: int, **config) -> NegativeSampler:
    return NegativeSampler(
        SpeederConfig(text_config=LlamaConfig(vocab_size=TEXT), num_items=num_items, **config)
    )


def gradients(model, ids=HISTORY) -> torch.Tensor:
    """All gradients of the training loss in one row, and the loss before them."""
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    flat = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([loss.detach()[None], *flat])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 9), items=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_loss_is_the_formula(data, rows, items, seed):
    """Written out pair by pair: weights 1/q, the target once with weight 1, and no accidental hit."""
    places = sorted(data.draw(st.sets(st.integers(0, items - 1), min_size=1)))
    generator = torch.Generator().manual_seed(seed)
    queries, vectors = (torch.randn(count, 6, generator=generator) for count in (rows, items))
    queries, vectors = (tensor.requires_grad_() for tensor in (2 * queries, vectors))
    targets = torch.randint(items, (rows,), generator=generator)
    log_q = -4 * torch.rand(len(places), generator=generator)
    got = candidate_cross_entropy(queries, vectors, targets, torch.tensor(places), log_q)
    scores = (queries @ vectors.T).double()
    expected = []
    for row, target in enumerate(targets.tolist()):
        others = [scores[row, c] - log_q[n] for n, c in enumerate(places) if c != target]
        terms = torch.stack([scores[row, target], *others])
        expected.append(terms.logsumexp(0) - scores[row, target])
    expected = torch.stack(expected)
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)
    inputs = (queries, vectors)
    for mine, right in zip(
        torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(mine, right.float(), atol=1e-3, rtol=1e-3)


def test_a_rare_target_among_the_candidates_keeps_its_loss_and_gradient():
    """In a sum of the candidates it has a weight of 1 / q, beside which the others would be lost in rounding."""
    vectors, log_q = torch.eye(3), torch.tensor([-12.0, -1.0, -1.0])
    for score in (5.0, 10.0, 20.0):
        queries = torch.tensor([[score, 1.0, 2.0]], requires_grad=True)
        loss = candidate_cross_entropy(queries, vectors, torch.tensor([0]), torch.arange(3), log_q)
        exact = queries.detach().double().requires_grad_()
        others = torch.logsumexp(exact[:, 1:] - log_q[1:].double(), dim=1)
        expected = F.softplus(others - exact[:, 0])
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        loss.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(queries.grad.double(), exact.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_every_candidate_in_bfloat16(autocast):
    """Of rows whose target is no candidate too, for which another column of the op has to stand in."""
    torch.manual_seed(0)
    queries = ((torch.randn(64) + torch.randn(1000, 64)) / 4).bfloat16()
    vectors = torch.randn(900, 64).bfloat16().requires_grad_()
    targets, places, log_q = torch.randint(400, 900, (1000,)), torch.arange(500), torch.full((500,), -1.5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = candidate_cross_entropy(queries, vectors, targets, places, log_q)
    exact = vectors.detach().double().requires_grad_()
    scores = queries.double() @ exact.T
    others = (scores[:, :500] + 1.5).masked_fill(F.one_hot(targets, 900)[:, :500].bool(), -torch.inf)
    expected = F.softplus(others.logsumexp(1) - scores[torch.arange(1000), targets])
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-4)
    (ours,), (right,) = (
        torch.autograd.grad(x.mean(), leaf) for x, leaf in ((loss, vectors), (expected, exact))
    )
    errors = (ours - right).norm(dim=1) / right.norm(dim=1)
    assert errors[right.norm(dim=1) > 0].max() < 0.02


def test_a_target_of_many_rows_keeps_its_gradient_in_bfloat16():
    """In bfloat16, a sum of equal terms would end at 256 of them."""
    torch.manual_seed(0)
    queries, vectors = (torch.randn(4096, 16) * 0.3 + 0.2).bfloat16(), (torch.randn(30, 16) * 0.3).bfloat16()
    vectors.requires_grad_()
    targets, places, log_q = torch.full((4096,), 7), torch.arange(10, 30), torch.full((20,), -1.5)
    (ours,) = torch.autograd.grad(
        candidate_cross_entropy(queries, vectors, targets, places, log_q).mean(), vectors
    )
    exact = vectors.detach().double().requires_grad_()
    scores = queries.double() @ exact.T
    loss = F.softplus((scores[:, 10:] + 1.5).logsumexp(1) - scores[:, 7]).mean()
    (right,) = torch.autograd.grad(loss, exact)
    assert (ours[7] - right[7]).norm() < 0.01 * right[7].norm()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_state_that_is_not_finite_gives_its_own_loss(wrong):
    """Which training then notices, and the others are as without it."""
    torch.manual_seed(0)
    queries, vectors = torch.randn(4, 6), torch.randn(9, 6)
    rest = torch.tensor([1, 8, 3, 2]), torch.arange(5), -torch.rand(5)
    right = candidate_cross_entropy(queries, vectors, *rest)
    queries[2, 0] = wrong
    loss = candidate_cross_entropy(queries, vectors, *rest)
    assert not loss[2].isfinite()
    torch.testing.assert_close(loss[[0, 1, 3]], right[[0, 1, 3]], atol=0.2, rtol=0)


@pytest.mark.parametrize("score", [1e3, 1e5, 2e5])
def test_large_scores(score):
    for log_q in (-1.0, -20.0):
        queries, vectors = torch.tensor([[score, score - 12]], requires_grad=True), torch.eye(2)
        loss = candidate_cross_entropy(
            queries, vectors, torch.tensor([0]), torch.arange(2), torch.full((2,), log_q)
        )
        expected = F.softplus(torch.tensor(-12.0 - log_q, dtype=torch.float64))
        assert abs(float(loss) - float(expected)) < 0.05


def test_many_rows_are_computed_a_part_at_a_time(monkeypatch):
    torch.manual_seed(0)
    queries, vectors = torch.randn(50, 8, requires_grad=True), torch.randn(30, 8)
    targets, places = torch.randint(0, 30, (50,)), torch.arange(0, 30, 2)
    log_q = -torch.rand(15)
    targets[:20], log_q[0] = 0, -60.0  # these rows' target is nearly all of the candidates' sum

    def run():
        loss = candidate_cross_entropy(queries, vectors, targets, places, log_q)
        return loss, *torch.autograd.grad(loss.sum(), queries)

    whole = run()
    monkeypatch.setattr("speeder.model.negatives._LOGITS", 4 * 15)
    calls = []
    formed = negatives._row_losses
    monkeypatch.setattr(negatives, "_row_losses", lambda *args: calls.append(len(args[0])) or formed(*args))
    for part, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(part, expected)
    assert len(calls) > 2 and max(calls) == 4


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_gives_each_batchs_losses_and_gradients():
    """Also of rows whose target is nearly all of the candidates' sum, of which each batch has another number."""
    torch.manual_seed(0)
    tensors = [torch.randn(3, size, 8).requires_grad_() for size in (50, 30)]
    targets, places = torch.randint(0, 30, (50,)), torch.arange(0, 30, 2)
    log_q = -torch.rand(15)
    targets[:20], log_q[0] = 0, -60.0

    def run(queries, vectors):
        return candidate_cross_entropy(queries, vectors, targets, places, log_q)

    got, expected = torch.func.vmap(run)(*tensors), torch.stack(list(map(run, *tensors)))
    torch.testing.assert_close(got, expected)
    for mine, right in zip(*(torch.autograd.grad(x.sum(), tensors) for x in (got, expected)), strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", ["sampled", "in-batch"])
@pytest.mark.parametrize("weight", ["mrc.norm_weight", "logit_scale"])
def test_transforms_of_the_models_loss(kind, weight):
    """vmap is served; derivatives are refused, by the name of the op that has none."""
    model = tiny_model(negatives=kind, num_negatives=3, negatives_exponent=0.5).train()
    model.negatives.set_counts(np.arange(20))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    x = weights[weight]

    def loss(value):
        model.negatives.seek(0)
        return torch.func.functional_call(
            model, weights | {weight: value}, (HISTORY,), {"labels": HISTORY}
        ).loss

    each = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(loss)(each), torch.stack([loss(value) for value in each]))
    refused = r"^(compress_items|item_cross_entropy): .* derivatives are not supported"
    for transform in (torch.func.grad(loss), torch.func.hessian(loss)):
        with pytest.raises(NotImplementedError, match=refused):
            transform(x)
    with pytest.raises(NotImplementedError, match=refused):
        torch.func.vmap(torch.func.grad(loss))(each)
    with pytest.raises(NotImplementedError, match=refused):
        torch.func.jvp(loss, (x,), (x,))


def test_a_target_that_alone_was_drawn_costs_nothing_and_gives_finite_gradients():
    queries, vectors = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    ones = torch.ones(3, dtype=torch.long)
    loss = candidate_cross_entropy(queries, vectors, ones, torch.tensor([1]), torch.tensor([-9.0]))
    assert loss.max() < 1e-6
    loss.sum().backward()
    assert queries.grad.isfinite().all() and vectors.grad.isfinite().all()


@pytest.mark.parametrize("exponent", [0.0, 0.75, 1.0])
def test_items_are_among_the_candidates_as_often_as_log_q_says(exponent):
    items, draws, rounds = 12, 10, 4000
    made = sampler(items, negatives="sampled", num_negatives=draws, negatives_exponent=exponent)
    made.set_counts(np.arange(items) ** 2)
    seen, probability = np.zeros(items), np.zeros(items)
    for step in range(rounds):
        made.seek(step)
        candidates = made.candidates(torch.zeros(0, dtype=torch.long))
        seen[candidates.items.numpy()] += 1
        probability[candidates.items.numpy()] = candidates.log_q.exp().numpy()
    deviation = np.sqrt(probability * (1 - probability) / rounds)
    assert (abs(seen / rounds - probability) < 4 * deviation + 1e-9).all()
    assert np.ptp(probability) > 0.5 if exponent else np.ptp(probability) < 1e-6


def test_in_batch_candidates_are_as_likely_as_log_q_says():
    """Batches of targets drawn by their counts, as training draws them."""
    items, batch, rounds = 8, 6, 4000
    counts = np.array([1, 1, 2, 3, 5, 8, 13, 21])
    made, random = sampler(items, negatives="in-batch"), np.random.default_rng(0)
    made.set_counts(counts)
    seen, probability = np.zeros(items), np.zeros(items)
    for _ in range(rounds):
        targets = random.choice(items, size=batch, p=counts / counts.sum())
        candidates = made.candidates(torch.from_numpy(targets))
        assert candidates.items.tolist() == sorted(set(targets.tolist()))
        seen[np.unique(targets[1:])] += 1  # what the first row is compared with
        probability[candidates.items.numpy()] = candidates.log_q.exp().numpy()
    deviation = np.sqrt(probability * (1 - probability) / rounds)
    assert (abs(seen / rounds - probability) < 4 * deviation).all()


def test_draws_follow_from_seed_step_and_place_in_the_step():
    def drawn(seed: int, step: int, number: int) -> list[int]:
        made = sampler(10_000, negatives="sampled", num_negatives=50, negatives_seed=seed)
        made.seek(3)
        made.candidates(torch.zeros(0, dtype=torch.long))
        made.seek(step)
        for _ in range(number):
            made.candidates(torch.zeros(0, dtype=torch.long))
        return made.candidates(torch.zeros(0, dtype=torch.long)).items.tolist()

    places = list(itertools.product((0, 1), (0, 1, 7), (0, 1)))
    draws = [drawn(*place) for place in places]
    assert draws == [drawn(*place) for place in places]
    assert len({tuple(draw) for draw in draws}) == len(places)


def test_with_every_item_drawn_loss_and_gradients_are_the_full_ones():
    full = gradients(tiny_model().train())
    sampled = gradients(tiny_model(negatives="sampled", num_negatives=4000).train())
    torch.testing.assert_close(sampled, full, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_the_mean_gradient_approaches_the_full_one(exponent):
    """Its error falls with the number of draws, and leaves of the gradient itself little."""
    full = gradients(tiny_model().train())
    errors = []
    for draws in (4, 40):
        model = tiny_model(negatives="sampled", num_negatives=draws, negatives_exponent=exponent).train()
        model.negatives.set_counts(np.arange(20))
        mean = torch.zeros_like(full)
        for step in range(100):
            model.negatives.seek(step)
            mean += gradients(model) / 100
        errors.append(float((mean - full).norm() / full.norm()))
    assert errors[1] < errors[0] / 2 and errors[1] < 0.1


def test_without_log_q_the_gradient_would_stay_wrong():
    """What the correction is for: items drawn by popularity, and no trace of that in the mean of the softmax's sum."""
    items, counts = 30, np.arange(1, 31)
    vectors, query = torch.randn(items, 5), torch.randn(1, 5)
    target = torch.tensor([0])
    full = item_cross_entropy(query, vectors, target, scale=1.0).exp()
    made = sampler(items, negatives="sampled", num_negatives=20, negatives_exponent=1.0)
    made.set_counts(counts)
    sums = {"corrected": [], "not": []}
    for step in range(3000):
        made.seek(step)
        drawn = made.candidates(target)
        for name, log_q in (("corrected", drawn.log_q), ("not", drawn.log_q * 0)):
            sums[name].append(candidate_cross_entropy(query, vectors, target, drawn.items, log_q).exp())
    error = {name: float((torch.cat(values).mean() / full - 1).abs()) for name, values in sums.items()}
    assert error["corrected"] < 0.06 and error["not"] > 0.2


@pytest.mark.parametrize("kind", ["sampled", "in-batch"])
@pytest.mark.parametrize("tokens_per_item", [1, 2])
def test_only_items_that_are_read_or_scored_are_compressed(kind, tokens_per_item, monkeypatch):
    model = tiny_model(negatives=kind, num_negatives=3, tokens_per_item=tokens_per_item, item_embedding=True)
    model.negatives.set_counts(np.ones(20))
    calls, forward = [], model.mrc.forward
    monkeypatch.setattr(model.mrc, "forward", lambda rows=None: calls.append(rows) or forward(rows))
    ids = HISTORY.repeat_interleave(tokens_per_item, dim=1)
    labels = torch.where(torch.arange(ids.shape[1]) % tokens_per_item == 0, ids, -100)
    drawn = model.negatives.candidates(HISTORY.flatten()[1:] - TEXT).items
    model.negatives.seek(0)
    model.train()(ids, labels=labels).loss.backward()
    assert [rows.tolist() for rows in calls] == [
        sorted({*(HISTORY - TEXT).flatten().tolist(), *drawn.tolist()})
    ]
    assert not [name for name, _ in model.named_buffers() if "features" in name], "features stay on disk"


def test_a_rows_token_is_the_catalogues():
    full, rows = tiny_model(item_embedding=True), tiny_model(item_embedding=True, negatives="sampled")
    with torch.no_grad():
        torch.testing.assert_close(rows.mrc()[0], full.mrc()[0])
        torch.testing.assert_close(rows.mrc(torch.tensor([4, 2]))[0], full.mrc()[0][[4, 2]])
    assert [item.item for item in rows.recommend([[1, 2]], k=5)[0]] == [
        item.item for item in full.recommend([[1, 2]], k=5)[0]
    ]


def test_in_evaluation_the_loss_is_the_full_one():
    with torch.no_grad():
        losses = [tiny_model(negatives=kind)(HISTORY, labels=HISTORY).loss for kind in ("full", "sampled")]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("kind", ["sampled", "in-batch"])
def test_a_recipe_trains_with_them_and_learns(kind, tmp_path):
    """Through `train`: counts, steps and validation; items of the next group come before others."""
    world = synthetic_world(num_users=60, history=8)
    recipe = recipe_from_dict(
        {
            "backbone": str(save_tiny_backbone(tmp_path / "backbone")),
            "precision": "fp32",
            "batch_users": 10,
            "checkpoint_steps": 20,
            "log_steps": 5,
            "model": {"negatives": kind, "num_negatives": 8, "negatives_exponent": 0.5},
            "stages": [{"name": "text", "open": ["text"], "steps": 40, "learning_rate": 5.0e-3}],
        }
    )
    model = train(recipe, world, tmp_path / "run")
    scores = model.score(world.split.histories("test"))
    assert world.group_accuracy(scores, "test") > 0.5, "chance is 1/6"
    log = stage_logs(tmp_path / "run")["text"]
    assert any("eval_NDCG@10" in line for line in log) and any("gate/text" in line for line in log)


def test_text_labels_and_batches_without_items_train_too():
    model = tiny_model(negatives="sampled", num_negatives=5).train()
    text = torch.tensor([[1, 2, 3, 4]])
    full = tiny_model().train()
    torch.testing.assert_close(model(text, labels=text).loss, full(text, labels=text).loss)
    unasked = model(HISTORY, labels=torch.full_like(HISTORY, -100)).loss
    unasked.backward()
    assert unasked == 0


@pytest.mark.parametrize(
    "config",
    [{"negatives": "some"}, {"num_negatives": 0}, {"negatives_exponent": -1.0}, {"negatives_seed": -1}],
)
def test_settings_out_of_range_are_named(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        SpeederConfig(text_config=LlamaConfig(vocab_size=TEXT), **config)


def test_counts_that_are_missing_or_do_not_fit_are_named():
    model = tiny_model(negatives="in-batch").train()
    with pytest.raises(ValueError, match="set_counts"):
        model(HISTORY, labels=HISTORY)
    model.negatives.set_counts(np.ones(19))
    with pytest.raises(ValueError, match="target counts of 20 items, got 19"):
        model(HISTORY, labels=HISTORY)
    with pytest.raises(ValueError, match="counts: expected"):
        model.negatives.set_counts(np.array([1, -1]))


@pytest.mark.parametrize("tokens_per_item", [1, 2])
def test_validation_ranks_by_pieces_as_evaluation_does_by_all_scores(tokens_per_item, monkeypatch):
    model = tiny_model(negatives="sampled", tokens_per_item=tokens_per_item)
    random = np.random.default_rng(0)
    histories = [random.choice(20, size=size, replace=False) for size in (1, 3, 7, 12)]
    targets = np.array([4, 19, int(histories[2][1]), 0])
    scores = model.score(histories)
    expected = target_ranks(scores, torch.from_numpy(targets), histories)
    pieces = model.mrc.pieces
    monkeypatch.setattr(model.mrc, "pieces", lambda: pieces(6))
    monkeypatch.setattr(model, "item_tokens", None)
    assert streamed_ranks(model, histories, targets).tolist() == expected.tolist()
    assert expected[2] == 20, "a target that was seen"


WORKER = """
import numpy as np, torch, torch.distributed as dist
from speeder.model.negatives import gather_ids
from speeder.model.sequences import build_sequence, pack_batch
from tests.model.worlds import tiny_model

histories = [[1, 2, 3], [4, 9, 5, 6, 7], [8, 1], [3, 3, 11, 12, 13, 2]]


def gradients(model, chosen):
    batch = pack_batch([build_sequence(histories[n], model.config, 14 + n) for n in chosen], with_labels=True)
    model.zero_grad()
    model.negatives.seek(5)
    loss = model(**batch, num_items_in_batch=sum(map(len, histories))).loss
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


alone = {}
for kind in ("in-batch", "sampled"):
    model = tiny_model(negatives=kind, num_negatives=6).train()
    model.negatives.set_counts(np.arange(20))
    alone[kind] = model, gradients(model, range(4))
dist.init_process_group("gloo")
rank = dist.get_rank()
for counts in ((3, 0), (1, 4), (0, 0)):
    mine = torch.arange(counts[rank]) + 10 * rank
    expected = [torch.arange(count) + 10 * other for other, count in enumerate(counts)]
    assert gather_ids(mine).tolist() == torch.cat(expected).tolist()
for kind, (model, expected) in alone.items():
    shared = gradients(model, ([0, 1, 2], [3])[rank])
    dist.all_reduce(shared)
    torch.testing.assert_close(shared, expected, atol=1e-5, rtol=1e-4)
dist.destroy_process_group()
"""


def test_two_processes_losses_and_gradients_add_up_to_ones(tmp_path):
    """Whatever is drawn or gathered, a batch is compared with the same items, however it is shared."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    subprocess.run([*command, str(tmp_path / "worker.py")], check=True, env=environment, timeout=500)
