"""The whole recommender is saved and loaded as Hugging Face models are; adapters, new items and processors with it."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError
from speeder.model.config import SpeederConfig
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.processor import SpeederProcessor, template_ids
from tests.model.worlds import TEXT, save_tiny_backbone, tiny_backbone, tiny_catalogue, tiny_model

HISTORIES = [[1, 2, 3], [4], list(range(10, 19))]


@pytest.mark.exact
@pytest.mark.parametrize(
    "config",
    [
        {},
        dict(item_embedding=True, position_proxy_weight=0.1, modality_dropout=0.1),
        dict(tokens_per_item=2, prompt_prefix=[5], prompt_suffix=[6, 7], relative_bias=False),
        dict(
            lora=dict(r=2, target_modules=["q_proj", "v_proj"]), absolute_bias=False, position_prompts=False
        ),
    ],
    ids=["default", "item embedding", "two tokens", "lora"],
)
def test_round_trip_through_auto_classes(tmp_path, config):
    model = tiny_model(**config)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is SpeederForCausalLM and not loaded.training
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SpeederConfig)
    assert torch.equal(loaded.score(HISTORIES), model.score(HISTORIES))
    assert loaded.catalogue.titles == model.catalogue.titles
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".pickle")]


@pytest.mark.exact
def test_weights_lie_where_fresh_ones_do(tmp_path):
    """At multiples of 64 bytes, wherever files have them: some products round by that."""
    tiny_model(item_embedding=True).save_pretrained(tmp_path / "model")
    save_tiny_backbone(tmp_path / "backbone")
    models = (
        SpeederForCausalLM.from_pretrained(tmp_path / "model"),
        SpeederForCausalLM.from_backbone(tmp_path / "backbone", tiny_catalogue()),
    )
    for model in models:
        assert {tensor.data_ptr() % 64 for tensor in (*model.parameters(), *model.buffers())} == {0}
        assert model.backbone.lm_head.weight is model.backbone.get_input_embeddings().weight
    for folder in (tmp_path / "model", tmp_path / "backbone"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            places = {file.get_tensor(name).data_ptr() % 64 for name in file.keys()}  # noqa: SIM118, no mapping
        assert places != {0}, "in a file whose weights lie so by chance nothing is tested"


def test_text_weights_are_stored_once(tmp_path):
    """The tied output head is not written a second time, nor are the catalogue's features into the weights."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "backbone.model.embed_tokens.weight" in names
    assert not {name for name in names if "lm_head" in name or "features_" in name}


def test_loading_in_another_dtype(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    half = SpeederForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    wanted, got = model.score(HISTORIES), half.score(HISTORIES).float()
    assert torch.nn.functional.cosine_similarity(wanted, got).min() > 0.99


def test_a_damaged_or_missing_catalogue_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    features = tmp_path / "catalogue" / "text.safetensors"
    data = bytearray(features.read_bytes())
    data[-1] ^= 1
    features.write_bytes(data)
    with pytest.raises(SpeederError, match=r"text\.safetensors has changed"):
        SpeederForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "catalogue").rename(tmp_path / "elsewhere")
    with pytest.raises(SpeederError, match="catalogue"):
        SpeederForCausalLM.from_pretrained(tmp_path)


def test_added_items_are_recommended_at_once_and_saved(tmp_path):
    model = tiny_model(item_embedding=True)
    before = model.score([[1, 2]])
    # a twin of item 3 by its features: it must score as item 3 would without a learned embedding
    twin = {name: features[3:4].clone() for name, features in model.catalogue.features.items()}
    present = {name: mask[3:4].clone() for name, mask in model.catalogue.present.items()}
    added = model.add_items(ItemCatalogue(["new"], ["New film"], features=twin, present=present))
    assert added == range(20, 21) and model.config.vocab_size == TEXT + 21
    scores = model.score([[1, 2]])
    torch.testing.assert_close(scores[:, :20], before)
    assert "new" in {item.id for item in model.recommend([[1, 2]], k=19, exclude_seen=True)[0]}
    assert model.score([["new", 1]]).shape == (1, 21)
    assert model.gates()["item"][20] == 0 and model.gates()["item"][3] > 0
    plain = tiny_model()
    plain.add_items(ItemCatalogue(["new"], features=twin, present=present))
    torch.testing.assert_close(plain.score([[1]])[0, 20], plain.score([[1]])[0, 3])
    model.save_pretrained(tmp_path)
    loaded = SpeederForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.score([["new", 1]]), model.score([["new", 1]]))


def test_lora_starts_without_effect_and_merges_away(tmp_path):
    plain = tiny_model(stir=False)
    adapted = tiny_model(stir=False, lora=dict(r=2, target_modules=["q_proj"]))
    torch.testing.assert_close(adapted.score(HISTORIES), plain.score(HISTORIES))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    moved = adapted.score(HISTORIES)
    assert (moved - plain.score(HISTORIES)).abs().max() > 1e-3
    adapted.merge_lora()
    assert not [name for name, _ in adapted.named_parameters() if "lora" in name]
    torch.testing.assert_close(adapted.score(HISTORIES), moved, atol=1e-4, rtol=1e-4)
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(
        SpeederForCausalLM.from_pretrained(tmp_path).score(HISTORIES), moved, atol=1e-4, rtol=1e-4
    )


def test_peft_wraps_the_whole_model(tmp_path):
    model = tiny_model()
    before = model.score(HISTORIES)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["item_head"]))
    trainable = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name or "item_head" in name for name in trainable)
    ids = torch.tensor([[TEXT + 1, TEXT + 2, TEXT + 3]])
    wrapped.train()
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if n in trainable)
    torch.testing.assert_close(wrapped.base_model.model.score(HISTORIES), before)


def test_peft_for_causal_language_models():
    """PEFT's own forward passes `inputs_embeds=None` and friends along."""
    model = tiny_model()
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    ids = torch.tensor([[TEXT + 1, TEXT + 2, TEXT + 3]])
    assert wrapped(input_ids=ids, labels=ids).loss.isfinite()
    assert wrapped.generate(input_ids=ids, max_new_tokens=2).shape == (1, 5)
    with pytest.raises(SpeederError, match=r"lora: .*rank"):
        tiny_model(lora={"rank": 2})


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = torch.tensor([[TEXT + 1, TEXT + 2, TEXT + 3, TEXT + 4]])
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_other_models_and_settings_are_refused(tmp_path):
    save_tiny_backbone(tmp_path / "llama")
    with pytest.raises(SpeederError, match="expected a Speeder model, got one of type 'llama'"):
        SpeederForCausalLM.from_pretrained(tmp_path / "llama")
    with pytest.raises(SpeederError, match="unknown setting 'droput'"):
        tiny_model(droput=0.2)
    with pytest.raises(SpeederError, match="unknown setting 'dtype'"):
        tiny_model(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="position_proxy_weight"):
        tiny_model(position_proxy_weight=-1.0)
    with pytest.raises(NotImplementedError, match="item ids"):
        tiny_model().resize_token_embeddings(100)


def test_a_pickled_backbone_is_refused(tmp_path):
    folder = save_tiny_backbone(tmp_path / "llama")
    SpeederForCausalLM.from_backbone(folder, tiny_catalogue())
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SpeederError, match=r"could not be loaded: .*safetensors"):
        SpeederForCausalLM.from_backbone(folder, tiny_catalogue())


@pytest.mark.parametrize("family", ["granite", "lfm2"])
def test_backbones_that_would_be_served_wrongly_are_refused(family):
    """Granite scales its logits; LFM2's convolutions run across the borders of packed sequences."""
    from transformers import GraniteConfig, Lfm2Config

    sizes = {"vocab_size": TEXT, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "pad_token_id": 0, "num_key_value_heads": 2}
    torch.manual_seed(0)
    if family == "granite":
        config = GraniteConfig(**sizes, logits_scaling=8.0)
    else:
        config = Lfm2Config(**sizes, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    backbone = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(5.0)  # a fresh convolution hardly moves anything
    with pytest.raises(SpeederError, match="cannot be served"):
        SpeederForCausalLM.from_backbone(backbone, tiny_catalogue())


def test_checkpoints_load_with_a_given_catalogue(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, save_catalogue=False)
    with pytest.raises(SpeederError, match="catalogue"):
        SpeederForCausalLM.from_pretrained(tmp_path)
    loaded = SpeederForCausalLM.from_pretrained(tmp_path, catalogue=model.catalogue)
    torch.testing.assert_close(loaded.score(HISTORIES), model.score(HISTORIES), atol=1e-5, rtol=1e-4)


def test_templates(tokenizer):
    prefix, suffix = template_ids(tokenizer, "w1 w2 {history} w3")
    assert tokenizer.decode(prefix) == "w1 w2" and tokenizer.decode(suffix) == "w3"
    assert template_ids(None, "{history}") == ([], [])
    for wrong in ("no history", "{history} {history}"):
        with pytest.raises(ValueError, match="exactly once"):
            template_ids(tokenizer, wrong)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        template_ids(None, "then {history}")


@pytest.fixture
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_tiny_backbone(tmp_path_factory.mktemp("backbone")))


def test_processor(tmp_path, tokenizer):
    model = tiny_model(prompt_prefix=[5, 6], prompt_suffix=[7])
    processor = SpeederProcessor(tokenizer, model.config, model.catalogue)
    batch = processor([["id1", 2], [3]])
    assert batch["input_ids"].tolist() == [[5, 6, TEXT + 1, TEXT + 2, 7], [0, 5, 6, TEXT + 3, 7]]
    assert batch["ranks"].tolist() == [[-1, -1, 0, 1, 2], [-1, -1, -1, 0, 1]]
    scores = model(**batch, logits_to_keep=1).logits[:, 0, TEXT:]
    torch.testing.assert_close(scores, model.score([["id1", 2], [3]]), atol=1e-5, rtol=1e-4)
    packed = processor([[1, 2], [3]], targets=[4, "id5"], packed=True)
    assert packed["cu_seqlens"].tolist() == [0, 6, 11]
    assert packed["labels"][0].tolist() == [-100] * 3 + [TEXT + 2, -100, TEXT + 4] + [-100] * 4 + [TEXT + 5]
    last = processor([[1, 2]], targets=[4], supervision="last")
    assert (last["labels"] != -100).sum() == 1
    assert processor.decode([5, TEXT + 4, 6, 7]) == "w5 <Title 4> w6 w7"
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "SpeederProcessor"
    )
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is SpeederProcessor
    assert loaded([["id1", 2]])["input_ids"].tolist() == processor([["id1", 2]])["input_ids"].tolist()
    with pytest.raises(KeyError, match="no item has the id 'nobody'"):
        processor([["nobody"]])
    with pytest.raises(ValueError, match="targets: expected 2, one a history, got 1"):
        processor([[1], [2]], targets=[3])
    alone = tmp_path / "processor alone"
    processor.save_pretrained(alone)
    assert len(SpeederProcessor.from_pretrained(alone).catalogue) == len(tiny_catalogue())


def test_recommend_checks_what_it_is_given():
    model = tiny_model()
    for histories, error, message in [
        ([], ValueError, "at least one history, got none"),
        ([[1], []], ValueError, "got an empty history at 1"),
        ([1, 2, 3], ValueError, "got a single history"),
        ([[20]], ValueError, r"0\.\.19, got 20"),
        ([["nobody"]], KeyError, "nobody"),
    ]:
        with pytest.raises(error, match=message):
            model.recommend(histories)
    with pytest.raises(ValueError, match="k"):
        model.recommend([[1, 2]], k=19)  # two of twenty are seen
    best = model.recommend([[1, 2]], k=18)[0]
    assert {item.item for item in best} == set(range(20)) - {1, 2}
    assert [item.score for item in best] == sorted((item.score for item in best), reverse=True)
    assert len(model.recommend([[1, 2]], k=20, exclude_seen=False)[0]) == 20


# --- the learned embedding belongs to items, not to places ---------------------------------------------------------


def reordered(catalogue: ItemCatalogue, order: list[int]) -> ItemCatalogue:
    rows = torch.tensor(order)
    return ItemCatalogue(
        [catalogue.ids[i] for i in order],
        [catalogue.titles[i] for i in order],
        features={name: part[rows] for name, part in catalogue.features.items()},
        present={name: part[rows] for name, part in catalogue.present.items()},
    )


@pytest.mark.parametrize("order", [list(range(19, -1, -1)), list(range(12)), [1, 0, *range(2, 20)]])
@pytest.mark.parametrize("version", ["0.1.0", "today"])
def test_a_catalogue_in_another_order_is_refused_with_a_learned_embedding(tmp_path, order, version):
    """Its rows belong to items by place."""
    model = tiny_model(item_embedding=True)
    model.save_pretrained(tmp_path / "saved")
    if version == "0.1.0":  # whose configuration noted no items
        path = tmp_path / "saved" / "config.json"
        config = json.loads(path.read_text())
        assert config.pop("warm_items_hash")
        path.write_text(json.dumps(config))
    other = reordered(model.catalogue, order)
    with pytest.raises(
        SpeederError, match="begins with the 20 items that this model has a learned embedding of"
    ):
        SpeederForCausalLM.from_pretrained(tmp_path / "saved", catalogue=other)
    with pytest.raises(SpeederError, match="in the same order"):
        model.set_catalogue(other)
    same = SpeederForCausalLM.from_pretrained(tmp_path / "saved", catalogue=model.catalogue)
    assert torch.equal(same.score([[1, 2]]), model.score([[1, 2]]))


def test_without_a_learned_embedding_any_order_gives_the_same_scores(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    order = list(range(19, -1, -1))
    other = SpeederForCausalLM.from_pretrained(tmp_path, catalogue=reordered(model.catalogue, order))
    scores = other.score([["id1", "id2"]])[:, order]
    torch.testing.assert_close(scores, model.score([["id1", "id2"]]), atol=2e-5, rtol=1e-4)


def test_untrained_rows_of_the_learned_embedding_are_left_out(tmp_path):
    """Where an item has anything else; the choice is saved, and new items come after it."""
    model = tiny_model(item_embedding=True)
    before = model.gates()["item"]
    trained = torch.arange(20) < 15
    model.set_trained_items(trained)
    gates = model.gates()["item"]
    assert (gates[15:] == 0).all() and torch.equal(gates[:15], before[:15])
    moved = model.mrc.item_embedding.weight
    scores = model.score([[1, 16]])
    moved.data[15:] += 1  # noise that no longer reaches a score
    assert torch.equal(model.score([[1, 16]]), scores)
    model.save_pretrained(tmp_path)
    loaded = SpeederForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.gates()["item"], gates)
    loaded.add_items(reordered(renamed(tiny_catalogue(3)), [0, 1, 2]))
    assert torch.equal(loaded.gates()["item"][:20], gates) and (loaded.gates()["item"][20:] == 0).all()
    with pytest.raises(ValueError, match=r"trained: expected \(20,\) bool, got \(3,\)"):
        model.set_trained_items(trained[:3])


def test_an_item_that_has_nothing_else_keeps_its_row():
    catalogue = tiny_catalogue()
    model = SpeederForCausalLM.from_backbone(tiny_backbone(), catalogue, modalities=[], item_embedding=True)
    model.set_trained_items(torch.zeros(20, dtype=torch.bool))
    assert (model.gates()["item"] == 1).all()


def renamed(catalogue: ItemCatalogue) -> ItemCatalogue:
    return ItemCatalogue(
        [f"new {i}" for i in range(len(catalogue))], features=catalogue.features, present=catalogue.present
    )
