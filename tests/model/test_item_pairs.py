"""Item pairs in the model: every way to score or to rank gives the answer of a dense sum in float64."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from speeder.cli.index import compared, measuring_queries
from speeder.data.catalogue import ItemCatalogue
from speeder.data.fingerprints import training_hash
from speeder.data.interactions import Interactions, LeaveOneOut
from speeder.errors import SpeederError
from speeder.evaluation.evaluate import evaluate
from speeder.evaluation.leaks import LeakError
from speeder.model.explain import explain, leave_one_out
from speeder.model.item_pairs import FILES, ItemPairs
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.queries import Queries
from speeder.model.sequences import pack_batch, pad_batch
from speeder.model.streamed_ranking import ranks_by_weight, streamed_ranks
from speeder.recipes.neighbours import ItemPairsConfig
from speeder.retrieval.ann import build_index, recall_at_k
from speeder.retrieval.shards import TokenShards, write_token_shards
from speeder.serving.http.engine import Engine, RecommendJob
from speeder.serving.sessions import UserSessions
from tests.model.worlds import TEXT, tiny_catalogue, tiny_model

ITEMS, WEIGHT, MAX_HISTORY = 20, 30.0, 12
SEQUENCES = [[1, 2, 3, 4], [2, 3, 5], [7, 1, 2, 9, 8], [3, 3, 3, 10], [11, 1]]  # 12 to 19 have no pair
histories_of = st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=16)
many = st.lists(histories_of, min_size=1, max_size=5)


def paired(model: SpeederForCausalLM, weight: float = WEIGHT) -> SpeederForCausalLM:
    model.set_item_pairs(SEQUENCES)
    model.config.pair_weight = weight
    return model


@cache
def fixed_model(tokens_per_item: int = 1) -> SpeederForCausalLM:
    """A model that no test changes; some of its tests read a suffix after the history."""
    suffix = [5, 6] if tokens_per_item == 2 else []
    return paired(tiny_model(tokens_per_item=tokens_per_item, max_history=MAX_HISTORY, prompt_suffix=suffix))


def slow_pairs(model: SpeederForCausalLM, histories) -> np.ndarray:
    """What is added to the scores, by its definition, item by item: `(n, I)` float64."""
    table, config = model.item_pairs.pairs.toarray().astype(np.float64), model.item_pairs.config
    added = np.zeros((len(histories), len(model.catalogue)))
    for row, history in enumerate(histories):
        read = list(history)[-model.config.max_history :][-config.pair_history :]
        for age, item in enumerate(reversed(read)):
            if item < len(table):
                added[row, : len(table)] += config.pair_decay**age * table[item]
    return model.config.pair_weight * added


@torch.no_grad()
def dense_scores(model: SpeederForCausalLM, histories) -> np.ndarray:
    states = model.last_states(**pack_batch([model.sequence(list(history)) for history in histories]))
    return (model.item_queries(states).double() @ model.scoring_table().double().T).numpy()


def slow_scores(model: SpeederForCausalLM, histories) -> np.ndarray:
    return dense_scores(model, histories) + slow_pairs(model, histories)


def near(found, expected: np.ndarray) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected), atol=2e-4, rtol=1e-4
    )


def check_ranking(found, scores: np.ndarray, hidden, k: int, allowed=None) -> None:
    """Rank for rank the order of the scores, and the scores."""
    for row, items in enumerate(found):
        left = scores[row].copy()
        left[list(hidden[row])] = -np.inf
        if allowed is not None:
            left[np.setdiff1d(np.arange(len(left)), allowed)] = -np.inf
        best = np.argsort(-left, kind="stable")[:k]
        near([item.score for item in items], left[best])
        assert len({item.item for item in items}) == k
        near([left[item.item] for item in items], left[best])  # the same order, but for rounding


@settings(max_examples=10, deadline=None)
@given(histories=many, tokens_per_item=st.sampled_from([1, 2]))
def test_scores_are_the_dense_sum(histories, tokens_per_item):
    model = fixed_model(tokens_per_item)
    near(model.score(histories, batch_size=2), slow_scores(model, histories))


@settings(max_examples=15, deadline=None)
@given(
    histories=many,
    most=st.integers(1, 6),
    seen=st.booleans(),
    allow=st.none() | st.sets(st.integers(0, ITEMS - 1), min_size=8).map(sorted),
    deny=st.sets(st.integers(0, ITEMS - 1), max_size=2),
)
def test_recommendations_are_those_of_the_dense_sum(histories, most, seen, allow, deny):
    model = fixed_model()
    hidden = [{*(history if seen else ()), *deny} for history in histories]
    k = min(most, *(len({*(range(ITEMS) if allow is None else allow)} - row) for row in hidden))
    if k == 0:
        return
    found = model.recommend(histories, k=k, exclude_seen=seen, allow=allow, deny=sorted(deny))
    check_ranking(found, slow_scores(model, histories), hidden, k, allow)


def test_more_items_than_have_pairs_and_histories_without_any():
    model = fixed_model()
    histories = [[15, 16], [2, 2, 2], [19]]
    assert model.pair_scores(histories).nnz and not model.pair_scores([[15, 16]]).nnz
    found = model.recommend(histories, k=ITEMS, exclude_seen=False)
    check_ranking(found, slow_scores(model, histories), [()] * 3, ITEMS)
    near(model.score([[15, 16]]), dense_scores(model, [[15, 16]]))


def test_equal_scores_keep_the_order_of_items():
    queries = Queries(torch.zeros(1, 4), fixed_model().item_pairs.rows([[15]]))
    added = queries.added.tolil()
    added[0, [9, 3]] = 1.0
    queries = Queries(queries.dense, added.tocsr())
    vectors = torch.zeros(ITEMS, 4)
    found = fixed_model().best_items(queries, vectors, 5, [[0]])
    assert [item.item for item in found[0]] == [3, 9, 1, 2, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_low_precision_model_merges_what_it_searched(dtype):
    model = paired(tiny_model(max_history=MAX_HISTORY)).to(dtype)
    histories = [[1, 2], [15], [3, 3, 9]]
    vectors = model.scoring_table().detach().double().numpy()
    queries = Queries.cat(model.user_states(histories))
    scores = queries.dense.to(dtype).double().numpy() @ vectors.T + slow_pairs(model, histories)
    check_ranking(model.recommend(histories, k=8, exclude_seen=False), scores, [()] * 3, 8)


@settings(max_examples=10, deadline=None)
@given(visits=st.lists(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=7), min_size=1, max_size=3))
def test_returning_users_are_scored_by_their_whole_history(visits):
    model = fixed_model()
    sessions, history = UserSessions(model, 500), []
    for new in visits:
        history += new
        near(sessions.score({"ann": new}), slow_scores(model, [history]))
        k = min(3, ITEMS - len({*history}))
        found = sessions.recommend({"ann": []}, k=k)
        check_ranking([found["ann"]], slow_scores(model, [history]), [history], k)


def test_the_server_ranks_by_the_dense_sum():
    model = fixed_model()
    jobs = [RecommendJob((1, 2), 5, True), RecommendJob((3, 3, 7), 3, False), RecommendJob((18,), 19, True)]
    found = Engine(model).recommend(jobs)
    for job, items in zip(jobs, found, strict=True):
        check_ranking([items], slow_scores(model, [job.history]), [job.hidden()], job.k)


def test_explanations_count_the_pairs_of_each_entry():
    model, history, items = fixed_model(), [1, 7, 2, 2, 3], [3, 4, 9, 17]
    scores, changes = leave_one_out(model, history, items)
    whole = slow_scores(model, [history])[0, items]
    near(scores, whole)
    without = [history[:j] + history[j + 1 :] for j in range(len(history))]
    near(changes, whole - slow_scores(model, without)[:, items])
    assert explain(model, history, items)[0].score == pytest.approx(whole[0], abs=1e-3)


def masked_ranks(scores: np.ndarray, histories, targets) -> list[int]:
    ranks = []
    for row, history, target in zip(scores, histories, targets, strict=True):
        others = np.setdiff1d(np.arange(len(row)), [*history, target])
        ranks.append(1 + int((row[others] >= row[target]).sum()))
    return ranks


def test_streamed_ranks_and_those_by_weight_are_those_of_the_dense_sum():
    model = fixed_model()
    histories, targets = [[1, 2], [3], [7, 7, 1], [15, 2]], np.array([4, 2, 9, 16])
    expected = masked_ranks(slow_scores(model, histories), histories, targets)
    assert streamed_ranks(model, histories, targets).tolist() == expected
    weights = [0.0, 0.5, WEIGHT, 100.0]
    found = ranks_by_weight(model, histories, targets, weights)
    dense, pairs = dense_scores(model, histories), slow_pairs(model, histories) / WEIGHT
    for row, weight in enumerate(weights):
        assert found[row].tolist() == masked_ranks(dense + weight * pairs, histories, targets)
    assert model.config.pair_weight == WEIGHT and model.item_store is None


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TokenShards:
    return write_token_shards(fixed_model(), tmp_path_factory.mktemp("pairs") / "shards", shard_items=7)


@pytest.mark.parametrize("kind", ["shards", "exact"])
def test_stores_merge_exactly(kind, shards, tmp_path):
    store = shards
    if kind == "exact":
        pytest.importorskip("faiss")
        store = build_index(shards, tmp_path / "index", "exact")
    model = paired(tiny_model(max_history=MAX_HISTORY))
    model.use_item_store(store)
    histories = [[1, 2], [15, 16], [3, 3, 7, 1], [2]]
    scores = slow_scores(fixed_model(), histories)
    near(model.score(histories), scores)
    check_ranking(model.recommend(histories, k=6), scores, histories, 6)
    allow = [2, 3, 4, 5, 15, 17, 18]
    check_ranking(model.recommend(histories, k=3, allow=allow), scores, histories, 3, allow)
    near(leave_one_out(model, [1, 2], [3, 4])[0], scores[0, [3, 4]])
    queries = measuring_queries(model, tmp_path, 5)  # of single items, without a run's data
    near(store.topk(queries, 3)[0], -np.sort(-slow_scores(fixed_model(), [[0], [4], [8], [12], [16]]))[:, :3])
    found, items = store.topk(Queries.cat(model.user_states(histories)), 6, histories)
    near(found, np.take_along_axis(scores, items.numpy(), axis=1))
    if kind == "exact":
        assert recall_at_k(store, queries, 3) == 1.0
    assert "ms a query" in compared({kind: store}, queries, 3)[0]


# ---- forward and generate -----------------------------------------------------------------------------------


def logits_of_prefixes(model, history) -> np.ndarray:
    """The logits of all items after each item of a history."""
    return slow_scores(model, [history[: end + 1] for end in range(len(history))])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens_per_item", [1, 2])
def test_logits_of_padded_and_packed_rows_have_the_pairs_up_to_each_position(side, tokens_per_item):
    model = paired(tiny_model(max_history=MAX_HISTORY, tokens_per_item=tokens_per_item))
    histories = [[1, 2, 2, 7], [3], [15, 3, 10]]
    sequences = [model.sequence(history) for history in histories]
    expected = [logits_of_prefixes(model, history) for history in histories]
    with torch.no_grad():
        padded = model(**pad_batch(sequences, 0, side)).logits[..., TEXT:]
        packed = model(**pack_batch(sequences)).logits[0, :, TEXT:]
    ends = np.cumsum([len(sequence.ids) for sequence in sequences])
    for row, rows in enumerate(expected):
        length = len(sequences[row].ids)
        own = padded[row, -length:] if side == "left" else padded[row, :length]
        near(own[tokens_per_item - 1 :: tokens_per_item], rows)
        own = packed[ends[row] - length : ends[row]]
        near(own[tokens_per_item - 1 :: tokens_per_item], rows)
    with torch.no_grad():
        last = model(**pad_batch(sequences, 0, "left"), logits_to_keep=1).logits[:, 0, TEXT:]
    near(last, np.stack([rows[-1] for rows in expected]))


def test_a_cache_continues_with_the_past_ids():
    model, history = fixed_model(), [1, 2, 3, 7, 7]
    batch = pad_batch([model.sequence(history)], 0)
    ids, ranks = batch["input_ids"], batch["ranks"]
    with torch.no_grad():
        first = model(ids[:, :3], ranks=ranks[:, :3], use_cache=True)
        cache = getattr(first, "cache", None) or first.past_key_values
        for past in (None, ids[:, :2]):
            with pytest.raises(ValueError, match=r"past_ids: expected \(1, 3\)"):
                model(ids[:, 3:], past_key_values=cache, ranks=ranks, past_ids=past)
        with pytest.raises(ValueError, match=r"past_ids: expected ids in 0\.\.83, got 0\.\.99"):
            wrong = torch.tensor([[0, 5, 99]])
            model(ids[:, 3:], past_key_values=cache, ranks=ranks, past_ids=wrong)
        got = model(ids[:, 3:], past_key_values=cache, ranks=ranks, past_ids=ids[:, :3]).logits
    near(got[0, :, TEXT:], logits_of_prefixes(model, history)[3:])


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_follows_the_dense_sum(beams):
    model, history = fixed_model(), [1, 2]
    batch = pad_batch([model.sequence(history), model.sequence([15])], 0)
    found = model.generate(**batch, max_new_tokens=3, num_beams=beams, do_sample=False, eos_token_id=-1)
    whole = model.generate(
        **batch, max_new_tokens=3, num_beams=beams, do_sample=False, eos_token_id=-1, use_cache=False
    )
    assert found.tolist() == whole.tolist()
    if beams == 1:
        for row, known in enumerate([history, [15]]):
            for token in found[row, batch["input_ids"].shape[1] :].tolist():
                assert token - TEXT == slow_scores(model, [known])[0].argmax()
                known = [*known, token - TEXT]


def test_the_loss_is_that_of_the_logits_in_evaluation_and_without_pairs_in_training():
    model = paired(tiny_model(max_history=MAX_HISTORY))
    batch = pack_batch([model.sequence([1, 2, 3], 4), model.sequence([9], 8)], with_labels=True)
    out = model(**batch)
    labels = F.pad(batch["labels"][0, 1:], (0, 1), value=-100)
    labels[3] = -100  # the end of the first sequence
    logits = out.logits[0, labels >= 0, TEXT:]
    expected = F.cross_entropy(logits, labels[labels >= 0] - TEXT)
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert model.item_head.weight.grad.abs().sum() > 0
    for mode in ("train", "weight 0"):
        model.zero_grad()
        model.config.pair_weight = 0.0 if mode == "weight 0" else WEIGHT
        model.train(mode == "train")
        plain = model(**batch).loss
        model.config.pair_weight = 0.0
        torch.testing.assert_close(plain, model(**batch).loss)
        assert abs(float(plain.detach()) - float(out.loss.detach())) > 0.01


# ---- what belongs to it -------------------------------------------------------------------------------------


def test_a_weight_of_zero_changes_nothing_and_looks_nothing_up():
    plain, model = tiny_model(max_history=MAX_HISTORY), paired(tiny_model(max_history=MAX_HISTORY), 0.0)
    histories = [[1, 2], [3]]
    assert model.pair_scores(histories) is None
    assert torch.equal(plain.score(histories), model.score(histories))
    assert plain.recommend(histories, k=5) == model.recommend(histories, k=5)
    batch = pad_batch([model.sequence(history) for history in histories], 0)
    assert torch.equal(plain(**batch).logits, model(**batch).logits)


def test_a_weight_without_pairs_is_an_error():
    model = tiny_model(pair_weight=1.0)
    batch = pack_batch([model.sequence([1, 2])])
    for call in (lambda: model.score([[1]]), lambda: model.recommend([[1]]), lambda: model(**batch)):
        with pytest.raises(SpeederError, match=r"pair_weight: expected 0 without item pairs, got 1\.0"):
            call()
    for wrong in (-1.0, float("nan"), True):
        with pytest.raises(ValueError, match="pair_weight"):
            tiny_model(pair_weight=wrong)


def test_pairs_are_saved_with_the_model_and_checked(tmp_path):
    model, histories = paired(tiny_model()), [[1, 2, 3], [15]]
    model.save_pretrained(tmp_path / "model")
    again = SpeederForCausalLM.from_pretrained(tmp_path / "model")
    assert again.item_pairs.config == ItemPairsConfig()
    assert again.item_pairs.training_hash == training_hash(SEQUENCES)
    assert torch.equal(again.score(histories), model.score(histories))
    record = json.loads((tmp_path / "model" / FILES[1]).read_text())
    (tmp_path / "model" / FILES[1]).write_text(json.dumps(record | {"tensors": "0" * 64}))
    with pytest.raises(
        SpeederError, match=r"no readable item pairs: item_pairs\.safetensors is not the file"
    ):
        SpeederForCausalLM.from_pretrained(tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "model")  # without pairs: those of the other are gone
    assert SpeederForCausalLM.from_pretrained(tmp_path / "model").item_pairs is None
    model.save_pretrained(tmp_path / "checkpoint", save_catalogue=False)
    assert not (tmp_path / "checkpoint" / FILES[0]).exists()


def test_another_catalogue_is_refused_and_added_items_have_no_pairs(tmp_path):
    model = paired(tiny_model())
    model.save_pretrained(tmp_path / "model")
    old = model.catalogue
    turned = old.select([1, 0, *range(2, ITEMS)])
    ids = [f"other{number}" for number in range(ITEMS)]
    other = ItemCatalogue(ids, old.titles, features=old.features, present=old.present)
    for wrong in (other, turned):
        with pytest.raises(SpeederError, match="20 items whose pairs"):
            model.set_catalogue(wrong)
        with pytest.raises(SpeederError, match="20 items whose pairs"):
            SpeederForCausalLM.from_pretrained(tmp_path / "model", catalogue=wrong)
    new = tiny_catalogue(3, seed=4)
    model.add_items(ItemCatalogue(["x", "y", "z"], features=new.features, present=new.present))
    histories = [[1, 21, 2], [22]]
    near(model.score(histories), slow_scores(model, histories))
    check_ranking(model.recommend(histories, k=20), slow_scores(model, histories), histories, 20)
    model.save_pretrained(tmp_path / "grown")
    again = SpeederForCausalLM.from_pretrained(tmp_path / "grown")
    assert torch.equal(again.score(histories), model.score(histories))


def test_pairs_of_another_training_part_are_a_leak():
    users, items = np.repeat(np.arange(4), 5), np.arange(20)
    split = LeaveOneOut(Interactions(users, items, np.arange(20), ["a", "b", "c", "d"]))
    model = tiny_model()
    model.set_item_pairs(split.training())
    model.config.pair_weight = 1.0
    evaluate(model, split, resamples=1)
    model.set_item_pairs(split.histories("test"))
    with pytest.raises(LeakError, match="SpeederForCausalLM's item pairs: fitted on interactions"):
        evaluate(model, split, resamples=1)


def test_evaluation_and_validation_rank_by_the_dense_sum():
    users, items = np.repeat(np.arange(4), 5), np.tile(np.arange(10), 2)
    split = LeaveOneOut(Interactions(users, items, np.arange(20), ["a", "b", "c", "d"]))
    for negatives in ("full", "sampled"):
        model = tiny_model(negatives=negatives)
        model.set_item_pairs(split.training())
        model.config.pair_weight = WEIGHT
        histories, targets = split.histories("validation"), split.targets("validation")
        expected = masked_ranks(slow_scores(model, histories), histories, targets)
        gains = [1 / np.log2(rank + 1) if rank <= 10 else 0.0 for rank in expected]
        assert model.validation_metrics(split)["NDCG@10"] == pytest.approx(np.mean(gains))


def test_wrong_pairs_are_refused():
    pairs = fixed_model().item_pairs
    negative = pairs.pairs.copy()
    negative.data[0] = -1
    how = {"items_hash": "", "training_hash": ""}
    with pytest.raises(ValueError, match="at least 0"):
        ItemPairs(ItemPairsConfig(), negative, **how)
    with pytest.raises(ValueError, match=r"expected \(I, I\) float32"):
        ItemPairs(ItemPairsConfig(), pairs.pairs[:3], **how)
    with pytest.raises(IndexError, match=r"histories: expected items in 0\.\.19, got 20\.\.20"):
        pairs.rows([[20]])
