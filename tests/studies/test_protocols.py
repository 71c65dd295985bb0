"""The protocols over candidates: ranks, AUC and VHR@1 by their definitions, titles matched, tables, one checkpoint."""

import json

import numpy as np
import pytest
import torch
from torchmetrics.retrieval import RetrievalAUROC, RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG

from speeder.baselines import Popularity
from speeder.data.fingerprints import training_hash
from speeder.data.interactions import Interactions, LeaveOneOut
from speeder.errors import SpeederError
from speeder.evaluation.candidates import Candidates
from speeder.evaluation.evaluate import evaluate, evaluate_candidates, evaluate_titles
from speeder.evaluation.leaks import LeakError
from speeder.evaluation.result import PROTOCOLS, Evaluation
from speeder.evaluation.tables import comparison_latex, comparison_table
from speeder.evaluation.written_titles import named_candidate, normalise_title

NUM_ITEMS = 50


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(2)
    sequences = [rng.permutation(NUM_ITEMS)[: rng.integers(3, 12)] for _ in range(120)]
    sequences[7][-1] = sequences[7][0]  # one target that its history holds
    users = np.repeat(np.arange(120), [len(row) for row in sequences])
    items = np.concatenate(sequences)
    return LeaveOneOut(Interactions(users, items, np.arange(len(items)), [f"u{u}" for u in range(120)]))


@pytest.fixture(scope="module")
def candidates(split):
    return Candidates.draw(split, "test", NUM_ITEMS, 20)


class Scores:
    """Fixed scores by a history's last item: few values, so that ties are common, or many."""

    def __init__(self, levels):
        table = np.random.default_rng(0).integers(1, levels, (NUM_ITEMS, NUM_ITEMS))
        self.table = torch.from_numpy(table).float()

    def score(self, histories):
        return self.table[[int(history[-1]) for history in histories]]


class OneByOne(Scores):
    """The same, but for candidates alone, as a yes/no model gives them."""

    def score_candidates(self, histories, items):
        return super().score(histories).gather(1, torch.from_numpy(items))

    def score(self, histories):
        raise AssertionError("the whole catalogue is not scored")


@pytest.mark.parametrize("kind", [Scores, OneByOne])
def test_metrics_over_candidates_agree_with_torchmetrics(split, candidates, kind):
    result = evaluate_candidates(
        kind(10**6), split, candidates, "sampled", num_items=NUM_ITEMS, batch_size=33
    )
    assert result.metric_names == PROTOCOLS["sampled"] and result.num_ranked == 21
    targets = split.targets("test")
    listed = candidates.listed(targets)
    scores = torch.stack(
        [Scores(10**6).score([h])[0, row] for h, row in zip(split.histories("test"), listed, strict=True)]
    )
    scores /= 10**6  # torchmetrics' AUC takes scores beyond 1 for logits, and squashes them
    relevant = torch.from_numpy(listed == targets[:, None])
    users = torch.arange(len(targets))[:, None].expand_as(scores)
    theirs = {"MRR": RetrievalMRR(), "AUC": RetrievalAUROC()}
    theirs |= {f"HR@{k}": RetrievalHitRate(top_k=k) for k in (3, 5, 10)}
    theirs |= {f"NDCG@{k}": RetrievalNormalizedDCG(top_k=k) for k in (3, 5, 10)}
    assert set(theirs) == set(PROTOCOLS["sampled"])
    for name, metric in theirs.items():
        expected = metric(scores.flatten(), relevant.flatten(), indexes=users.flatten()).item()
        assert result.mean(name, "allowed") == pytest.approx(expected, abs=1e-6), name


def test_ties_are_against_the_target_but_half_in_auc(split, candidates):
    constant = evaluate_candidates(Scores(2), split, candidates, "sampled", num_items=NUM_ITEMS)
    assert set(constant.ranks["allowed"]) == {21}
    assert constant.mean("AUC", "allowed") == 0.5
    few = evaluate_candidates(Scores(4), split, candidates, "sampled", num_items=NUM_ITEMS)
    table, targets = Scores(4).table.numpy(), split.targets("test")
    for user, history in enumerate(split.histories("test")):
        own, negatives = table[history[-1], targets[user]], table[history[-1], candidates.negatives[user]]
        assert few.ranks["allowed"][user] == 1 + (negatives >= own).sum()
        by_pairs = ((own > negatives) + 0.5 * (own == negatives)).mean()
        assert few.values("AUC", "allowed")[user] == pytest.approx(by_pairs)


def test_a_target_in_its_own_history_is_missed_where_seen_items_are_masked(split, candidates):
    result = evaluate_candidates(Scores(10**6), split, candidates, "sampled", num_items=NUM_ITEMS)
    assert result.ranks["masked"][7] == 21 and result.values("AUC", "masked")[7] == 0
    others = np.arange(len(result)) != 7
    assert np.array_equal(result.ranks["masked"][others], result.ranks["allowed"][others])


def test_a_ranking_is_always_valid(split, candidates):
    result = evaluate_candidates(Scores(10**6), split, candidates, "vhr", num_items=NUM_ITEMS)
    assert result.mean("ValidRatio") == 1
    assert result.mean("VHR@1") == result.mean("HR@1") == (result.ranks["masked"] == 1).mean()


TITLES = [f"Film {'abcdefghij'[i // 10]}{'klmnopqrst'[i % 10]}" for i in range(NUM_ITEMS)]


class Writer:
    """Writes the target's title for some users, another candidate's, two at once, or nonsense for the others."""

    def __init__(self, split):
        self.next_item = {
            tuple(h): t for h, t in zip(split.histories("test"), split.targets("test"), strict=True)
        }

    def generate_titles(self, histories, candidates):
        texts = []
        for history, row in zip(histories, candidates, strict=True):
            target = self.next_item[tuple(history)]
            other = next(int(item) for item in row if item != target)
            text = [TITLES[target], TITLES[other], f"{TITLES[target]}, {TITLES[other]}", "none of these"]
            texts.append(text[history[0] % 4] + "\nFilm after Film")
        return texts


def test_titles_that_are_written_give_vhr(split, candidates):
    result = evaluate_titles(Writer(split), split, candidates, TITLES, batch_size=50)
    kind = np.array([history[0] % 4 for history in split.histories("test")])
    assert np.array_equal(result.valid, kind < 2)
    assert result.mean("ValidRatio") == (kind < 2).mean()
    assert result.mean("HR@1", "allowed") == pytest.approx((kind == 0).sum() / (kind < 2).sum())
    assert result.mean("VHR@1", "allowed") == pytest.approx((kind == 0).mean())
    interval = result.metrics["allowed"]["HR@1"]
    assert interval.low < interval.value < interval.high
    assert interval.value == pytest.approx(result.mean("HR@1", "allowed"))
    product = result.mean("ValidRatio", "allowed") * result.mean("HR@1", "allowed")
    assert result.mean("VHR@1", "allowed") == pytest.approx(product)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("Alien", 0),
        ("ALIEN!", 0),
        ("  Alien 3 \nAmelie", 1),  # the first line counts, and the longer title is meant
        ("Amélie", 2),
        ('I think "Amelie" fits best.', 2),
        ("Alien, Amelie", None),
        ("Alien 3 and then Alien", 1),
        ("Aliens", None),
        ("Twin", None),  # two candidates have this title
        ("", None),
        ("?!", None),
    ],
)
def test_a_text_names_a_candidate(text, place):
    assert named_candidate(text, ["Alien", "Alien 3", "Amelie", "Twin", "Twin", "!!!", ""]) == place


def test_titles_are_compared_by_words():
    assert normalise_title("  L'Été_à Paris:  Part II ") == "lete a paris part ii"


def test_saved_and_loaded_is_the_same(split, candidates, tmp_path):
    ranked = evaluate_candidates(Scores(5), split, candidates, "sampled", num_items=NUM_ITEMS, resamples=20)
    written = evaluate_titles(Writer(split), split, candidates, TITLES, resamples=20)
    for result in (ranked, written):
        result.save(tmp_path / "result.json")
        loaded = Evaluation.load(tmp_path / "result.json")
        assert json.dumps(loaded.to_dict()) == json.dumps(result.to_dict())
        assert loaded.candidates_hash == candidates.hash()


def test_tables_tell_the_candidates_and_refuse_others(split, candidates):
    ranked = evaluate_candidates(
        Popularity(split.training(), NUM_ITEMS), split, candidates, "vhr", num_items=NUM_ITEMS, resamples=20
    )
    written = evaluate_titles(Writer(split), split, candidates, TITLES, resamples=20)
    table = comparison_table({"popularity": ranked, "written": written})
    assert candidates.hash() in table and split.hash() in table and "20 uniform negatives" in table
    assert "| | VHR@1 | ValidRatio | HR@1 |" in table and "**VHR@1 by history length" in table
    others = Candidates.draw(split, "test", NUM_ITEMS, 20, seed=1)
    with pytest.raises(ValueError, match="candidates_hash"):
        comparison_table(
            {
                "a": ranked,
                "b": evaluate_candidates(Scores(5), split, others, "vhr", num_items=NUM_ITEMS, resamples=5),
            }
        )
    with pytest.raises(ValueError, match="protocol"):
        comparison_table({"a": ranked, "b": evaluate(Scores(5), split, resamples=5)})


def test_one_table_where_masking_cannot_differ(split):
    kept = [u for u in range(120) if u != 7]
    sequences = [np.append(h, t) for h, t in zip(split.histories("test"), split.targets("test"), strict=True)]
    users = np.repeat(np.arange(119), [len(sequences[u]) for u in kept])
    items = np.concatenate([sequences[u] for u in kept])
    clean = LeaveOneOut(Interactions(users, items, np.arange(len(items)), [f"u{u}" for u in range(119)]))
    drawn = Candidates.draw(clean, "validation", NUM_ITEMS, 19)
    result = evaluate_candidates(Scores(5), clean, drawn, "vhr", num_items=NUM_ITEMS, resamples=5)
    assert comparison_table({"a": result}).count("| | VHR@1") == 1


def test_latex_has_every_cell_and_escapes(split, candidates):
    evaluations = {
        "a_b & c": evaluate(Scores(9), split, resamples=20),
        "d": evaluate(Scores(99), split, resamples=20),
    }
    text = comparison_latex(evaluations)
    assert "a\\_b \\& c" in text and text.count("\\begin{tabular}") == text.count("\\bottomrule") == 4
    for result in evaluations.values():
        value, low, high = result.metrics["masked"]["NDCG@10"]
        assert f"{value:.4f}" in text and f"[{low:.4f}, {high:.4f}]" in text
    assert "95 \\%" in text and "`" not in text
    rows = [line for line in text.splitlines() if line.rstrip().endswith("\\\\")]
    assert len(rows) == 4 * 3


def test_leaks_and_wrong_input_are_refused(split, candidates):
    model = Scores(5)
    model.training_hash = training_hash(split.histories("test"))
    with pytest.raises(LeakError, match="Scores: fitted on"):
        evaluate_candidates(model, split, candidates, num_items=NUM_ITEMS)
    planted = Candidates.draw(split, "test", NUM_ITEMS, 20)
    planted.negatives[3] = np.sort(planted.negatives[3])
    with pytest.raises(LeakError, match="user 3"):
        evaluate_titles(Writer(split), split, planted, TITLES)
    few = Candidates.draw(split, "test", 40, 20)
    with pytest.raises(LeakError, match="drawn over 40 items"):
        evaluate_candidates(OneByOne(5), split, few, num_items=NUM_ITEMS)
    with pytest.raises(LeakError, match="drawn over 40 items"):
        evaluate_titles(Writer(split), split, few, TITLES)
    with pytest.raises(SpeederError, match="drawn for the split"):
        other = LeaveOneOut(Interactions([0, 0, 0], [1, 2, 3], [0, 1, 2], ["u"]))
        evaluate_candidates(Scores(5), other, candidates, num_items=NUM_ITEMS)
    with pytest.raises(ValueError, match='protocol: expected "vhr" or "sampled"'):
        evaluate_candidates(Scores(5), split, candidates, "full", num_items=NUM_ITEMS)
    with pytest.raises(ValueError, match="AUC needs candidates"):
        evaluate(Scores(5), split, resamples=5).values("AUC")
    broken = Scores(5)
    broken.table[:] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        evaluate_candidates(broken, split, candidates, num_items=NUM_ITEMS)
