"""What is kept between calls never outlives what it was computed from, however that was changed."""

import copy
import math
import random
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError
from speeder.model import kv_cache
from speeder.model.content import Kept, checksums, content_of, read_once
from speeder.model.experts import MLPExpert
from speeder.model.explain import explain
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.mrc import MRC
from speeder.model.sequences import pack_batch
from speeder.retrieval.shards import write_token_shards
from speeder.serving import sessions as serving
from speeder.serving.sessions import UserSessions
from tests.model.worlds import FAMILIES, tiny_catalogue, tiny_model

HISTORY = [1, 2, 3]
ADAPTED = ["q_proj", "v_proj"]


def anew(model) -> dict[str, torch.Tensor]:
    """What a copy of the model, which has kept nothing, answers."""
    fresh = copy.deepcopy(model)
    return {"scores": fresh.score([HISTORY]), **fresh.gates()}


def kept(model, sessions: UserSessions) -> dict[str, torch.Tensor]:
    """What the model answers with all that it keeps, after the checks that its ways of answering agree."""
    scores = model.score([HISTORY])
    torch.testing.assert_close(sessions.score({"user": []}), scores, atol=2e-5, rtol=1e-4)
    best = model.recommend([HISTORY], k=5, exclude_seen=False)[0]
    found = torch.tensor([item.score for item in best])
    torch.testing.assert_close(found, scores[0].topk(5).values, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found, scores[0, [item.item for item in best]], atol=2e-5, rtol=1e-4)
    return {"scores": scores, **model.gates()}


def check_after(change: Callable[[], object], model) -> None:
    """Answer, change the model, and answer again: as a model without any memory does, and otherwise than before."""
    sessions = UserSessions(model, 80)
    sessions.extend({"user": HISTORY})
    before = kept(model, sessions)
    change()
    after, expected = kept(model, sessions), anew(model)
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, atol=2e-5, rtol=1e-4)
    assert (after["scores"] - before["scores"]).abs().max() > 1e-3, "the change does not show"


def stirred(tensor: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return tensor + 0.5 * torch.randn(tensor.shape, generator=generator)


PARTS = {
    "mrc.experts.text.down.weight": "an expert",
    "mrc.gates.text.weight": "a gate",
    "mrc.norm_weight": "the tokens' norm",
    "mrc.item_embedding.weight": "the learned embedding",
    "backbone.model.layers.0.self_attn.k_proj.weight": "the first layer's keys",
    "backbone.model.embed_tokens.weight": "the instruction's words",
    "spae.relative_bias": "SPAE's table",
    "item_head.weight": "the item head",
    "mrc.words.vectors.weight": "a word's vector",
    "history.log_weights": "the history look-up",
}


@pytest.mark.parametrize("name", PARTS, ids=PARTS.values())
@pytest.mark.parametrize(
    "way", ["data", "data, swapped", "in place", "inference mode", "state dict", "numpy"]
)
def test_any_write_to_any_weight(name, way):
    """Of an average swapped in by `.data`, torch tells nothing: no version, and for a copy no other address."""
    model = tiny_model(prompt_prefix=[5, 6], item_embedding=True, words=True, history_lookup=True)
    parameter = model.get_parameter(name)

    @torch.no_grad()
    def change() -> None:
        value = stirred(parameter)
        if way == "data":
            parameter.data.copy_(value)
            model.eval()  # which is no change of the mode
        elif way == "data, swapped":
            parameter.data = value
        elif way == "in place":
            parameter.copy_(value)
        elif way == "inference mode":
            with torch.inference_mode():
                parameter.data.copy_(value)
        elif way == "numpy":
            parameter.detach().numpy()[...] = value.numpy()
        else:
            model.load_state_dict({name: value}, strict=False)

    check_after(change, model)


def test_two_rows_that_change_places():
    """A sum or an exclusive or of all numbers stays the same."""
    model = tiny_model(item_embedding=True)
    rows = model.mrc.item_embedding.weight
    check_after(lambda: rows.data.copy_(rows.detach().flip(0)), model)


@pytest.mark.parametrize("name", ["gate_offset", "features_text", "present"])
def test_buffers(name):
    model = tiny_model()
    buffer = model.mrc.get_buffer(name)
    model.mrc.present.data[:, 0] = True  # so that no item ends without a modality

    def change() -> None:
        value = stirred(buffer.float()) if name != "present" else torch.tensor([True, False, False])
        buffer.data.copy_(value)

    check_after(change, model)


@pytest.mark.parametrize("change", ["off", "other", "scale", "merged"])
def test_adapters_that_are_switched(change):
    """An adapter's copy of MRC, and LoRA in the backbone: `.training`, addresses and versions stay as they are."""
    model = tiny_model(prompt_prefix=[5])
    settings = {"target_modules": ADAPTED, "modules_to_save": ["mrc"], "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(**settings)).eval()
    adapted.add_adapter("other", LoraConfig(**settings, r=4))
    with torch.no_grad():
        for part in model.mrc.modules_to_save.values():
            for parameter in part.parameters():
                parameter.copy_(stirred(parameter))

    def scale() -> None:
        for module in adapted.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] *= 3

    if change == "off":
        sessions = UserSessions(model, 80)
        sessions.extend({"user": HISTORY})
        before = kept(model, sessions)["scores"]
        with adapted.disable_adapter():
            inside, expected = kept(model, sessions)["scores"], anew(model)["scores"]
        torch.testing.assert_close(inside, expected, atol=2e-5, rtol=1e-4)
        assert (inside - before).abs().max() > 1e-3
        torch.testing.assert_close(kept(model, sessions)["scores"], before, atol=2e-5, rtol=1e-4)
        return
    steps = {"other": lambda: adapted.set_adapter("other"), "scale": scale}
    if change == "merged":
        steps["merged"] = lambda: (scale(), adapted.merge_adapter())
    check_after(steps[change], model)


def test_a_hook_may_do_anything():
    """Nothing is kept of a module with a hook, whose function may change by itself."""
    model, factor = tiny_model(), [1.0]
    model.mrc.experts["text"].register_forward_hook(lambda module, args, output: output * factor[0])
    check_after(lambda: factor.__setitem__(0, -2.0), model)


def test_a_parametrization():
    model = tiny_model()
    check_after(lambda: parametrizations.orthogonal(model.mrc.experts["text"].up), model)


def test_a_module_that_draws_at_random_is_not_kept():
    model = tiny_model(modality_dropout=0.5)
    model.mrc.train()
    torch.manual_seed(0)
    with torch.no_grad():
        draws = [model.item_tokens()[1] for _ in range(5)]
    assert any(not torch.equal(draws[0], draw) for draw in draws[1:])


def test_a_store_of_item_tokens_is_refused_once_mrc_has_changed(tmp_path):
    model = tiny_model()
    model.use_item_store(write_token_shards(model, tmp_path / "shards"))
    before = model.score([HISTORY])
    weight = model.mrc.norm_weight
    weight.data.copy_(2 * weight)
    for ask in (lambda: model.score([HISTORY]), lambda: model.recommend([HISTORY], k=2)):
        with pytest.raises(SpeederError, match="its tokens were made with other weights"):
            ask()
    weight.data.copy_(weight / 2)
    assert torch.equal(model.score([HISTORY]), before)
    weight.data.copy_(2 * weight)
    model.use_item_store(None)
    torch.testing.assert_close(model.score([HISTORY]), anew(model)["scores"])


def test_clear_cache_frees_what_is_kept():
    model = tiny_model(prompt_prefix=[5])
    before = model.score([HISTORY])
    with torch.no_grad():
        tokens = model.item_tokens()[0]
        assert model.item_tokens()[0] is tokens
        model.clear_cache()
        assert model.item_tokens()[0] is not tokens
    assert torch.equal(model.score([HISTORY]), before)


# --- the content itself --------------------------------------------------------------------------------------------


def test_content_is_read_once_where_nothing_may_change():
    layer = nn.Linear(3, 2).eval()
    with read_once(layer):
        first = content_of(layer)
        layer.weight.data.zero_()
        assert content_of(layer) == first
    assert content_of(layer) != first


def test_equal_contents_of_equal_modules_only():
    one = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)).eval()
    same, other = copy.deepcopy(one), copy.deepcopy(one)
    other[1].p = 0.2
    assert content_of(one) == content_of(same) != content_of(other)
    assert content_of(one) != content_of(one[0], one[1])
    assert content_of(one.double()) != content_of(same)
    tied, untied = nn.ModuleList([one[0], one[0]]), nn.ModuleList([one[0], copy.deepcopy(one[0])])
    assert content_of(tied.eval()) != content_of(untied.eval())


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.train(),
        lambda layer: layer.register_forward_pre_hook(lambda module, args: None),
        lambda layer: setattr(layer, "forward", layer.forward),
        lambda layer: layer.to("meta"),
    ],
    ids=["training", "hook", "forward replaced", "not in memory"],
)
def test_where_the_content_is_not_known_nothing_is_kept(change):
    layer, values = nn.Linear(3, 2).eval(), Kept()
    assert values.get(content_of(layer), lambda: "old") == "old"
    assert values.get(content_of(layer), lambda: "new") == "old"
    change(layer)
    assert content_of(layer) is None
    assert values.get(content_of(layer), lambda: "new") == "new"
    assert values.get(content_of(layer), lambda: "newer") == "newer"


def test_what_fails_to_be_computed_is_not_kept():
    layer, values = nn.Linear(3, 2).eval(), Kept()
    with pytest.raises(MemoryError):
        values.get(content_of(layer), lambda: (_ for _ in ()).throw(MemoryError()))
    assert values.get(content_of(layer), lambda: "right") == "right"


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 99), chunks=st.integers(0, 2), seed=st.integers(0, 99), data=st.data())
def test_checksums_of_an_accelerator_tell_contents_apart(size, chunks, seed, data):
    """Computed here on the CPU: one changed bit, and any two numbers that change places."""
    generator = torch.Generator().manual_seed(seed)
    count = size + 4 * chunks * (1 << 20)
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    first = checksums(raw)
    assert first.shape == (math.ceil(count / (4 << 20)),)
    assert torch.equal(first, checksums(raw.clone()))
    place, bit = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, 7))
    other = raw.clone()
    other[place] ^= 1 << bit
    assert not torch.equal(first, checksums(other))
    rolled = raw.roll(1)
    assert torch.equal(rolled, raw) or not torch.equal(first, checksums(rolled))


# --- what a reader of the first version found ----------------------------------------------------------------------


def adapted_model():
    """A model with an adapter's own copy of MRC, and the whole of it."""
    model = tiny_model()
    settings = {"target_modules": ADAPTED, "modules_to_save": ["mrc"], "init_lora_weights": False}
    whole = get_peft_model(model, LoraConfig(**settings)).eval()
    with torch.no_grad():
        for part in model.mrc.modules_to_save.values():
            for parameter in part.parameters():
                parameter.copy_(stirred(parameter))
    return model, whole


def test_what_runs_within_generate_may_switch_adapters():
    """As a processor that contrasts a model with its base does."""
    model, whole = adapted_model()
    ids, seen = torch.tensor([[65, 66, 67]]), []

    class Contrast(LogitsProcessor):
        def __call__(self, input_ids, scores):
            with whole.disable_adapter():
                model.clear_cache()
                seen.append(model.score([HISTORY]))
            return scores

    expected = anew(model)["scores"]
    how = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(ids, **how)
    assert torch.equal(model.generate(ids, logits_processor=[Contrast()], **how), plain)
    with whole.disable_adapter():
        torch.testing.assert_close(seen[-1], anew(model)["scores"])
    torch.testing.assert_close(model.score([HISTORY]), expected)


def test_casts_that_autocast_keeps_do_not_come_into_later_regions():
    """Torch casts a weight once in a region of autocast, also if it changes in it."""
    model = tiny_model(prompt_prefix=[5])
    sessions = UserSessions(model, 80)
    with torch.autocast("cpu", torch.bfloat16):
        sessions.score({"user": HISTORY})
        model.score([HISTORY])
        for parameter in model.parameters():
            parameter.data.copy_(stirred(parameter))
        model.score([HISTORY])
        sessions.score({"user": []})
    with torch.autocast("cpu", torch.bfloat16):
        expected = anew(model)["scores"]
        torch.testing.assert_close(model.score([HISTORY]), expected, atol=0.05, rtol=0.02)
        torch.testing.assert_close(sessions.score({"user": []}), expected, atol=0.05, rtol=0.02)


def test_item_tokens_on_disk_are_refused_of_an_adapter(tmp_path):
    """Their identity is that of weights alone."""
    model, _ = adapted_model()
    with pytest.raises(SpeederError, match="without adapters and hooks, got one at 'mrc'"):
        write_token_shards(model, tmp_path / "shards")
    plain = tiny_model()
    shards = write_token_shards(plain, tmp_path / "shards")
    plain.mrc.experts["text"].register_forward_hook(lambda module, args, output: -output)
    with pytest.raises(SpeederError, match=r"without adapters and hooks, got one at 'experts\.text'"):
        plain.use_item_store(shards)


def test_a_store_stays_in_use_where_weights_are_the_same(tmp_path):
    model = tiny_model()
    model.use_item_store(write_token_shards(model, tmp_path / "shards"))
    before = model.score([HISTORY])
    model.mrc.compile(backend="eager")
    assert torch.equal(model.score([HISTORY]), before)
    explained = explain(model, HISTORY, [4])[0]
    assert explained.score == pytest.approx(float(before[0, 4]), abs=1e-4)


def test_hooks_on_the_text_embedding_see_items_too():
    model, factor = tiny_model(), [1.0]
    words = model.backbone.get_input_embeddings()
    words.register_forward_hook(lambda module, args, output: output * factor[0])
    check_after(lambda: factor.__setitem__(0, -2.0), model)


@pytest.mark.parametrize("kept_by", ["item_tokens", "gates"])
def test_who_writes_into_what_was_returned_changes_no_answer(kept_by):
    model = tiny_model()
    expected = kept(model, sessions_of(model))
    with torch.no_grad():
        if kept_by == "item_tokens":
            model.item_tokens()[0].mul_(3)
        else:
            for weights in model.gates().values():
                weights.mul_(100)
    for name, value in kept(model, sessions_of(model)).items():
        torch.testing.assert_close(value, expected[name])


def sessions_of(model) -> UserSessions:
    sessions = UserSessions(model, 80)
    sessions.extend({"user": HISTORY})
    return sessions


def test_a_state_dict_brings_which_rows_are_trained():
    model, other = tiny_model(item_embedding=True), tiny_model(item_embedding=True)
    model.set_trained_items(torch.arange(20) < 5)
    other.score([HISTORY])
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.score([HISTORY]), model.score([HISTORY]))
    assert (other.gates()["item"][5:] == 0).all()


@dataclass
class Settings:
    scale: float = 1.0


class Part(nn.Module):
    """A module with attributes of any kind."""

    def __init__(self, **attributes: object):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        vars(self).update(attributes)


class Named(dict):
    """A mapping with attributes."""


class Texts(list):
    """A list with attributes."""


class Random(random.Random):
    """Holds its state in C."""


class Slotted(Named):
    __slots__ = ("scale",)


class Colour(Enum):
    RED = 1


Point = namedtuple("Point", "place")


def with_scale(value):
    value.scale = 1.0
    return value


@pytest.mark.parametrize(
    "attributes, change",
    [
        ({"named": with_scale(Named(a=1))}, lambda part: setattr(part.named, "scale", 2.0)),
        ({"named": with_scale(Named(a=1))}, lambda part: part.named.__setitem__("a", 2)),
        ({"texts": with_scale(Texts("a"))}, lambda part: setattr(part.texts, "scale", 2.0)),
        ({"ordered": OrderedDict(a=[1])}, lambda part: part.ordered["a"].append(2)),
        ({"other": UserDict(a=[1])}, lambda part: part.other["a"].append(2)),
        ({"counts": defaultdict(int)}, lambda part: setattr(part.counts, "default_factory", float)),
        ({"point": Point([1])}, lambda part: part.point.place.append(2)),
        ({"flag": 1}, lambda part: setattr(part, "flag", True)),
        ({"number": np.float32(1)}, lambda part: setattr(part, "number", np.float32(2))),
        ({"plain": SimpleNamespace(a=1)}, lambda part: setattr(part.plain, "a", 2)),
        ({"colour": Colour.RED}, lambda part: setattr(part, "colour", None)),
        ({"settings": Settings()}, lambda part: setattr(part.settings, "scale", 2.0)),
        ({"queue": deque([1])}, lambda part: part.queue.append(2)),
        ({"nested": {"a": [Settings()]}}, lambda part: setattr(part.nested["a"][0], "scale", 2.0)),
        ({}, lambda part: setattr(part.weight, "scales", torch.ones(2))),
        ({"table": np.ones(3)}, lambda part: part.table.__setitem__(0, 5)),
    ],
    ids=[
        "dict with attributes",
        "dict",
        "list with attributes",
        "ordered",
        "user's dict",
        "default",
        "named tuple",
        "truth",
        "scalar",
        "namespace",
        "enum",
        "dataclass",
        "deque",
        "nested",
        "beside a weight",
        "array",
    ],
)
def test_attributes_that_are_changed_in_place(attributes, change):
    part = Part(**attributes).eval()
    before = content_of(part)
    assert before is not None and content_of(part) == before
    change(part)
    assert content_of(part) != before


def round_and_round(depth: int = 10_000) -> list:
    """Lists in lists, deeper than Python calls."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 2).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([torch.ones(2)]),
        torch.ones(2, dtype=torch.complex64).conj(),
        np.array([object()]),
        object.__new__(type("Slotted", (), {"__slots__": ("place",)})),
        Slotted(),
        random.Random(0),
        Random(0),
        torch.Generator(),
        object(),
        round_and_round(),
    ],
    ids=[
        "sparse",
        "quantized",
        "nested",
        "conjugate",
        "objects",
        "slots",
        "dict with slots",
        "random",
        "of random",
        "generator",
        "bare object",
        "deep",
    ],
)
def test_what_cannot_be_read_is_not_kept(tensor):
    assert content_of(Part(strange=tensor).eval()) is None


def test_a_hook_for_all_modules_counts():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        assert content_of(nn.Linear(2, 2).eval()) is None
    finally:
        handle.remove()


def test_in_one_call_also_an_unknown_content_is_computed_once(monkeypatch):
    model, calls = tiny_model(prompt_prefix=[5]), []
    model.mrc.experts["text"].train()
    forward = MRC.forward
    monkeypatch.setattr(MRC, "forward", lambda *args: calls.append(1) or forward(*args))
    model.recommend([HISTORY] * 9, k=2, batch_size=3)
    assert len(calls) == 1
    model.recommend([HISTORY], k=2)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "step",
    [
        lambda model, folder: model.save_pretrained(folder),
        lambda model, folder: setattr(model.config, "id2label", {0: "a"}),
        lambda model, folder: model(torch.tensor([[65, 66]])),  # with gradients
        lambda model, folder: model.generate(torch.tensor([[65, 66]]), max_new_tokens=1, pad_token_id=0),
    ],
    ids=["save", "config", "gradients", "generate"],
)
def test_what_changes_nothing_costs_nothing(step, monkeypatch, tmp_path):
    model, calls = tiny_model(prompt_prefix=[5]), []
    sessions = sessions_of(model)
    model.score([HISTORY])
    table, prefix = model._kept_tokens._kept[1][0], model._kept_prefix._kept[1]
    step(model, tmp_path / "saved")
    model.score([HISTORY])
    run = kv_cache.continued_states

    def counted(model, table, sequences, kept, cache):
        calls.extend(sequence.shape[1] - past for sequence, past in zip(sequences, kept, strict=True))
        return run(model, table, sequences, kept, cache)

    monkeypatch.setattr(serving, "continued_states", counted)
    sessions.score({"user": []})
    assert calls in ([], [1]), "a user's history was kept"
    assert model._kept_tokens._kept[1][0] is table and model._kept_prefix._kept[1] is prefix


def test_no_old_table_stays_alive():
    model = tiny_model(prompt_prefix=[5])
    sessions = sessions_of(model)
    model.score([HISTORY])
    old = weakref.ref(model._kept_tokens._kept[1][0])
    model.clear_cache()
    assert old() is None and sessions.memory().users == 1


def test_negatives_follow_the_exponent():
    model = tiny_model(negatives="sampled", num_negatives=8, negatives_exponent=1.0)
    model.negatives.set_counts(np.arange(20) + 1.0)
    items = torch.arange(20)
    first = model.negatives._probability(items)
    model.config.negatives_exponent = 0.5
    other = model.negatives._probability(items)
    torch.testing.assert_close(other, (first.sqrt() / first.sqrt().sum()))


def test_inference_mode_leaves_nothing_that_cannot_be_used_later():
    model = tiny_model(prompt_prefix=[5])
    with torch.inference_mode():
        model.recommend([HISTORY], k=2)
    with torch.no_grad():
        tokens = model.item_tokens()[0]
    nn.Linear(32, 1)(tokens[:, 0]).sum().backward()
    model.gates()["text"].mul_(2)


# --- what a second reader found ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cleared", [False, True])
def test_a_hook_within_a_call_may_change_the_model(cleared):
    """Its changes are in no content that was read before it."""
    model, (once, inner) = tiny_model(prompt_prefix=[5]), ([1], [])
    expected, old = anew(model)["scores"], copy.deepcopy(model.state_dict())
    sessions = sessions_of(model)

    def hook(module, args, output):
        if once:
            once.clear()
            for parameter in (
                model.mrc.norm_weight,
                model.get_parameter("backbone.model.layers.0.mlp.up_proj.weight"),
            ):
                parameter.data.mul_(-2)
            if cleared:
                model.clear_cache()
            inner.extend([model.score([HISTORY]), sessions.score({"user": []})])

    handle = model.item_head.register_forward_hook(hook)
    model.score([HISTORY])
    handle.remove()
    changed = anew(model)["scores"]
    for scores in inner:
        torch.testing.assert_close(scores, changed, atol=2e-5, rtol=1e-4)
    model.load_state_dict(old)
    for scores in (model.score([HISTORY]), sessions.score({"user": []})):
        torch.testing.assert_close(scores, expected, atol=2e-5, rtol=1e-4)


def test_a_compiled_model():
    model = tiny_model(prompt_prefix=[5])
    ids = torch.tensor([[5, 64, 65]])
    with torch.no_grad():
        before = model(ids).logits
        model.compile(backend="eager")
        torch.testing.assert_close(model(ids).logits, before)
        model.mrc.norm_weight.data.mul_(-2)
        torch.testing.assert_close(model(ids).logits, copy.deepcopy(model)(ids).logits)
    torch._dynamo.reset()


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_keys_that_a_longer_sequence_turns_anew_are_not_kept(rope):
    settings = {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
    if rope == "longrope":
        settings |= {"short_factor": [1.0] * 4, "long_factor": [6.0] * 4}
    sizes = dict(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=8, rope_parameters=settings))
    model = SpeederForCausalLM.from_backbone(backbone, tiny_catalogue(), prompt_prefix=[5, 6, 7])
    for history in (list(range(1, 16)), [1, 2]):
        states = model.last_states(**pack_batch([model.sequence(history)]))
        expected = model.item_logits(model.item_queries(states), model.item_table())
        torch.testing.assert_close(model.score([history]), expected, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="model: expected a backbone whose keys can be kept"):
        UserSessions(model, 80)


@pytest.mark.parametrize("family", FAMILIES)
def test_content_is_known_of_every_family(family):
    """After all that transformers adds to layers: hooks for hidden states and for gradient checkpointing."""
    model = tiny_model(family)
    model(torch.tensor([[5, 64]]), output_hidden_states=True)
    model.gradient_checkpointing_enable()
    model.eval()
    for part in (model.backbone.get_decoder(), model.spae, model.mrc):
        assert content_of(part) is not None


def test_functions_count_with_what_they_have_bound():
    scale, settings = [1.0], Settings()
    part = Part(act=lambda x: x * scale[0], method=settings.__eq__).eval()
    before = content_of(part)
    assert before is not None and content_of(part) == before
    scale[0] = 2.0
    assert content_of(part) != before
    before = content_of(part)
    settings.scale = 3.0
    assert content_of(part) != before


def test_a_traced_module_and_a_mapped_weight_are_not_known():
    model = tiny_model()
    model.mrc.experts["text"] = torch.jit.trace(model.mrc.experts["text"], torch.randn(1, 7))
    torch.testing.assert_close(model.score([HISTORY]), model.score([HISTORY]))
    assert content_of(Part(parts={nn.Linear(2, 2).eval()}).eval()) is not None


def test_a_store_is_refused_where_mrc_computes_others(tmp_path):
    """A feature or a hook for all modules is in no hash of weights."""
    model = tiny_model()
    model.use_item_store(write_token_shards(model, tmp_path / "shards"))
    model.mrc.features_text.data.mul_(-2)
    model.mrc.features_image.data.mul_(-2)
    with pytest.raises(SpeederError, match="item store: expected the tokens that MRC computes"):
        model.score([HISTORY])


def test_counts_cannot_be_written():
    model = tiny_model()
    model.set_item_counts([[1, 1, 1, 2, 2, 3]])
    with pytest.raises(TypeError):
        model.item_counts.counts["id7"] = 99
    model.item_counts.ordered(model.catalogue)[1][:] = 0
    best = model.recommend([[]], k=2, fallback="popularity")[0]
    assert [(item.item, item.score) for item in best] == [(1, 3.0), (2, 2.0)]
    assert copy.deepcopy(model).item_counts.counts == model.item_counts.counts


def test_every_adapters_copy_of_mrc_gets_the_catalogue():
    """PEFT's wrapper hands a call to the active copy alone."""
    model = tiny_model()
    settings = {"target_modules": ADAPTED, "modules_to_save": ["mrc"]}
    whole = get_peft_model(model, LoraConfig(**settings)).eval()
    whole.add_adapter("other", LoraConfig(**settings))
    whole.eval()
    expected = tiny_model()
    for each in (model, expected):
        each.set_catalogue(tiny_catalogue(25, seed=9))
    whole.set_adapter("other")
    whole.eval()
    torch.testing.assert_close(model.score([HISTORY]), expected.score([HISTORY]), atol=2e-5, rtol=1e-4)
    with whole.disable_adapter():
        torch.testing.assert_close(model.score([[20]]), expected.score([[20]]), atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="item_table: expected 25 items, as the catalogue has, got 20"):
        model.item_logits(torch.zeros(1, 32), torch.zeros(20, 1, 32))


def test_weights_that_a_region_keeps_do_not_outlive_it():
    model = tiny_model()
    layer = model.mrc.experts["text"].down
    parametrizations.weight_norm(layer)
    model.eval()
    with parametrize.cached():
        model.score([HISTORY])
        layer.parametrizations.weight.original0.data.mul_(-3)
        model.score([HISTORY])
    torch.testing.assert_close(model.score([HISTORY]), anew(model)["scores"], atol=2e-5, rtol=1e-4)


def test_sessions_of_a_model_in_training_score_as_in_evaluation():
    model = tiny_model(modality_dropout=0.5)
    sessions = sessions_of(model)
    expected = model.score([HISTORY])
    model.train()
    torch.testing.assert_close(sessions.score({"user": []}), expected, atol=2e-5, rtol=1e-4)


def test_a_catalogue_set_in_inference_mode_serves_training():
    model = tiny_model()
    with torch.inference_mode():
        model.set_catalogue(tiny_catalogue(25, seed=2))
    model.train()
    model(torch.tensor([[5, 64, 65]]), labels=torch.tensor([[-100, 64, 65]])).loss.backward()


def test_a_catalogue_that_was_refused_leaves_no_trace():
    model = tiny_model(item_embedding=True)
    model.config.warm_items_hash = None  # as of version 0.1.0
    good = model.catalogue
    with pytest.raises(SpeederError, match="expected the modality"):
        model.set_catalogue(ItemCatalogue(good.ids[::-1], features={"text": good.features["text"]}))
    model.set_catalogue(good)


# --- what a fourth reader found ------------------------------------------------------------------------------------


def test_a_list_that_holds_itself():
    queue: list = []
    queue.append(queue)
    part = Part(queue=queue).eval()
    before = content_of(part)
    assert before is not None and content_of(part) == before
    queue.append(1)
    assert content_of(part) != before


@pytest.mark.parametrize("way", ["another function", "its code", "a number"])
def test_a_class_that_is_patched(way, monkeypatch):
    """As in a notebook: a method is replaced, or an editor's reloading writes new code into the old function."""
    model = tiny_model(prompt_prefix=[5])
    layer = type(model.backbone.get_decoder().layers[0].mlp)

    def other(self, x):
        return -self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def change() -> None:
        if way == "another function":
            forward = MLPExpert.forward
            monkeypatch.setattr(MLPExpert, "forward", lambda self, features: -2 * forward(self, features))
        elif way == "its code":
            monkeypatch.setattr(layer.forward, "__code__", other.__code__)
        else:
            monkeypatch.setattr(Scaled, "scale", -2.0)

    if way == "a number":
        model.mrc.experts["text"].up = Scaled(model.mrc.experts["text"].up).eval()
    check_after(change, model)


class Scaled(nn.Module):
    """A layer whose output is multiplied by a number of the class."""

    scale = 1.0

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer, self.in_features = layer, layer.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.layer(x)


@pytest.mark.parametrize("step", ["normalised", "data"])
@pytest.mark.parametrize("table", ["item_tokens", "scoring_table"])
def test_vectors_that_are_normalised_in_place(table, step):
    """As for an index of another library, which takes numpy's view of them: torch's versions do not tell."""
    model = tiny_model(prompt_prefix=[5])
    expected = kept(model, sessions_of(model))
    with torch.no_grad():
        vectors = model.item_tokens()[0][:, 0] if table == "item_tokens" else model.scoring_table()
        if step == "data":
            vectors.data.mul_(3)
        else:
            view = vectors.numpy()
            view /= np.linalg.norm(view, axis=1, keepdims=True)
    for name, value in kept(model, sessions_of(model)).items():
        torch.testing.assert_close(value, expected[name])


def test_a_catalogue_that_is_assigned():
    model, expected = tiny_model(), tiny_model()
    model.score([HISTORY])
    model.catalogue = tiny_catalogue(25, seed=9)
    expected.set_catalogue(model.catalogue)
    assert model.config.num_items == 25
    torch.testing.assert_close(model.score([HISTORY]), expected.score([HISTORY]))


@pytest.mark.parametrize("words", ["plain", "called"])
def test_several_threads_at_once(words):
    """Each pass has hooks for itself, in the last layer and in a text embedding that has to be called."""
    model = tiny_model()
    if words == "called":
        embedding = model.backbone.get_input_embeddings()
        embedding.register_forward_hook(lambda module, args, output: output * 2)
    histories = [[item % 20, item * 7 % 20, item * 3 % 20][: 1 + item % 3] for item in range(40)]
    expected = [model.score([history]) for history in histories]
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda history: model.score([history]), histories))
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=2e-5, rtol=1e-4)


def test_a_kept_value_that_another_thread_replaces():
    values: Kept[str] = Kept()
    values.get((1,), lambda: "one")

    class Content(tuple):
        def __ne__(self, other: object) -> bool:
            values.clear()  # as another thread does, between the comparison and the use
            return tuple.__ne__(self, other)

    values._kept = (Content((1,)), "one")
    assert values.get((1,), lambda: "new") == "one"
