"""MPO: gates ramp as the recipe says, stages train the parts they name, recipes are checked."""

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError
from speeder.model.mrc import CLOSED
from speeder.recipes.load import load_recipe, recipe_from_dict, recipe_name_for
from speeder.recipes.schema import Stage
from speeder.training.mpo import RAMP_START, GateRamp, gate_offset, select_parameters
from tests.model.worlds import tiny_model


@given(ramp=st.integers(0, 50), step=st.integers(0, 100))
def test_ramps_rise_from_nearly_closed_to_open(ramp, step):
    offset = gate_offset(True, True, step, ramp)
    assert RAMP_START <= offset <= 0.0
    assert offset == 0.0 if step >= ramp else offset < 0.0
    assert gate_offset(True, True, step + 1, ramp) >= offset
    assert gate_offset(False, True, step, ramp) == 0.0
    assert gate_offset(False, False, step, ramp) == CLOSED


def test_a_ramp_moves_the_models_gates():
    model = tiny_model(stir=False, item_embedding=True)
    stage = Stage("s", open=["text", "image"], ramp_steps=10)
    ramp = GateRamp(stage, opened_before={"text"}, stage_steps=30)
    has_all = model.mrc.present.all(dim=1)
    shares = []
    for step in (0, 5, 10, 20):
        ramp.set_offsets(model, step)
        gates = {name: weights[has_all].mean() for name, weights in model.gates().items()}
        assert gates["collaborative"] < 1e-9 and gates["item"] < 1e-9
        shares.append(float(gates["image"]))
    assert shares[0] < 0.01 and shares == sorted(shares) and shares[2] == shares[3] == pytest.approx(0.5)
    assert GateRamp(stage, {"text"}, stage_steps=12).steps == 6, "a ramp takes at most half of its stage"
    first = GateRamp(Stage("s", open=["image"], ramp_steps=10), opened_before=set(), stage_steps=30)
    first.set_offsets(model, 0)
    assert model.mrc.gate_offset[model.mrc.names.index("image")] == 0.0, (
        "the first stage has nothing to protect"
    )


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (["experts"], {"mrc.experts.text", "mrc.experts.image", "mrc.norm_weight"}),
        (["gate"], {"mrc.gates.text", "mrc.gates.image"}),
        (["item"], set()),
        (["head"], {"item_head", "logit_scale"}),
        (["spae"], {"spae"}),
        (["lora"], {"lora"}),
        (["embeddings"], {"embed_tokens"}),
        (["backbone:1"], {"backbone.model.layers.1", "backbone.model.norm"}),
        (["backbone"], {"backbone.model.layers.0", "backbone.model.layers.1", "backbone.model.norm"}),
    ],
)
def test_a_stage_trains_the_parts_it_names(train, expected):
    model = tiny_model(
        item_embedding=True, lora=dict(r=2, target_modules=["q_proj"]), position_proxy_weight=0.1
    )
    stage = Stage("s", open=["text", "image"], train=[*train, "spae"])
    groups = select_parameters(model, stage, weight_decay=0.1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(trained)

    def belongs(name: str) -> bool:
        if name.startswith("spae."):
            return True
        if "lora_" in name:
            return "lora" in expected
        return any(name.startswith(prefix) or prefix in name.split(".") for prefix in expected)

    assert trained == {name for name, _ in model.named_parameters() if belongs(name)}
    for group in groups:
        assert group["lr"] == (3e-4 if group["name"].startswith("backbone") else 1e-3)
    bias_tables = [p for name, p in model.named_parameters() if name.startswith("spae.") and p.ndim >= 2]
    undecayed = [id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]]
    assert all(id(table) in undecayed for table in bias_tables)


def test_the_learned_item_embedding_trains_once_it_is_open():
    model = tiny_model(item_embedding=True)
    select_parameters(model, Stage("s", open=["text", "item"], train=["item"]), 0.0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"mrc.item_embedding.weight"}
    for rate, expected in ((None, 1e-3), (7e-3, 7e-3)):
        stage = Stage("s", open=["text", "item"], train=["item", "head"], item_learning_rate=rate)
        rates = {
            id(p): group["lr"] for group in select_parameters(model, stage, 0.1) for p in group["params"]
        }
        assert rates[id(model.mrc.item_embedding.weight)] == expected
        assert rates[id(model.item_head.weight)] == 1e-3
    select_parameters(model, Stage("s", open=["text", "item"], train=["gate"]), 0.0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"mrc.gates.text.weight", "mrc.gates.text.bias", "mrc.item_gate"}


def test_words_and_the_look_up_train_with_the_parts_they_belong_to():
    model = tiny_model(item_embedding=True, words=True, history_lookup=True)
    stage = Stage("s", open=["words"], learning_rate=1e-3, word_learning_rate=7e-3)
    groups = {group["name"]: group for group in select_parameters(model, stage, 0.1)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(p)] for p in groups["word"]["params"]] == ["mrc.words.vectors.weight"]
    assert groups["word"]["lr"] == 7e-3 and groups["new"]["lr"] == 1e-3
    trained = {names[id(p)] for group in groups.values() for p in group["params"]}
    assert {"mrc.words.direct.weight", "mrc.word_gate", "history.log_weights"} <= trained
    select_parameters(model, Stage("s", open=["text"]), 0.1)
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.startswith("mrc.word"))


def test_words_are_left_out_where_items_have_no_text():
    stages = [
        {"name": "a", "open": ["words"], "steps": 1},
        {"name": "b", "open": ["words", "image"], "steps": 1},
    ]
    recipe = recipe_from_dict({"model": {"words": True, "dropout": 0.1}, "stages": stages})
    same, notes = recipe.for_modalities(["words", "image"])
    assert same == recipe and not notes
    fewer, notes = recipe.for_modalities(["image"])
    assert [stage.open for stage in fewer.stages] == [["image"]] and len(notes) == 1
    assert fewer.model == {"words": False, "dropout": 0.1}
    assert ItemCatalogue(["a"], ["A title"]).readable == ["words"] and ItemCatalogue(["a"]).readable == []


def test_the_recipe_auto_follows_the_length_of_histories():
    assert recipe_name_for([[1, 2, 3]] * 10) == "beauty" and recipe_name_for([[1] * 60] * 10) == "ml-100k"


def test_frozen_parts_get_no_gradient_and_closed_experts_stay():
    model = tiny_model()
    select_parameters(model, Stage("s", open=["text"], train=["experts", "head"]), 0.0)
    model.train()
    ids = torch.tensor([[65, 66, 67, 68]])
    model(ids, labels=ids).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert "mrc.experts.text.up.weight" in with_gradient and "item_head.weight" in with_gradient
    assert not [name for name in with_gradient if "backbone" in name or "image" in name or "spae" in name]


WHOLE = {"stages": [{"name": "text", "open": ["text"], "steps": 5, "learning_rate": "1e-3"}], "layers": 2}


def test_recipes_are_read_from_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(WHOLE))
    recipe = load_recipe(path)
    assert recipe.layers == 2 and recipe.stages[0].learning_rate == 1e-3
    assert recipe_from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, r"recipe: stages: expected a list with at least one entry, got \[\]"),
        ({"stages": "text"}, "a list of 'stages'"),
        ({"stages": [{"open": ["text"]}]}, "stage 1: name: expected a value, got none"),
        ({"stages": [{"name": "a", "open": []}]}, "stage 'a': open: expected at least one name"),
        (
            {"stages": [{"name": "a", "open": ["text"], "train": ["wings"]}]},
            "expected parts of .* got 'wings'",
        ),
        ({"stages": [{"name": "a", "open": ["text"], "train": ["backbone:x"]}]}, "got 'backbone:x'"),
        (
            {"stages": [{"name": "a", "open": ["text"], "train": ["lora"]}]},
            "recipe: lora: expected arguments, since a stage trains 'lora', got none",
        ),
        ({"stages": [{"name": "a", "open": [1]}]}, "stage 'a': open.0: expected text, got 1"),
        (
            {"stages": [{"name": "a", "open": ["text"], "train": []}]},
            "stage 'a': train: expected at least one part, got none",
        ),
        (
            {"stages": [{"name": "a", "open": ["text"], "learning_rate": -1}]},
            "stage 'a': learning_rate: expected at least 0, got -1",
        ),
        ({"stages": [{"name": "a", "open": ["text"], "epochs": 0}]}, "above 0"),
        ({"stages": [{"name": "a", "open": ["text"], "epochs": "many"}]}, "expected a number, got 'many'"),
        ({"stages": [{"name": "a", "open": ["text"]}] * 2}, "different names"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"layers": "two"}, "recipe: layers: expected a whole number, got 'two'"),
        ({"precision": "int4"}, "precision: expected one of auto, bf16, fp16, fp32"),
        ({"batch_users": 0}, "batch_users: expected at least 1"),
    ],
)
def test_wrong_recipes_are_refused_in_one_line(tmp_path, change, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(WHOLE | change))
    with pytest.raises(SpeederError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_unreadable_recipes(tmp_path):
    with pytest.raises(SpeederError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("stages: [")
    with pytest.raises(SpeederError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")


def test_stages_without_features_are_left_out_and_said_so():
    stages = [
        {"name": "text", "open": ["text"]},
        {"name": "+image", "open": ["text", "image"]},
        {"name": "+collaborative", "open": ["text", "image", "collaborative"]},
        {"name": "joint", "open": ["text", "image", "collaborative", "item"]},
    ]
    recipe, notes = recipe_from_dict({"stages": stages}).for_modalities(["text", "collaborative"])
    assert [(stage.name, stage.open) for stage in recipe.stages] == [
        ("text", ["text"]),
        ("+collaborative", ["text", "collaborative"]),
        ("joint", ["text", "collaborative", "item"]),
    ]
    assert notes == ["stage '+image' is left out: no item has image features"]
    assert recipe_from_dict({"stages": stages}).for_modalities(["text", "image", "collaborative"])[1] == []
    narrowed = recipe_from_dict({"stages": [{"name": "all", "open": ["text", "image"]}]}).for_modalities(
        ["text"]
    )
    assert narrowed[0].stages[0].open == ["text"]
    assert narrowed[1] == ["stage 'all' runs without image: no item has such features"]
    every = [dict(stage, open=["text", "image", "item"]) for stage in stages]
    for recipe in (
        recipe_from_dict({"stages": stages}).for_modalities(["text", "collaborative"], keep_stages=True)[0],
        recipe_from_dict({"stages": every}).for_modalities(["text"])[
            0
        ],  # pictures were never why a stage was there
    ):
        assert [stage.name for stage in recipe.stages] == [stage["name"] for stage in stages]
    with pytest.raises(SpeederError, match="got 'imgae'"):
        recipe_from_dict({"stages": [{"name": "a", "open": ["text", "imgae"]}]}).for_modalities(["text"])
    with pytest.raises(SpeederError, match="no stage is left"):
        recipe_from_dict({"stages": [{"name": "a", "open": ["image"]}]}).for_modalities(["text"])


def test_parts_that_the_model_does_not_have():
    model = tiny_model("gpt_neox")
    with pytest.raises(SpeederError, match="at most 2 layers, got 'backbone:99'"):
        select_parameters(model, Stage("s", open=["text"], train=["backbone:99"]), 0.0)
    with pytest.raises(SpeederError, match="none of lora has weights"):
        select_parameters(model, Stage("s", open=["text"], train=["lora"]), 0.0)
    select_parameters(model, Stage("s", open=["text"], train=["backbone:1"]), 0.0)
    assert not model.backbone.get_input_embeddings().weight.requires_grad
