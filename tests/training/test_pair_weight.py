"""A recipe with `pairs: true`: counted on the training part, weighed on validation items, the same after any stop."""

import json

import pytest
import torch

import speeder.training.train as training
from speeder.data import PreparedData
from speeder.data.fingerprints import training_hash
from speeder.errors import SpeederError
from speeder.evaluation.evaluate import evaluate
from speeder.model.modeling import SpeederForCausalLM
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.load import recipe_from_dict
from speeder.training.pair_weight import STEPS, choose_pair_weight
from speeder.training.train import train
from tests.model.worlds import save_tiny_backbone


@pytest.fixture(scope="module")
def data() -> PreparedData:
    world = synthetic_world(num_users=40, history=7)
    return PreparedData(world.catalogue, world.interactions, world.manifest)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    backbone = save_tiny_backbone(tmp_path_factory.mktemp("pairs") / "backbone")
    stages = [{"name": "only", "open": ["text"], "steps": 2}]
    settings = {"backbone": str(backbone), "precision": "fp32", "batch_users": 16, "pairs": True}
    return recipe_from_dict(settings | {"stages": stages})


def scores(model) -> torch.Tensor:
    return model.score([[1, 2], [3, 4, 5]])


class Stop(Exception):
    pass


def test_a_run_ends_with_the_best_weight_of_the_grid_and_survives_any_stop(
    recipe, data, tmp_path, monkeypatch
):
    model = train(recipe, data, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "state.json").read_text())["pairs"]
    assert model.item_pairs.training_hash == training_hash(data.split.training())
    assert model.config.pair_weight == record["pair_weight"] > 0
    scale = float(model.logit_scale.detach().exp())
    assert [each["pair_weight"] for each in record["tried"]] == [step * scale for step in STEPS]
    for each in record["tried"]:  # by the usual evaluation, one weight at a time
        model.config.pair_weight = each["pair_weight"]
        found = evaluate(model, data.split, "validation", resamples=1).mean("NDCG@10")
        assert found == pytest.approx(each["NDCG@10"], abs=1e-9)
    model.config.pair_weight = record["pair_weight"]
    best = max(record["tried"], key=lambda each: each["NDCG@10"])
    assert best["pair_weight"] == record["pair_weight"] and best["NDCG@10"] > record["tried"][0]["NDCG@10"]
    saved = SpeederForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert saved.config.pair_weight == record["pair_weight"] and torch.equal(scores(saved), scores(model))

    # stopped before the choice, between the choice and the model's save, and after both
    def stop(*arguments):
        raise Stop

    for where in ("choose_pair_weight", "finish_stage", "on_stage"):
        run = tmp_path / where
        with monkeypatch.context() as patch, pytest.raises(Stop):
            if where != "on_stage":
                patch.setattr(training, where, stop)
            train(recipe, data, run, on_stage=stop)
        again = train(recipe, data, run, resume=True)
        assert again.config.pair_weight == record["pair_weight"]
        assert torch.equal(scores(again), scores(model))
        assert json.loads((run / "state.json").read_text())["pairs"] == record


def test_among_equals_the_smallest_weight_is_chosen(recipe, data, monkeypatch):
    model = SpeederForCausalLM.from_backbone(recipe.backbone, data.catalogue)
    with pytest.raises(SpeederError, match="item pairs"):
        choose_pair_weight(model, data.split)
    model.set_item_pairs([[0]])  # no pair at all
    assert choose_pair_weight(model, data.split)["pair_weight"] == 0.0


def test_the_key_is_written_only_where_it_is_used_and_checked(recipe):
    plain = recipe.to_dict()
    assert plain["pairs"] is True and recipe_from_dict(plain).pairs
    assert "pairs" not in recipe_from_dict(plain | {"pairs": False}).to_dict()
    with pytest.raises(SpeederError, match="model: pair_weight: expected none"):
        recipe_from_dict(plain | {"model": {"pair_weight": 3.0}})
    with pytest.raises(SpeederError, match="pairs: expected false for the baseline 'text-prompt'"):
        recipe_from_dict(plain | {"baseline": "text-prompt"})
    with pytest.raises(SpeederError, match="pairs: expected true or false"):
        recipe_from_dict(plain | {"pairs": "yes"})
