"""Held-out items: truly absent from all that is trained on, ranked fairly, and every way of leaking them is caught."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from speeder.baselines import Popularity
from speeder.baselines.content import ContentNeighbours
from speeder.cli.main import main
from speeder.data.fingerprints import training_hash
from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.evaluation.cold_ranking import check_cold_items, check_never_saw, evaluate_cold, with_cold_items
from speeder.evaluation.cold_split import ColdItems, hold_out
from speeder.evaluation.leaks import LeakError, check_features
from speeder.evaluation.result import Evaluation
from speeder.model.modeling import SpeederForCausalLM
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.load import bundled_recipe, load_recipe
from speeder.studies.cold_start import make_hold_out
from tests.io.killing import killed_at
from tests.model.worlds import save_tiny_backbone, tiny_backbone


@pytest.fixture(scope="module")
def data():
    world = synthetic_world(num_users=60, history=8)
    made = PreparedData(world.catalogue, world.interactions, world.manifest)
    # as if they were fitted on interactions: a hold-out must not keep them
    fitted = {"made_by": "test", "training_hash": training_hash(made.split.training())}
    return made.with_features("collaborative", torch.randn(len(made.catalogue), 8), **fitted)


@pytest.fixture(scope="module")
def parts(data):
    return hold_out(data, 0.2, seed=3)


@pytest.fixture(scope="module")
def place(data, tmp_path_factory):
    """A folder with prepared data, what is held out of them, and a run trained on the rest, by the commands."""
    folder = tmp_path_factory.mktemp("cold")
    data.save(folder / "data")
    command = ["items", "hold-out", "--data", folder / "data", "--out", folder / "held", "--share", "0.2"]
    assert main([*map(str, command)]) == 0
    save_tiny_backbone(folder / "backbone")
    (folder / "recipe.yaml").write_text(
        f"backbone: {folder / 'backbone'}\nprecision: fp32\nmodel: {{item_embedding: true, cold_dropout: 0.5}}\n"
        "stages:\n  - {name: joint, open: [text, collaborative, item], steps: 2}\n"
    )
    command = ["train", "--data", folder / "held" / "warm", "--recipe", folder / "recipe.yaml"]
    assert main([*map(str, command), "--out", str(folder / "run")]) == 0
    return folder


@pytest.mark.parametrize("seed", range(5))
def test_cold_items_are_in_nothing_that_is_trained_on(data, seed):
    warm, cold = hold_out(data, 0.2, seed)
    ids = set(cold.catalogue.ids)
    assert len(ids) == round(0.2 * len(data.catalogue)) and not ids & set(warm.catalogue.ids)
    assert ids | set(warm.catalogue.ids) == set(data.catalogue.ids)
    known = data.catalogue.ids
    for user, (whole, kept) in enumerate(
        zip(data.interactions.sequences(), warm.interactions.sequences(), strict=True)
    ):
        names = [known[item] for item in whole]
        assert [warm.catalogue.ids[item] for item in kept] == [name for name in names if name not in ids]
        late = [place for place, name in enumerate(names) if name in ids]
        late = [
            p
            for p in late
            if sum(n not in ids for n in names[:p]) >= max(1, len(warm.split.training()[user]))
        ]
        row = np.flatnonzero(cold.users == user)
        assert len(row) == bool(late)
        if late:  # the newest of them, after the training part, and the history is what came before
            assert cold.catalogue.ids[cold.targets[row[0]]] == names[late[-1]]
            before = [name for name in names[: late[-1]] if name not in ids]
            assert [warm.catalogue.ids[item] for item in cold.histories(warm)[row[0]]] == before
    assert "collaborative" not in warm.catalogue.features and "collaborative" not in cold.catalogue.features
    for part, name in ((warm, "text"), (cold, "image")):
        rows = [data.catalogue.index_of(external) for external in part.catalogue.ids]
        assert torch.equal(part.catalogue.features[name], data.catalogue.features[name][rows])


def test_the_draw_follows_from_the_seed(data):
    same, again, other = (hold_out(data, 0.2, seed)[1].catalogue.ids for seed in (1, 1, 2))
    assert same == again != other
    for share in (0.0, 1.0, 0.001):
        with pytest.raises(SpeederError, match="share"):
            hold_out(data, share)


def test_collaborative_features_are_fitted_on_the_warm_training_alone(place):
    warm = PreparedData.load(place / "held" / "warm")
    check_features(warm)
    assert len(warm.catalogue.features["collaborative"]) == len(warm.catalogue)
    record = warm.manifest["encoders"]["collaborative"]
    assert record["training_hash"] == training_hash(warm.split.training())
    cold = ColdItems.beside(place / "held" / "warm", warm)
    assert set(cold.catalogue.features) == {"text", "image"}


def test_saved_and_loaded_is_the_same_and_must_fit(place, data, tmp_path):
    warm, cold = hold_out(data, 0.2)
    cold.save(tmp_path / "held", warm)
    again = ColdItems.beside(tmp_path / "held" / "warm", PreparedData.load(tmp_path / "held" / "warm"))
    assert again.hash(warm) == cold.hash(warm) and again.catalogue.ids == cold.catalogue.ids
    assert again.record == cold.record
    with pytest.raises(SpeederError, match="expected data with held-out items"):
        ColdItems.beside(place / "data", data)
    other, other_cold = hold_out(data, 0.2, seed=1)
    other_cold.save(tmp_path / "other", other)
    (tmp_path / "held" / "cold").rename(tmp_path / "kept")
    (tmp_path / "other" / "cold").rename(tmp_path / "held" / "cold")
    with pytest.raises(SpeederError, match="was held out from other data"):
        ColdItems.beside(tmp_path / "held" / "warm", warm)
    with pytest.raises(SpeederError, match="cannot save to"):
        make_hold_out(place / "data", place)


def test_killed_while_saving_the_earlier_hold_out_stays(data, parts, tmp_path):
    warm, cold = parts
    folder = tmp_path / "held"
    cold.save(folder, warm)
    for touch in (0, 4, 9, 12):
        assert killed_at(touch, lambda: cold.save(folder, warm))
        again = PreparedData.load(folder / "warm")
        assert ColdItems.beside(folder / "warm", again).hash(again) == cold.hash(warm)


class Table:
    """Scores from a function of the user's row."""

    def __init__(self, table):
        self.table, self.row = table, 0

    def score(self, histories):
        self.row += len(histories)
        return self.table[self.row - len(histories) : self.row]


def test_ranks_among_all_items_and_among_the_cold_ones(parts):
    warm, cold = parts
    size, count = len(warm.catalogue) + len(cold.catalogue), len(cold.users)
    scores = torch.rand(count, size)
    found = evaluate_cold(Table(scores), cold, warm, batch_size=7, resamples=5)
    every, alone = found["cold-items"], found["cold-only"]
    for row, history in enumerate(cold.histories(warm)):
        target = len(warm.catalogue) + int(cold.targets[row])
        better = scores[row] >= scores[row, target]
        assert every.ranks["allowed"][row] == better.sum()
        assert alone.ranks["masked"][row] == better[len(warm.catalogue) :].sum()
        better[list(history)] = False
        assert every.ranks["masked"][row] == better.sum()
    assert every.num_items == size and alone.num_ranked == len(cold.catalogue)
    assert not every.target_counts.any() and every.task != alone.task
    assert Evaluation.from_dict(every.to_dict()).metrics == every.metrics
    with pytest.raises(ValueError, match="scores: expected"):
        evaluate_cold(Table(scores[:, 1:]), cold, warm)


def test_popularity_knows_no_cold_item_and_content_does(parts):
    """In this world the next item's topic follows from the last one's: neighbours by content see topics, no order."""
    warm, cold = parts
    catalogue = warm.catalogue.concat(cold.catalogue)
    popular = evaluate_cold(Popularity(warm.split.training(), len(catalogue)), cold, warm)["cold-only"]
    assert set(popular.ranks["masked"]) == {len(cold.catalogue)}, "all tie, and ties count against the target"
    features, present = catalogue.features["text"], catalogue.present["text"].clone()
    present[3] = False
    neighbours = ContentNeighbours(features, present)
    scores = neighbours.score([[1, 2, 3], [5]])
    rows = torch.nn.functional.normalize(features, dim=1)
    wanted = torch.nn.functional.cosine_similarity(rows[1] + rows[2], rows, dim=1)
    wanted[3] = -1.0
    torch.testing.assert_close(scores[0], wanted)
    assert scores[1].argmax() == 5
    assert ContentNeighbours(features, present, max_history=1).score([[1, 5]])[0].argmax() == 5


def test_every_leak_is_caught(parts):
    warm, cold = parts
    check_cold_items(cold, warm)
    short = replace(cold, lengths=np.minimum(cold.lengths, 1))
    with pytest.raises(LeakError, match="are in training, but only 1 precede"):
        check_cold_items(short, warm)
    both = replace(cold, catalogue=warm.catalogue.select(range(len(cold.catalogue))))
    with pytest.raises(LeakError, match="is also in the training catalogue"):
        check_cold_items(both, warm)
    fitted = warm.with_features(
        "collaborative",
        torch.randn(len(warm.catalogue), 4),
        made_by="test",
        training_hash=training_hash(warm.split.training()),
    )
    table = torch.randn(len(cold.catalogue), 4)
    known = replace(cold, catalogue=cold.catalogue.with_features("collaborative", table))
    with pytest.raises(LeakError, match="collaborative features were fitted on interactions"):
        check_cold_items(known, fitted)
    leaking = replace(fitted, manifest=copy.deepcopy(fitted.manifest))
    leaking.manifest["encoders"]["collaborative"]["training_hash"] = training_hash(
        warm.interactions.sequences()
    )
    with pytest.raises(LeakError, match="collaborative features: fitted on"):
        check_cold_items(cold, leaking)


def test_a_model_that_saw_the_cold_items_is_refused(parts, data):
    warm, cold = parts
    model = SpeederForCausalLM.from_backbone(tiny_backbone(), warm.catalogue)
    check_never_saw(model, cold, warm)
    model.config.training_hash = training_hash(data.split.training())
    with pytest.raises(LeakError, match="fitted on"):
        with_cold_items(model, cold, warm)
    model.config.training_hash = training_hash(warm.split.training())
    with_cold_items(model, cold, warm)
    assert len(model.catalogue) == len(data.catalogue)
    with pytest.raises(LeakError, match=f"has {len(cold.catalogue)} of the cold items"):
        check_never_saw(model, cold, warm)
    whole = SpeederForCausalLM.from_backbone(tiny_backbone(), data.catalogue)
    with pytest.raises(LeakError, match="of the cold items"):
        with_cold_items(whole, cold, warm)
    with pytest.raises(SpeederError, match="does not support new items"):
        with_cold_items(Table(None), cold, warm)


def test_the_command_line(place, capsys):
    run = place / "run"
    assert main(["evaluate", str(run), "--protocol", "cold-items"]) == 0
    table = capsys.readouterr().out
    for row in ("popularity", "content neighbours (text)", "neighbours", "Speeder"):
        assert table.count(f"\n{row}") == 2
    assert "all 48 items ranked" in table and "cold items alone ranked" in table
    for kind in ("test-cold-items", "test-cold-only"):
        assert f"results-{kind}.md" in table and "popularity" in (run / f"results-{kind}.md").read_text()
        kept = Evaluation.load(run / "evaluations" / kind / "model.json")
        assert kept.fitted_on == "the split's training part" and (kept.target_counts == 0).all()
    assert main(["evaluate", str(run), "--protocol", "cold-items", "--no-baselines"]) == 0
    assert capsys.readouterr().out.count("popularity") == 0
    for more in (["--split", "validation"], ["--candidates-seed", "3"], ["--negatives", "5"]):
        assert main(["evaluate", str(run), "--protocol", "cold-items", *more]) == 1
    assert main(["items", "hold-out", "--data", str(place / "held"), "--out", str(place / "x")]) == 1
    assert not (place / "x").exists()


def test_the_bundled_recipe_reads_items_as_new_ones(place):
    """Over data whose items have what a new one lacks; and it fits what `items hold-out` leaves, without a note."""
    warm = PreparedData.load(place / "held" / "warm")
    recipe, notes = load_recipe(bundled_recipe("ml-100k-cold")).for_modalities(
        list(warm.catalogue.modalities)
    )
    assert recipe.model["cold_dropout"] > 0 and not notes
    assert recipe.stages[-1].open == ["text", "collaborative", "item"]
