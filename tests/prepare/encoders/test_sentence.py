"""Text models in sentence-transformers' layout and without it: pooling, what follows it, how texts are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import AutoTokenizer, BertModel, PreTrainedModel, T5Config, T5EncoderModel, T5Model

from speeder.errors import SpeederError
from speeder.prepare.encoders.pretrained import load_frozen
from speeder.prepare.encoders.text import TextEncoder
from tests.prepare.encoders.tiny import SIZES, WORDS, list_modules, save_bert, save_tokenizer, write

TEXTS = ["dogs cats robbery", "Heat", "title : bank robbery dogs dogs cats", "cats bank"]
EXPECTED = {
    "cls_token": lambda states: states[0],
    "max_tokens": lambda states: states.max(dim=0).values,
    "mean_tokens": lambda states: states.mean(dim=0),
    "mean_sqrt_len_tokens": lambda states: states.sum(dim=0) / len(states) ** 0.5,
    "weightedmean_tokens": lambda states: (
        (states * torch.arange(1.0, len(states) + 1)[:, None]).sum(dim=0) / sum(range(1, len(states) + 1))
    ),
    "lasttoken": lambda states: states[-1],
}


@pytest.fixture
def bert(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    return tmp_path / "bert", save_bert(tmp_path / "bert", padding_side="left")


def states(folder: Path, model: PreTrainedModel, text: str) -> torch.Tensor:
    """Last hidden states of one text alone, so that nothing is padded: `(T, H)`."""
    batch = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).last_hidden_state[0]


def encode(folder: Path, texts: list[str] = TEXTS) -> torch.Tensor:
    return TextEncoder(str(folder)).encode(texts, cache=folder.parent / "cache", progress=False)[0]


@pytest.mark.parametrize("mode", EXPECTED)
def test_every_way_of_pooling(bert: tuple[Path, PreTrainedModel], mode: str) -> None:
    folder, model = bert
    list_modules(folder, {f"pooling_mode_{name}": name == mode for name in EXPECTED})
    expected = torch.stack([EXPECTED[mode](states(folder, model, text)) for text in TEXTS])
    torch.testing.assert_close(encode(folder), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.exact
def test_several_ways_stand_side_by_side_in_one_order(bert: tuple[Path, PreTrainedModel]) -> None:
    folder, model = bert
    list_modules(folder, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True})
    old = encode(folder, TEXTS[:1])
    hidden = states(folder, model, TEXTS[0])
    torch.testing.assert_close(old[0], torch.cat([hidden[0], hidden.mean(dim=0)]), atol=1e-5, rtol=1e-4)
    list_modules(folder, {"pooling_mode": ["cls", "mean"]})
    assert torch.equal(encode(folder, TEXTS[:1]), old)
    list_modules(folder, {"pooling_mode": "lasttoken"})
    torch.testing.assert_close(encode(folder, TEXTS[:1])[0], hidden[-1], atol=1e-5, rtol=1e-4)


def test_rows_have_length_1_where_the_folder_says_so_or_says_nothing(
    bert: tuple[Path, PreTrainedModel],
) -> None:
    folder, model = bert
    mean = states(folder, model, TEXTS[0]).mean(dim=0)
    expected = normalize(mean, dim=0)
    torch.testing.assert_close(encode(folder, TEXTS[:1])[0], expected, atol=1e-5, rtol=1e-4)
    list_modules(folder, {"pooling_mode": "mean"}, "Normalize")
    torch.testing.assert_close(encode(folder, TEXTS[:1])[0], expected, atol=1e-5, rtol=1e-4)
    list_modules(folder, {"pooling_mode": "mean"})
    assert mean.norm() > 1.1
    torch.testing.assert_close(encode(folder, TEXTS[:1])[0], mean, atol=1e-5, rtol=1e-4)


def save_dense(folder: Path, **settings: object) -> dict[str, torch.Tensor]:
    weights = {"linear.weight": torch.randn(5, SIZES["hidden_size"]), "linear.bias": torch.randn(5)}
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    activation = "torch.nn.modules.activation.Tanh"
    sizes = {"in_features": SIZES["hidden_size"], "out_features": 5, "bias": True}
    write(folder / "2_Dense" / "config.json", {**sizes, "activation_function": activation, **settings})
    return weights


def test_a_linear_layer_after_the_pooling(bert: tuple[Path, PreTrainedModel]) -> None:
    folder, model = bert
    list_modules(folder, {"pooling_mode": "mean"}, "Dense", "Normalize")
    weights = save_dense(folder)
    encoder = TextEncoder(str(folder))
    features, _ = encoder.encode(TEXTS[:1], cache=folder.parent / "cache", progress=False)
    mean = states(folder, model, TEXTS[0]).mean(dim=0)
    expected = torch.tanh(weights["linear.weight"] @ mean + weights["linear.bias"])
    assert encoder.width == 5
    torch.testing.assert_close(features[0], normalize(expected, dim=0), atol=1e-5, rtol=1e-4)
    save_dense(folder)
    assert TextEncoder(str(folder)).identity != encoder.identity


def test_texts_are_cut_lowered_and_prompted_as_the_folder_says(bert: tuple[Path, PreTrainedModel]) -> None:
    folder, model = bert
    list_modules(folder, {"pooling_mode": "mean"})
    write(folder / "sentence_bert_config.json", {"max_seq_length": 6, "do_lower_case": True})
    prompts = {"prompts": {"query": "cats ", "document": "title : "}, "default_prompt_name": "query"}
    write(folder / "config_sentence_transformers.json", prompts)
    features = encode(folder, ["Heat dogs cats", "heat dogs"])
    torch.testing.assert_close(features[0], features[1])  # six tokens: [CLS] title : heat dogs [SEP]
    expected = states(folder, model, "title : heat dogs").mean(dim=0)
    torch.testing.assert_close(features[0], expected, atol=1e-5, rtol=1e-4)
    prompts["prompts"].pop("document")  # then the default one
    write(folder / "config_sentence_transformers.json", prompts)
    expected = states(folder, model, "cats heat dogs").mean(dim=0)
    torch.testing.assert_close(encode(folder, ["Heat dogs"])[0], expected, atol=1e-5, rtol=1e-4)


def test_without_a_limit_of_its_own_a_listed_model_reads_what_it_can(
    bert: tuple[Path, PreTrainedModel],
) -> None:
    folder, model = bert
    list_modules(folder, {"pooling_mode": "cls"})
    write(folder / "sentence_bert_config.json", {"max_seq_length": None})
    text = "dogs cats " * 30
    expected = states(folder, model, " ".join(text.split()[:38]))[0]  # 40 places, two for [CLS] and [SEP]
    torch.testing.assert_close(encode(folder, [text])[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.exact
def test_an_older_folder_keeps_the_model_in_a_subfolder(
    bert: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    list_modules(bert[0], {"pooling_mode_cls_token": True})
    expected = encode(bert[0])
    older = tmp_path / "older"
    older.mkdir()
    shutil.move(bert[0] / "1_Pooling", older)
    modules = json.loads((bert[0] / "modules.json").read_text())
    (bert[0] / "modules.json").unlink()
    shutil.move(bert[0], older / "0_BERT")
    modules[0]["path"] = "0_BERT"
    write(older / "modules.json", modules)
    assert torch.equal(encode(older), expected)


def test_of_an_encoder_with_a_decoder_the_encoder_is_taken(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": len(WORDS)}
    whole = T5Model(T5Config(**sizes)).eval()
    half = T5EncoderModel(T5Config(**sizes)).eval()
    half.load_state_dict(whole.state_dict(), strict=False)
    for name, model in (("whole", whole), ("half", half)):
        model.save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
        expected = normalize(states(tmp_path / name, half, TEXTS[0]).mean(dim=0), dim=0)
        torch.testing.assert_close(encode(tmp_path / name, TEXTS[:1])[0], expected, atol=1e-5, rtol=1e-4)


def identity(folder: Path) -> str:
    return TextEncoder(str(folder)).identity


def change_json(path: Path, **changes: object) -> None:
    write(path, {**json.loads(path.read_text()), **changes})


def test_whatever_changes_the_features_changes_the_key(
    bert: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    folder = bert[0]
    list_modules(folder, {"pooling_mode": "mean"})
    first = identity(folder)
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert identity(tmp_path / "elsewhere") == first

    seen = {first}

    def check(what: str) -> None:
        now = identity(folder)
        assert now not in seen, f"{what} left the key as it was"
        seen.add(now)

    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"][3] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    check("a weight")
    change_json(folder / "config.json", hidden_act="relu")
    check("the activation")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    write(folder / "tokenizer.json", tokenizer)
    check("the tokenizer")
    write(folder / "1_Pooling" / "config.json", {"pooling_mode": "max"})
    check("the pooling")
    list_modules(folder, {"pooling_mode": "max"}, "Normalize")
    check("the length")
    write(folder / "sentence_bert_config.json", {"max_seq_length": 9})
    check("the number of tokens")
    write(folder / "config_sentence_transformers.json", {"prompts": {"document": "title : "}})
    check("the prompt")


@pytest.mark.exact
def test_a_pooler_that_nobody_reads_may_be_missing(bert: tuple[Path, PreTrainedModel]) -> None:
    """transformers draws it at random, which must not make another key of every run."""
    folder = bert[0]
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("pooler.")}
    assert len(kept) == len(weights) - 2
    before = encode(folder)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert identity(folder) == identity(folder)
    assert torch.equal(encode(folder), before)
    del kept["encoder.layer.1.output.dense.bias"]
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SpeederError, match=r"lack the weights encoder\.layer\.1\.output\.dense\.bias"):
        TextEncoder(str(folder))


@pytest.mark.exact
def test_weights_lie_where_fresh_ones_do(bert: tuple[Path, PreTrainedModel]) -> None:
    """At multiples of 64 bytes, whatever else the file holds: features must not follow from that."""
    model, _ = load_frozen(BertModel, str(bert[0]))
    assert {tensor.data_ptr() % 64 for tensor in (*model.parameters(), *model.buffers())} == {0}
    with safe_open(bert[0] / "model.safetensors", "pt") as file:
        places = {file.get_tensor(name).data_ptr() % 64 for name in file.keys()}  # noqa: SIM118, no mapping
    assert places != {0}, "in a file whose weights lie so by chance nothing is tested"


def only_pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_its_own_code(folder: Path) -> None:
    change_json(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"})
    (folder / "own.py").write_text("raise SystemExit('this must never run')")


def cut_off(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])


def residual_dense(folder: Path) -> None:
    list_modules(folder, {"pooling_mode": "mean"}, "Dense")
    save_dense(folder, use_residual=True)


def pickled_dense(folder: Path) -> None:
    list_modules(folder, {"pooling_mode": "mean"}, "Dense")
    save_dense(folder)
    (folder / "2_Dense" / "model.safetensors").unlink()


def without_its_prompt(folder: Path) -> None:
    list_modules(folder, {"pooling_mode": "mean", "include_prompt": False})
    write(folder / "config_sentence_transformers.json", {"prompts": {"document": "title : "}})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (only_pickled, "no file named model.safetensors"),
        (with_its_own_code, "contains custom code"),
        (cut_off, "file not fully covered"),
        (lambda folder: list_modules(folder, {}, "CNN"), "got Transformer, Pooling, CNN"),
        (lambda folder: list_modules(folder, {"pooling_mode": "median"}), "got 'median'"),
        (residual_dense, "2_Dense is of a kind that is not supported"),
        (pickled_dense, "2_Dense has no file named model.safetensors"),
        (without_its_prompt, "leaves its prompt's tokens out"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(
    bert: tuple[Path, PreTrainedModel], spoil, message: str
) -> None:
    spoil(bert[0])
    with pytest.raises(SpeederError, match=r"text encoder '.*bert' cannot be loaded: ") as caught:
        TextEncoder(str(bert[0]))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub's client, without a network; the folder of what it holds of `some/bert`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--some--bert"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("f" * 40)
    return model


@pytest.mark.exact
def test_a_model_of_the_hub_is_pooled_as_its_own_files_say(
    bert: tuple[Path, PreTrainedModel], hub: Path, tmp_path: Path
) -> None:
    list_modules(bert[0], {"pooling_mode_cls_token": True})
    shutil.copytree(bert[0], hub / "snapshots" / ("f" * 40))
    encoder = TextEncoder("some/bert")
    features, _ = encoder.encode(TEXTS, cache=tmp_path / "cache", progress=False)
    assert encoder.name == "some/bert" and encoder.identity == identity(bert[0])
    assert torch.equal(features, encode(bert[0]))


def test_without_a_network_a_model_that_was_never_fetched_is_named(
    bert: tuple[Path, PreTrainedModel], hub: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        SpeederError, match=r"'some/bert' cannot be loaded: .* the Hub cannot be reached"
    ) as caught:
        TextEncoder("some/bert")
    assert "\n" not in str(caught.value) and not caplog.text
    shutil.copytree(bert[0], hub / "snapshots" / ("f" * 40))
    caplog.clear()
    TextEncoder("some/bert")  # of which nobody can say now whether it lists modules
    assert "no connection to check for modules.json" in caplog.text
    (hub / ".no_exist" / ("f" * 40)).mkdir(parents=True)
    for file in ("modules.json", "sentence_bert_config.json"):
        (hub / ".no_exist" / ("f" * 40) / file).touch()
    caplog.clear()
    TextEncoder("some/bert")  # which has none, as a connection once showed
    assert "modules.json" not in caplog.text
