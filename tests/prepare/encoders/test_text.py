"""The text encoder, with real weights: meaning, independence of the batch, empty texts, settings."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from speeder.errors import SpeederError
from speeder.prepare.encoders.text import TextEncoder


@pytest.fixture(scope="module")
def encoder(minilm_folder: Path) -> TextEncoder:
    return TextEncoder(str(minilm_folder))


def test_near_in_meaning_is_near_in_space(encoder: TextEncoder, tmp_path: Path) -> None:
    texts = [
        "A film about dogs and their owners",
        "Puppies and the people who love them, a movie",
        "A thriller about a bank robbery",
        "Gangsters hold up a savings bank",
    ]
    features, present = encoder.encode(texts, cache=tmp_path, progress=False)
    near = features @ features.T
    assert present.all() and features.shape == (4, encoder.width) == (4, 384)
    assert min(near[0, 1], near[2, 3]) > max(near[0, 2], near[0, 3], near[1, 2], near[1, 3]) + 0.1


def test_rows_are_unit_and_do_not_depend_on_their_batch(encoder: TextEncoder, tmp_path: Path) -> None:
    texts = [("word " * n).strip() for n in (1, 3, 300, 40, 7)]
    together, _ = encoder.encode(texts, cache=tmp_path / "together", progress=False)
    alone = torch.cat(
        [
            encoder.encode([text], cache=tmp_path / f"alone{n}", progress=False)[0]
            for n, text in enumerate(texts)
        ]
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(5))


def hidden_states(folder: Path, text: str) -> torch.Tensor:
    batch = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        return AutoModel.from_pretrained(folder)(**batch).last_hidden_state[0]


def test_the_pooling_is_the_mean_over_tokens(
    encoder: TextEncoder, minilm_folder: Path, tmp_path: Path
) -> None:
    text = "A quiet town wakes up."
    hidden = hidden_states(minilm_folder, text)
    expected = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)
    features, _ = encoder.encode([text, "a longer text, so that the first is padded " * 5], cache=tmp_path)
    torch.testing.assert_close(features[0], expected, atol=1e-5, rtol=0)


def test_empty_texts_are_absent(encoder: TextEncoder, tmp_path: Path) -> None:
    features, present = encoder.encode(["", "word", " \n "], cache=tmp_path, progress=False)
    assert present.tolist() == [False, True, False]
    assert not features[[0, 2]].any() and features[1].any()
    features, present = encoder.encode([], cache=tmp_path, progress=False)
    assert features.shape == (0, 384) and present.shape == (0,)


def test_a_second_run_reads_the_cache(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = encoder.encode(["a", "b"], cache=tmp_path, progress=False)
    monkeypatch.setattr(encoder, "_model", None)
    second, _ = encoder.encode(["b", "a"], cache=tmp_path, progress=False)
    assert torch.equal(second, first.flip(0))


def test_folder_settings_change_the_identity_and_the_result(minilm_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "first-token"
    shutil.copytree(minilm_folder, other)
    (other / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (other / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16}))
    mean, first = TextEncoder(str(minilm_folder)), TextEncoder(str(other))
    assert mean.identity != first.identity
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    features, _ = first.encode([words, words + " fifteen sixteen"], cache=tmp_path / "cache", progress=False)
    torch.testing.assert_close(features[0], features[1])  # both are cut to 16 tokens
    token = hidden_states(minilm_folder, words)[0]
    torch.testing.assert_close(features[0], token / token.norm(), atol=1e-5, rtol=0)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpeederError, match=r"text encoder '.*nowhere' cannot be loaded") as caught:
        TextEncoder(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)
