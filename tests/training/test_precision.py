"""`precision: auto` is the faster one of the machine, chosen once a run."""

import pytest
import torch

from speeder.io.files import read_json, write_json
from speeder.model.modeling import SpeederForCausalLM
from speeder.prepare.synthetic import synthetic_world
from speeder.recipes.schema import Recipe, Stage
from speeder.training import precision
from speeder.training.precision import product_seconds, resolve_precision
from speeder.training.train import train
from tests.model.worlds import save_tiny_backbone


@pytest.mark.parametrize(
    ("bf16", "fp32", "expected"), [(1.0, 2.0, "bf16"), (1.0, 1.1, "fp32"), (2.0, 1.0, "fp32")]
)
def test_auto_takes_bfloat16_only_where_it_gains(monkeypatch, bf16, fp32, expected):
    seconds = {torch.bfloat16: bf16, torch.float32: fp32}
    monkeypatch.setattr(precision, "product_seconds", seconds.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_precision("auto") == expected
    assert resolve_precision("fp16") == "fp16"


def test_gpus_without_bfloat16_products_get_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert resolve_precision("auto") == resolve_precision("auto", "cuda") == expected
    monkeypatch.setattr(precision, "product_seconds", {torch.bfloat16: 2.0, torch.float32: 1.0}.get)
    assert resolve_precision("auto", "cpu") == "fp32", "whatever the GPU would do"


def test_products_take_time_in_both():
    assert 0 < product_seconds(torch.float32) < 60
    assert 0 < product_seconds(torch.bfloat16) < 60


def test_a_run_goes_on_in_the_precision_it_began_in(tmp_path, monkeypatch):
    """Even where the machine that resumes it is faster in the other."""
    save_tiny_backbone(tmp_path / "backbone")
    data = synthetic_world(num_items=48, num_users=12, history=6)
    stages = [Stage("first", open=["item"], steps=2), Stage("second", open=["item"], steps=2)]
    recipe = Recipe(stages, str(tmp_path / "backbone"), model={"item_embedding": True}, batch_users=4)
    assert recipe.precision == "auto"
    measured, autocast = [], set()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "product_seconds", lambda dtype: measured.append(dtype) or 1.0)
    decode = SpeederForCausalLM._decode

    def observed(model, *args, **kwargs):
        if model.training:
            autocast.add(torch.is_autocast_enabled("cpu"))
        return decode(model, *args, **kwargs)

    monkeypatch.setattr(SpeederForCausalLM, "_decode", observed)

    def stop(stage, model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, data, tmp_path / "run", on_stage=stop)
    begun = read_json(tmp_path / "run" / "recipe.json")
    assert begun["precision"] == "fp32" and begun["recipe"]["precision"] == "auto"
    assert autocast == {False} and measured
    write_json(
        tmp_path / "run" / "recipe.json", begun | {"precision": "bf16"}
    )  # as another machine would have
    measured.clear(), autocast.clear()
    train(recipe, data, tmp_path / "run", resume=True)
    assert autocast == {True} and not measured
