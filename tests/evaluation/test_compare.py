"""Paired tests: right on planted differences, right about chance, against scipy-free definitions; and the command."""

import itertools
import json

import numpy as np
import pytest
import torch

from speeder.cli.main import main
from speeder.data.interactions import Interactions, LeaveOneOut
from speeder.evaluation.candidates import Candidates
from speeder.evaluation.compare import compare, holm, sign_flip_p_value
from speeder.evaluation.evaluate import evaluate, evaluate_candidates

NUM_ITEMS = 40


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.permutation(NUM_ITEMS)[:6] for _ in range(200)])
    return LeaveOneOut(
        Interactions(np.repeat(np.arange(200), 6), items, np.arange(1200), [f"u{u}" for u in range(200)])
    )


class Guess:
    """Noise, and a push for the target whose size says how good the model is."""

    def __init__(self, split, push, seed):
        pairs = zip(split.histories("test"), split.targets("test"), strict=True)
        self.next_item = {tuple(history): target for history, target in pairs}
        self.push, self.rng = push, np.random.default_rng(seed)

    def score(self, histories):
        scores = self.rng.normal(size=(len(histories), NUM_ITEMS))
        for row, history in enumerate(histories):
            scores[row, self.next_item[tuple(history)]] += self.push
        return torch.from_numpy(scores)


@pytest.fixture(scope="module")
def evaluations(split):
    models = {"good": (2.0, 0), "equal": (2.0, 1), "bad": (0.5, 2)}
    return {name: evaluate(Guess(split, *args), split, resamples=50) for name, args in models.items()}


def test_planted_differences_are_found_and_chance_is_not(evaluations):
    tests = {
        (test.first, test.second): test for test in compare(evaluations, permutations=2000, resamples=500)
    }
    assert set(tests) == {("good", "equal"), ("good", "bad"), ("equal", "bad")}
    for pair, test in tests.items():
        gap = evaluations[pair[0]].values("NDCG@10") - evaluations[pair[1]].values("NDCG@10")
        assert test.difference.value == pytest.approx(gap.mean())
        assert (test.adjusted < 0.01) == ("bad" in pair)
        assert (test.difference.low > 0) == ("bad" in pair)
        assert test.p_value <= test.adjusted <= 1
    swapped = compare(
        {name: evaluations[name] for name in ("bad", "good")}, permutations=2000, resamples=500
    )[0]
    assert swapped.difference.value == pytest.approx(-tests["good", "bad"].difference.value)


def test_the_p_value_is_that_of_all_exchanges():
    """On few users every exchange can be tried."""
    gaps = np.array([0.5, 0.2, 0.0, -0.1, 0.3, 0.4, 0.15, -0.05])
    sums = [abs(np.dot(signs, gaps)) for signs in itertools.product((1, -1), repeat=len(gaps))]
    exact = np.mean([total >= abs(gaps.sum()) - 1e-12 for total in sums])
    assert sign_flip_p_value(gaps, 100_000) == pytest.approx(exact, abs=0.005)
    assert sign_flip_p_value(np.zeros(5)) == 1.0
    with pytest.raises(ValueError, match="at least 1"):
        sign_flip_p_value(gaps, 0)


def test_p_values_of_pure_chance_are_uniform():
    rng = np.random.default_rng(5)
    values = np.array([sign_flip_p_value(rng.normal(size=60), 199, seed) for seed in range(400)])
    assert abs((values <= 0.05).mean() - 0.05) < 0.035 and abs(values.mean() - 0.5) < 0.05


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_what_cannot_be_compared_is_refused(split, evaluations):
    validation = evaluate(Random(), split, "validation", resamples=5)
    with pytest.raises(ValueError, match="split of 'good' is test, but of 'v' it is validation"):
        compare({"good": evaluations["good"], "v": validation})
    with pytest.raises(ValueError, match="at least two"):
        compare({"good": evaluations["good"]})
    with pytest.raises(ValueError, match="metric: expected one of HR@5"):
        compare(evaluations, "AUC")
    vhr = evaluate_candidates(
        Random(), split, Candidates.draw(split, "test", NUM_ITEMS, 19), num_items=NUM_ITEMS, resamples=5
    )
    with pytest.raises(ValueError, match=r"metric: expected one of VHR@1, ValidRatio, got 'HR@1'"):
        compare({"a": vhr, "b": vhr}, "HR@1")


def test_baselines_stand_in_the_tables_untested(evaluations, split, tmp_path, capsys, caplog):
    """From the first run that has each; not those of another task, nor one that is named as a run."""
    places = [tmp_path / name / "evaluations" / "test" for name in ("good", "bad")]
    for place, name in zip(places, ("good", "bad"), strict=True):
        evaluations[name].save(place / "model.json")
    evaluate(Random(), split, "validation", resamples=5).save(places[0] / "popularity.json")
    evaluations["equal"].save(places[1] / "popularity.json")
    evaluations["equal"].save(places[1] / "neighbours.json")
    evaluations["good"].save(places[0] / "sasrec__cross-entropy_.json")
    (places[1] / "sasrec__cross-entropy_.json").write_text("{")
    runs = [str(tmp_path / "good"), str(tmp_path / "bad")]
    assert main(["compare", *runs, "--out", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert set(content["models"]) == {"good", "bad"} and len(content["tests"]) == 1
    own = content["baselines"]["popularity"]["metrics"]["masked"]["MRR"]["value"]
    assert own == pytest.approx(evaluations["equal"].mean("MRR"))
    order = ["popularity", "neighbours", "SASRec (cross-entropy)", "good", "bad"]
    for table in (capsys.readouterr().out, (tmp_path / "out" / "comparison.tex").read_text()):
        rows = [line.strip().removeprefix("| ") for line in table.splitlines()]
        names = [next((name for name in order if row.startswith(name)), None) for row in rows]
        assert [name for name in names if name][:5] == order
    assert main(["compare", runs[0], str(places[1] / "popularity.json")]) == 0
    assert "no run has evaluated it" not in caplog.text
    (places[0] / "sasrec__cross-entropy_.json").unlink()
    printed = capsys.readouterr().out  # popularity as a run: tested, and no row beside itself
    assert "| good | popularity | +" in printed
    assert printed.count("\n| popularity |") == printed.count("\n| SASRec (cross-entropy) |") == 4
    assert printed.count("\n| neighbours |") == 4
    assert main(["compare", *runs]) == 0
    assert "SASRec (cross-entropy): no run has evaluated it" in caplog.text


class Random:
    def score(self, histories):
        return torch.rand(len(histories), NUM_ITEMS)


def test_the_command_needs_evaluations_alone(evaluations, split, tmp_path, capsys):
    for name in ("good", "bad"):
        evaluations[name].save(tmp_path / name / "evaluations" / "test" / "model.json")
    runs = [str(tmp_path / "good"), str(tmp_path / "bad")]
    assert main(["compare", *runs, "--metric", "HR@10", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "| good | bad | +0." in printed and split.hash() in printed
    assert (tmp_path / "out" / "comparison.md").read_text().strip() == printed.strip()
    assert "\\toprule" in (tmp_path / "out" / "comparison.tex").read_text()
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["tests"][0]["adjusted"] < 0.05 and set(content["models"]) == {"good", "bad"}

    evaluate(Random(), split, "validation", resamples=5).save(tmp_path / "other.json")
    mistakes = {
        "expected a run with the evaluation 'test-vhr'": [*runs, "--protocol", "vhr"],
        "same run was given twice": [runs[0], runs[0]],
        "split of 'good' is test": [runs[0], str(tmp_path / "other.json")],
        "at least two": runs[:1],
        "metric: expected one of": [*runs, "--metric", "AUC"],
        "negatives: expected none with the protocol 'full', got 7": [*runs, "--negatives", "7"],
        "candidates-seed: expected none with the protocol 'full', got 7": [*runs, "--candidates-seed", "7"],
        "not a readable evaluation": [runs[0], str(tmp_path / "out" / "comparison.json")],
    }
    for message, arguments in mistakes.items():
        assert main(["compare", *arguments]) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0], lines
