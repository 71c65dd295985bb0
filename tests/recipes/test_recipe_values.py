"""Every value in a recipe either makes sense or is refused, before anything runs, by one line that names its key."""

import dataclasses
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speeder.data.interactions import Interactions
from speeder.data.prepared import PreparedData
from speeder.errors import SpeederError
from speeder.model.config import SpeederConfig
from speeder.model.loading import DERIVED
from speeder.model.processor import template_ids
from speeder.recipes.bsarec import BSARecConfig, BSARecRecipe
from speeder.recipes.load import load_recipe, recipe_from_dict
from speeder.recipes.sasrec import SASRecConfig, SASRecRecipe
from speeder.recipes.schema import Recipe, Stage
from speeder.training.mpo import GateRamp
from speeder.training.train import _check_negatives, _load_model, _stage_steps
from tests.model.worlds import tiny_backbone, tiny_catalogue

BASE = {
    "stages": [
        {"name": "text", "open": ["text"]},
        {"name": "joint", "open": ["text", "image"], "train": ["lora"]},
    ],
    "model": {"item_embedding": True},
    "lora": {"r": 2, "target_modules": ["q_proj"]},
}
RECIPE_KEYS = [field.name for field in dataclasses.fields(Recipe)]
STAGE_KEYS = [field.name for field in dataclasses.fields(Stage)]
SASREC_KEYS = [field.name for field in dataclasses.fields(SASRecConfig)]
BSAREC_KEYS = [field.name for field in dataclasses.fields(BSARecConfig)]
LORA_KEYS = ["r", "lora_alpha", "lora_dropout", "target_modules", "bias"]
MODEL_KEYS = sorted(
    {field.name for field in dataclasses.fields(SpeederConfig)}
    - {field.name for field in dataclasses.fields(SpeederConfig.__mro__[1])}
    - DERIVED
)

whole = st.one_of(st.integers(-3, 70), st.sampled_from([-(10**30), 10**30, 2**31, 2**63, 10**400]))
plain = st.one_of(
    whole,
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 1e-320, 1e308, 0.5]),
    st.booleans(),
    st.none(),
    st.text(max_size=5),
    st.sampled_from(
        ["1e-3", "nan", "{user}", "{history} {user}", "{history}{history}", "../x", "x" * 300, "item"]
    ),
    st.dates(),
    st.binary(max_size=3),
)
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | whole, inner, max_size=2)
    ),
)
places = st.one_of(
    st.tuples(st.just("recipe"), st.sampled_from(RECIPE_KEYS)),
    st.tuples(st.just("stage"), st.sampled_from(STAGE_KEYS)),
    st.tuples(st.just("lora"), st.sampled_from(LORA_KEYS)),
    st.tuples(st.just("sasrec"), st.sampled_from(SASREC_KEYS)),
    st.tuples(st.just("bsarec"), st.sampled_from(BSAREC_KEYS)),
)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [
            number
            for entry in (value.values() if isinstance(value, dict) else value)
            for number in _numbers(entry)
        ]
    return [value] if isinstance(value, int | float) else []


def assert_sane(recipe: Recipe | SASRecRecipe | BSARecRecipe) -> None:
    """What training works out of a recipe before its first step."""
    data = recipe.to_dict()
    assert all(math.isfinite(number) for number in _numbers(data) if abs(number) < 10**300)
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(data))) == recipe, (
        "what a run folder keeps is the recipe"
    )
    np.random.default_rng(recipe.seed)
    torch.manual_seed(recipe.seed)
    if isinstance(recipe, SASRecRecipe | BSARecRecipe):
        assert recipe.config.hidden_size % recipe.config.heads == 0
        return
    np.random.seed(recipe.seed + len(recipe.stages))
    opened: set[str] = set()
    for stage in recipe.stages:
        steps = _stage_steps(stage, recipe, 1000)
        assert isinstance(steps, int) and 1 <= steps < 2**31 * 100
        assert 0 <= GateRamp(stage, opened, steps).steps <= steps
        opened |= set(stage.open)
    assert 0 <= recipe.warmup_ratio < 1 and recipe.weight_decay >= 0 and recipe.max_grad_norm >= 0
    if recipe.baseline is None:
        template_ids(lambda text, **_: {"input_ids": [1]}, recipe.template)


def changed(place: str, key: str, value: Any) -> dict:
    if place in ("sasrec", "bsarec"):
        return {"baseline": place, place: {key: value}}
    if place == "stage":
        return BASE | {"stages": [BASE["stages"][0] | {key: value}, BASE["stages"][1]]}
    return BASE | {key: value} if place == "recipe" else BASE | {place: BASE[place] | {key: value}}


@settings(deadline=None, max_examples=1500, suppress_health_check=[HealthCheck.too_slow])
@given(places, values)
def test_every_value_is_sane_or_refused_by_its_key(place, value):
    try:
        recipe = recipe_from_dict(changed(*place, value))
    except SpeederError as error:
        line = str(error)
        assert "\n" not in line.replace(repr(value), "") and len(line) < 1000
        # a baseline refuses what else is there for it, such as the supervision
        assert place[1].rstrip("s") in line or (place[1] in ("baseline", "name") and "expected" in line)
    else:
        assert_sane(recipe)


WRONG = {
    ("recipe", "seed"): [-1, 2**32, 1.5, True, "one"],
    ("recipe", "warmup_ratio"): [-1, 1, 1.5, math.nan],
    ("recipe", "weight_decay"): [-1, math.inf, math.nan],
    ("recipe", "max_grad_norm"): [math.nan, -1, math.inf],
    ("recipe", "ema_decay"): [1, -0.1, math.nan],
    ("recipe", "template"): ["{user}", "{history} of {user}", "no field", "{history}{history}", 3],
    ("recipe", "title_template"): ["{history}", "{candidates}{history}", "{history}{candidates}{user}"],
    ("recipe", "layers"): [0, -1, 2.5, "two"],
    ("recipe", "batch_users"): [0, -1, 10**12],
    ("recipe", "backbone"): ["", 5, None],
    ("recipe", "keep_best"): ["no", 1, None],
    ("recipe", "stages"): [[], "text", None, [None], [["name"]]],
    ("recipe", "model"): [None, [1], {"dropout": math.nan}, {3: 4}],
    ("recipe", "precision"): ["int4", 16],
    ("stage", "epochs"): [math.nan, math.inf, 0, -1, 1e300, "many"],
    ("stage", "steps"): [0, -1, 1.5, 10**12],
    ("stage", "learning_rate"): [math.nan, -1, math.inf, "fast"],
    ("stage", "item_learning_rate"): [math.nan, -1],
    ("stage", "backbone_learning_rate"): [math.nan, -1],
    ("stage", "ramp_steps"): [-1, 2.5],
    ("stage", "titles"): [math.nan, -0.1, 1.5, True],
    ("stage", "train"): [
        [],
        ["wings"],
        ["backbone:0"],
        ["backbone:"],
        ["experts:2"],
        ["backbone:²"],
        "experts",
    ],
    ("stage", "open"): ["text", [1], None],
    ("stage", "name"): ["", 3, "x" * 300, None],
    ("lora", "r"): [0, -1, 1.5, math.nan, 10**9],
    ("lora", "lora_alpha"): [0, -1, math.inf, math.nan],
    ("lora", "lora_dropout"): [1, -0.5, math.nan],
    ("sasrec", "dropout"): [1, math.nan, -1],
    ("sasrec", "hidden_size"): [0, 7, 10**9, math.nan],
    ("sasrec", "learning_rate"): [math.nan, -1],
    ("bsarec", "alpha"): [math.nan, -0.1, 1.1],
    ("bsarec", "c"): [0, 51, 2.5, math.nan],
}


@pytest.mark.parametrize(
    ("place", "key", "value"), [(*place, value) for place, wrong in WRONG.items() for value in wrong]
)
def test_impossible_values_are_refused_with_key_expected_and_got(place, key, value, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(changed(place, key, value)))
    with pytest.raises(
        SpeederError, match=rf"{key}.*expected .*, got|'stages'|stage 1: expected a mapping, got|hidden_size"
    ) as refused:
        load_recipe(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("recipe", "colour", "red"), "recipe: unknown key 'colour'; known: stages, backbone"),
        (("stage", "colour", "red"), "stage 'text': unknown key 'colour'; known: name, open"),
        (("sasrec", "colour", "red"), "sasrec: unknown key 'colour'; known: hidden_size"),
        (("recipe", 5, "red"), "recipe: unknown key 5"),
    ],
)
def test_unknown_keys_are_refused(place, message):
    with pytest.raises(SpeederError, match=message):
        recipe_from_dict(changed(*place))


def test_numbers_may_be_written_as_yaml_reads_them():
    stage = recipe_from_dict(
        yaml.safe_load("{stages: [{name: a, open: [text], learning_rate: 1e-3, epochs: 2}]}")
    ).stages[0]
    assert stage.learning_rate == 1e-3 and stage.epochs == 2


def test_dataclasses_made_in_python_are_checked_too():
    with pytest.raises(SpeederError, match="epochs: expected a number above 0, got -1"):
        Stage("a", open=["text"], epochs=-1)
    stages = [Stage("a", open=["text"])]
    with pytest.raises(SpeederError, match="seed: expected at least 0, got -1"):
        dataclasses.replace(Recipe(stages), seed=-1)
    with pytest.raises(ValueError, match=r"dropout: expected a number below 1, got 1\.0"):
        SASRecConfig(dropout=1.0)


# ---- the model's settings ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(MODEL_KEYS), values)
def test_every_setting_of_the_model_is_sane_or_refused_by_its_key(key, value):
    text = tiny_backbone().config
    try:
        config = SpeederConfig(text_config=text, num_items=20, modalities={"text": 7}, **{key: value})
    except (TypeError, ValueError, StrictDataclassError) as error:  # what `train` turns into one line
        assert key in str(error)
        return
    assert all(
        math.isfinite(n) for name in MODEL_KEYS for n in _numbers(getattr(config, name)) if abs(n) < 10**300
    )
    for name in ("max_history", "max_rank", "max_distance", "num_distance_buckets", "tokens_per_item"):
        assert 1 <= getattr(config, name) <= 2**20 and not isinstance(getattr(config, name), bool)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("negatives_exponent", math.inf),
        ("initial_logit_scale", math.nan),
        ("position_proxy_weight", math.nan),
        ("dropout", math.nan),
        ("max_history", True),
        ("max_rank", 10**12),
        ("expert_hidden_size", -1),
        ("num_negatives", 21),
        ("num_negatives", 1_000_000_000),
    ],
)
def test_impossible_settings_end_training_before_the_first_step(key, value, tmp_path, monkeypatch):
    backbone = tiny_backbone()
    monkeypatch.setattr("speeder.model.loading.load_backbone", lambda name: backbone)
    interactions = Interactions(
        np.repeat(np.arange(4), 5), np.arange(20), np.arange(20), [f"u{user}" for user in range(4)]
    )
    data = PreparedData(tiny_catalogue(), interactions, {})
    plain = {"stages": [{"name": "a", "open": ["text"]}], "model": {"negatives": "sampled", key: value}}
    with pytest.raises(SpeederError, match=f"recipe: model: .*{key}.*expected .*got"):
        recipe = recipe_from_dict(plain)
        _check_negatives(recipe, data)
        _load_model(tmp_path, {"model": None}, recipe, data, None)


def test_loading_the_model_imports_neither_pydantic_nor_recipes():
    code = (
        "import sys; from speeder import SpeederForCausalLM;"
        "print([name for name in ('pydantic', 'speeder.recipes') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
