"""Every override takes what the method takes that it overrides, so that transformers may call it as its own."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

import speeder
from speeder.model.sequences import pack_batch
from tests.model.worlds import tiny_model

_P = inspect.Parameter
NAMED = (_P.POSITIONAL_OR_KEYWORD, _P.KEYWORD_ONLY)
KINDS_OF_OWN_CALLS = {"forward", "__init__", "__call__"}  # each class calls these in its own way; see below
LEFT_OUT = {
    # transformers names them, and the order differs between its releases
    ("ItemGenerationMixin", "prepare_inputs_for_generation"): "by name alone",
    ("SpeederProcessor", "from_pretrained"): "by name alone",
}


def _plain(function: Any) -> Any:
    return function.__func__ if isinstance(function, classmethod | staticmethod) else function


def _overrides() -> Iterator[tuple[str, str, Any, Any]]:
    """Class, name, our function and the foreign one that it overrides, for all of `speeder`."""
    for module in pkgutil.walk_packages(speeder.__path__, "speeder."):
        if module.name.endswith("__main__"):
            continue
        loaded = importlib.import_module(module.name)
        for kind in vars(loaded).values():
            if not inspect.isclass(kind) or kind.__module__ != loaded.__name__:
                continue
            foreign = [
                base
                for base in kind.__mro__[1:]
                if base.__module__.split(".")[0] not in ("speeder", "builtins")
            ]
            for name, own in vars(kind).items():
                base = next((base for base in foreign if name in vars(base)), None)
                if base is None or name in KINDS_OF_OWN_CALLS or not inspect.isfunction(_plain(own)):
                    continue
                if inspect.isfunction(_plain(vars(base)[name])):
                    yield kind.__name__, name, _plain(own), _plain(vars(base)[name])


def refusals(own: Any, base: Any) -> list[str]:
    """Ways to call the base's function that ours refuses, or would understand otherwise."""
    ours, theirs = (list(inspect.signature(function).parameters.values())[1:] for function in (own, base))
    any_name = any(p.kind is _P.VAR_KEYWORD for p in ours)
    any_place = any(p.kind is _P.VAR_POSITIONAL for p in ours)
    names = {p.name for p in ours if p.kind in NAMED}
    places = [p.name for p in ours if p.kind in (_P.POSITIONAL_ONLY, _P.POSITIONAL_OR_KEYWORD)]
    found = []
    for place, theirs_ in enumerate(theirs):
        if theirs_.kind in NAMED and theirs_.name not in names and not any_name:
            found.append(f"{theirs_.name}=")
        if theirs_.kind is _P.POSITIONAL_OR_KEYWORD:
            if place < len(places) and places[place] != theirs_.name and theirs_.name in names:
                found.append(f"place {place} is {places[place]}, not {theirs_.name}")
            if place >= len(places) and not any_place:
                found.append(f"{theirs_.name} by its place")
    if not any(p.kind is _P.VAR_POSITIONAL for p in theirs):
        extra = [p for p in ours if p.kind in NAMED and p.default is _P.empty]
        found += [f"{p.name} is required" for p in extra if p.name not in {t.name for t in theirs}]
    if any(p.kind is _P.VAR_KEYWORD for p in theirs) and not any_name:
        found.append("any further name")
    return found


def test_overrides_take_all_that_their_base_takes():
    seen, wrong = set(), {}
    for kind, name, own, base in _overrides():
        seen.add((kind, name))
        found = refusals(own, base)
        if (kind, name) in LEFT_OUT:
            found = [entry for entry in found if "by its place" not in entry]
        if found:
            wrong[f"{kind}.{name}"] = found
    assert not wrong
    assert {("SavingModel", "save_pretrained"), ("SpeederTrainer", "log")} | set(LEFT_OUT) <= seen


def test_a_frozen_signature_is_found():
    class Base:
        def method(self, a, b=1, c=2): ...

    class Frozen(Base):
        def method(self, a): ...

    class Moved(Base):
        def method(self, a, c=2, b=1): ...

    class Open(Base):
        def method(self, a, *args, **kwargs): ...

    assert refusals(Frozen.method, Base.method) == ["b=", "b by its place", "c=", "c by its place"]
    assert refusals(Moved.method, Base.method) and not refusals(Open.method, Base.method)


def test_what_the_trainer_calls_of_a_model_takes_what_it_gives():
    """The methods that the `Trainer`'s own code calls on its model, by their names there."""
    called = set(
        re.findall(r"\bmodel(?:_to_save|_wrapped)?\.(\w+)\(", inspect.getsource(inspect.getmodule(Trainer)))
    )
    ours = {
        name: (own, base)
        for kind, name, own, base in _overrides()
        if kind in ("SavingModel", "ItemGenerationMixin", "SpeederForCausalLM", "TextBaseline")
    }
    assert {"save_pretrained", "train"} & called & set(ours) and "activation_checkpointing_enable" in called
    assert not {name: refusals(*ours[name]) for name in called & set(ours) if refusals(*ours[name])}


def _batches(model, count: int = 4) -> list[dict]:
    sequences = [model.sequence([1, 2, 3, n % 20], target=(n + 4) % 20) for n in range(count)]
    return [
        {
            name: tensor[0]
            for name, tensor in pack_batch([sequence], with_labels=True).items()
            if name != "cu_seqlens"
        }
        for sequence in sequences
    ]


def _collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize(
    "asked",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
    ],
    ids=str,
)
def test_a_trainer_with_checkpointed_activations_trains_as_without(asked, tmp_path):
    if not set(asked) <= set(TrainingArguments.__dataclass_fields__):
        pytest.skip("another transformers")

    def trained(**asked) -> torch.Tensor:
        model = tiny_model()
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", seed=1, **asked
        )
        Trainer(model, arguments, train_dataset=_batches(model), data_collator=_collate).train()
        assert any(getattr(layer, "gradient_checkpointing", False) for layer in model.modules()) == bool(
            asked
        )
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    torch.testing.assert_close(trained(**asked), trained(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
def test_either_name_turns_it_on_and_refuses_the_reentrant_variant(name):
    model = tiny_model()
    if not hasattr(PreTrainedModel, name):
        pytest.skip("another transformers")
    getattr(model, name)()
    assert model.backbone.model.layers[0].gradient_checkpointing
    with pytest.raises(ValueError, match="use_reentrant=False, got True"):
        getattr(model, name)({"use_reentrant": True})
