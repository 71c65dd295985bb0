"""The moving average of the weights: its arithmetic, and that a stage is judged by it and ends with it."""

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speeder.data import PreparedData
from speeder.errors import SpeederError
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.load import recipe_from_dict
from speeder.training.ema import WeightAverage
from speeder.training.run_folder import stage_logs
from speeder.training.train import train
from tests.model.worlds import save_tiny_backbone


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.floats(-3, 3), min_size=1, max_size=30), decay=st.floats(0.1, 0.99))
def test_the_average_is_that_of_the_formula(values, decay):
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)  # what is not trained is not averaged
    bias = model.bias.clone()
    average = WeightAverage(model, decay)
    expected = model.weight.detach().double().clone()
    for step, value in enumerate(values, 1):
        torch.nn.init.constant_(model.weight, value)
        average.on_step_end(None, types.SimpleNamespace(global_step=step), None)
        keep = min(decay, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * value
    with average.in_model():
        torch.testing.assert_close(model.weight.detach().double(), expected, atol=1e-5, rtol=1e-5)
    assert (model.weight == torch.tensor(values[-1])).all() and torch.equal(model.bias, bias)
    average.copy_to_model()
    torch.testing.assert_close(model.weight.detach().double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.exact
@pytest.mark.parametrize("keep_best", [True, False])
def test_a_stage_is_judged_by_the_average_and_ends_with_it(tmp_path, keep_best):
    """The same steps with and without an average: same losses, other validation, and a model that is the average."""
    save_tiny_backbone(tmp_path / "backbone")
    world = synthetic_world(num_users=40, history=8)
    data = PreparedData(world.catalogue, world.interactions, world.manifest)
    recipe = {
        "backbone": str(tmp_path / "backbone"),
        "precision": "fp32",
        "batch_users": 16,
        "checkpoint_steps": 6,
        "log_steps": 3,
        "keep_best": keep_best,
        "stages": [{"name": "text", "open": ["text"], "steps": 12}],
    }
    logs, rankings = {}, {}
    for decay in (0.0, 0.9):
        folder = tmp_path / f"run-{decay}"
        model = train(recipe_from_dict(recipe | {"ema_decay": decay}), data, folder)
        logs[decay] = stage_logs(folder)["text"]
        rankings[decay] = model.validation_metrics(data.split)["NDCG@10"]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs.values()]
    assert losses[0] == losses[1]
    seen = {decay: [e["eval_NDCG@10"] for e in log if "eval_NDCG@10" in e] for decay, log in logs.items()}
    assert seen[0.0] != seen[0.9]
    for decay, values in seen.items():
        assert rankings[decay] == pytest.approx(max(values) if keep_best else values[-1])


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(SpeederError, match=r"ema_decay: expected (at least 0|a number below 1), got"):
        recipe_from_dict({"ema_decay": decay, "stages": [{"name": "text", "open": ["text"]}]})
