"""Pictures are written whole, show what they are given, and refuse nothing-to-show."""

import numpy as np
import pytest
from PIL import Image

from speeder.evaluation.result import Evaluation
from speeder.studies import charts

CURVES = {
    "text": {
        "loss": [(step, 7 - step / 100) for step in range(0, 200, 5)],
        "NDCG@10": [(100, 0.02), (200, 0.04)],
    },
    "+image": {"loss": [(step, 5 - step / 500) for step in range(200, 300, 5)], "NDCG@10": [(300, 0.06)]},
    "joint": {"loss": [(step, 4.4) for step in range(300, 420, 5)]},
}
GATES = {"text": [(0, 1.0), (200, 0.7)], "image": [(0, 0.0), (200, 0.3)]}


def evaluation(seed):
    rng = np.random.default_rng(seed)
    ranks = {seen: rng.geometric(0.03, 200) for seen in ("masked", "allowed")}
    per_user = rng.integers(1, 50, (4, 200))
    return Evaluation("test", "0" * 64, 9999, *per_user, ranks=ranks, resamples=50)


DRAWINGS = {
    "training": lambda path: charts.plot_training(CURVES, path),
    "gates": lambda path: charts.plot_gates(GATES, path, {"text": (0, 100), "+image": (100, 200)}),
    "distribution": lambda path: charts.plot_gate_distribution({"text": np.linspace(0.2, 0.9, 50)}, path),
    "comparison": lambda path: charts.plot_comparison(
        {"SASRec": evaluation(0), "Popularity": evaluation(1)}, path
    ),
}


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS.keys())
def test_a_picture_is_a_whole_png_that_is_the_same_again(draw, tmp_path):
    first, second = tmp_path / "deep" / "first.png", tmp_path / "second.png"
    draw(first)
    draw(second)
    picture = pixels(first)
    assert picture.shape[0] > 300 and picture.shape[1] > 300
    assert (picture < 128).any() and first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["first.png", "second.png"]


def test_what_is_shown_depends_on_what_is_given(tmp_path):
    path = tmp_path / "picture.png"
    shown = []
    for metric in ("NDCG@10", "MRR"):
        charts.plot_comparison({"SASRec": evaluation(0)}, path, metric)
        shown.append(path.read_bytes())
    for last in (0.3, 0.9):
        charts.plot_gates({"text": [(0, 0.5), (10, last)]}, path)
        shown.append(path.read_bytes())
    assert len(set(shown)) == 4


def test_an_error_leaves_the_earlier_picture(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    charts.plot_gates(GATES, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="expected one of HR@5"):
        charts.plot_comparison({"SASRec": evaluation(0)}, path, "accuracy")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        charts.plot_comparison({"SASRec": evaluation(0)}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: charts.plot_training({}, path),
        lambda path: charts.plot_training({"text": {"NDCG@10": [(1, 0.1)]}}, path),
        lambda path: charts.plot_training({"text": {"loss": [(1, 2.0)], "HR@10": [(1, 0.1)]}}, path),
        lambda path: charts.plot_gates({}, path),
        lambda path: charts.plot_gates({"text": []}, path),
        lambda path: charts.plot_gate_distribution({}, path),
        lambda path: charts.plot_gate_distribution({"text": []}, path),
        lambda path: charts.plot_comparison({}, path),
    ],
)
def test_nothing_to_show_is_an_error(draw, tmp_path):
    with pytest.raises(ValueError, match=r"expected|must have"):
        draw(tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())
