"""Hooks on the text embedding run, adapters of it count, offloaded weights are brought, and modes are given back."""

import logging

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from speeder.baselines.sasrec.model import SASRec
from speeder.errors import SpeederError
from speeder.model.embeddings import read_directly
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.offload import OWN_PARTS
from speeder.model.sequences import pack_batch
from speeder.serving.sessions import UserSessions
from tests.model.worlds import tiny_model

HISTORIES = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
PROMPT = dict(prompt_prefix=[5, 6, 7], prompt_suffix=[8])


def words(model):
    return model.backbone.get_input_embeddings()


# ---- offload ----------------------------------------------------------------------------------------------


def _layers(first: str, second: str, own: str) -> dict[str, str]:
    backbone = {
        "embed_tokens": second,
        "layers.0": first,
        "layers.1": second,
        "norm": first,
        "rotary_emb": first,
    }
    return {
        **{f"backbone.model.{name}": device for name, device in backbone.items()},
        "backbone.lm_head": second,
        **dict.fromkeys(OWN_PARTS, own),
    }


MAPS = {
    "all on disk": ({"": "disk"}, {}),
    "some layers on disk": (_layers("cpu", "disk", "cpu"), {}),
    "Speeder's own parts on disk": (_layers("cpu", "disk", "disk"), {}),
    "a map that transformers makes": ("auto", {"max_memory": {"cpu": "20KB"}}),
    "all in memory": ({"": "cpu"}, {}),
}


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("name", MAPS)
def test_offloaded_models_score_as_whole_ones(family, name, tmp_path):
    device_map, more = MAPS[name]
    if family == "gpt_neox" and isinstance(device_map, dict) and "" not in device_map:
        pytest.skip("its layers have other names")
    model = tiny_model(family, item_embedding=True, **PROMPT)
    model.save_pretrained(tmp_path / "model")
    loaded = SpeederForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload"), **more
    )
    waiting = [name for name, parameter in loaded.named_parameters() if parameter.is_meta]
    assert all(name.startswith("backbone.") for name in waiting)
    assert bool(waiting) == (name != "all in memory") and loaded.device.type == "cpu"
    for _ in range(2):  # what is kept of the first pass counts in the second
        assert torch.equal(loaded.score(HISTORIES), model.score(HISTORIES))
    assert loaded.recommend(HISTORIES, k=3) == model.recommend(HISTORIES, k=3)
    ids = torch.tensor([[5, 64, 65, 9]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)  # text too: the head, tied or not
    assert torch.equal(loaded.generate(ids, max_new_tokens=2), model.generate(ids, max_new_tokens=2))
    visits = {"one user": [1, 2], "another": [3]}
    assert torch.equal(UserSessions(loaded, 4096).score(visits), UserSessions(model, 4096).score(visits))
    loaded.save_pretrained(tmp_path / "again")
    again = SpeederForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.score(HISTORIES), model.score(HISTORIES))


def test_what_cannot_be_offloaded_is_refused_by_name(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    two = {"backbone": "cuda:0", **dict.fromkeys(OWN_PARTS, "cuda:1")}
    with pytest.raises(SpeederError, match=r"device_map: expected one device that computes.*cuda:0, cuda:1"):
        SpeederForCausalLM.from_pretrained(tmp_path / "model", device_map=two)
    cpu_offload(model, execution_device="cpu")
    for call in (
        lambda: model.recommend([[1]]),
        lambda: model(torch.tensor([[5]])),
        lambda: model.score([[1]]),
    ):
        with pytest.raises(SpeederError, match="from_pretrained with device_map"):
            call()
    with pytest.raises(SpeederError, match="backbone: expected all weights in memory"):
        SpeederForCausalLM.from_backbone(model.backbone, model.catalogue)


# ---- hooks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_called_embedding_gives_the_same_bits_as_one_that_is_read(family):
    model = tiny_model(family, **PROMPT)
    ids, mask = torch.tensor([[0, 5, 64, 65], [6, 64, 66, 9]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    expected = model.score(HISTORIES), model(ids, attention_mask=mask).logits, model(ids).logits
    seen = []
    handle = words(model).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert not read_directly(words(model))
    found = model.score(HISTORIES), model(ids, attention_mask=mask).logits, model(ids).logits
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.Size([2, 4, 32]) in seen, "hooks see the batch's shape"
    handle.remove()
    assert read_directly(words(model)), "without hooks the kernel reads the weight again"


def test_gradients_are_the_same_whether_the_embedding_is_called_or_read():
    def gradients(called: bool) -> list[torch.Tensor]:
        model = tiny_model(**PROMPT).train()
        if called:
            words(model).register_forward_hook(lambda module, args, output: None)
        batch = pack_batch([model.sequence([1, 2, 3], 4), model.sequence([5], 6)], with_labels=True)
        model(**batch).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_options_of_the_text_embedding_count():
    """Those that torch's own embedding has: they would be left out where the kernel reads the weight."""
    ids = torch.tensor([[5, 5, 9, 64 + 3, 64 + 4]])
    results = {}
    for option, value in (
        ("padding_idx", 0),
        ("max_norm", 0.5),
        ("sparse", True),
        ("scale_grad_by_freq", True),
    ):
        model = tiny_model().train()
        setattr(words(model), option, value)
        if option == "scale_grad_by_freq":
            with pytest.raises(SpeederError, match=r"^scale_grad_by_freq: expected False"):
                model(ids)
            continue
        torch.manual_seed(0)
        model(ids, labels=ids.masked_fill(ids < 64, -100)).loss.backward()
        results[option] = words(model).weight.detach()[[5, 9]].norm(dim=1), words(model).weight.grad
    assert (results["max_norm"][0] < 0.501).all() and (results["padding_idx"][0] > 1).all()
    assert results["sparse"][1].is_sparse
    torch.testing.assert_close(results["sparse"][1].to_dense(), results["padding_idx"][1])


@pytest.mark.parametrize("prompt", [{}, PROMPT], ids=["items only", "with text"])
def test_neftune_moves_embeddings_in_training_and_not_in_evaluation(prompt, tmp_path):
    """As transformers means it: uniform noise of at most alpha / sqrt(S H), on items' tokens too."""
    model = tiny_model(**prompt)
    before, seen = model.score(HISTORIES), []
    batches = [pack_batch([model.sequence([1, 2, 3], target=4)], with_labels=True) for _ in range(2)]
    embed = SpeederForCausalLM._embed

    def see(self, ids, layout, item_table, shape=None):
        noisy = embed(self, ids, layout, item_table, shape)
        with torch.no_grad():
            table = self.mrc.whole()[0]
            plain = self._pack_embeddings(
                words(self).weight, torch.where(ids < 64, ids, 0), ids, layout, table
            )
        seen.append((self.training, noisy.detach() - plain))
        return noisy

    model._embed = see.__get__(model)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        learning_rate=0.0,
        per_device_train_batch_size=1,
        neftune_noise_alpha=5.0,
    )
    Trainer(model, arguments, train_dataset=batches, data_collator=lambda rows: rows[0]).train()
    assert len(seen) == 2
    for training, noise in seen:
        bound = 5.0 / (noise.shape[0] * noise.shape[1]) ** 0.5
        assert training and (noise != 0).float().mean() > 0.99
        assert 0.5 * bound < noise.abs().max() <= bound * 1.001
    del model._embed
    words(model).neftune_noise_alpha = 5.0  # and while the hook is there
    from transformers.integrations.neftune import neftune_post_forward_hook

    words(model).register_forward_hook(neftune_post_forward_hook)
    assert torch.equal(model.train().score(HISTORIES), before)
    assert torch.equal(model.eval().score(HISTORIES), before)


# ---- adapters of the text embedding -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_lora_of_the_text_embedding_counts_is_saved_and_merges(family, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    model = tiny_model(family, **PROMPT)
    plain = model.score(HISTORIES)
    model.add_lora({"r": 2, "lora_alpha": 8, "target_modules": ["embed_tokens"]})
    assert torch.equal(model.eval().score(HISTORIES), plain), "an adapter is nothing before it is trained"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    moved = model.eval().score(HISTORIES)
    assert (moved - plain).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    assert torch.equal(SpeederForCausalLM.from_pretrained(tmp_path).score(HISTORIES), moved)
    model.merge_lora()
    torch.testing.assert_close(model.score(HISTORIES), moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"]}])
def test_pefts_adapter_of_the_text_embedding_counts(how):
    model = tiny_model(**PROMPT)
    if "embed_tokens" not in how["target_modules"]:
        how = how | {"modules_to_save": ["embed_tokens"]}
    plain = model.score(HISTORIES)
    adapted = get_peft_model(model, LoraConfig(r=2, **how)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_embedding" in name or "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.train().eval()
    assert (model.score(HISTORIES) - plain).abs().max() > 0.05
    with adapted.disable_adapter():
        model.train().eval()
        torch.testing.assert_close(model.score(HISTORIES), plain)


# ---- modes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.recommend(HISTORIES, k=2),
        lambda model: model.score(HISTORIES),
        lambda model: model.gates(),
        lambda model: UserSessions(model, 4096).recommend({"a user": [1]}),
    ],
    ids=["recommend", "score", "gates", "sessions"],
)
def test_every_module_has_its_own_mode_again(use):
    model = tiny_model(dropout=0.5, modality_dropout=0.5).train()
    model.backbone.model.layers[0].eval()
    model.dropout.eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    use(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(RuntimeError), model.evaluating():
        raise RuntimeError
    assert {name: module.training for name, module in model.named_modules()} == before


def test_sasrec_gives_modes_back_too():
    model = SASRec(5).train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    model.score([[1, 2]])
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_a_hook_that_only_looks_on_changes_no_gradient(family):
    """Nor does the kernel, which reads the weight itself: a row of padding gets no gradient where it is text either."""
    model, ids = tiny_model(family), torch.tensor([[3, 0, 64, 65, 0, 66]])

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return model.backbone.get_input_embeddings().weight.grad.clone()

    plain = gradient()
    model.backbone.get_input_embeddings().register_forward_hook(lambda module, args, output: None)
    torch.testing.assert_close(gradient(), plain)
