"""MRC's experts: whitening that stays with the model, and words."""

import copy
import math
from collections import Counter

import pytest
import torch

from speeder.data.catalogue import ItemCatalogue
from speeder.errors import SpeederError
from speeder.model.experts import LinearExpert
from speeder.model.modeling import SpeederForCausalLM
from speeder.model.whitening import Whitening
from speeder.model.words import LONGEST_TEXT, count_words, fit_vocabulary, words_of
from speeder.retrieval.shards import token_identity
from tests.model.worlds import tiny_backbone, tiny_catalogue, tiny_model

TEXTS = ["Red nail polish", "RED nail file", "blue polish, blue", "Crème red", "crème polish", "soap", ""]


def worded(texts=TEXTS, **config):
    ids = [f"i{n}" for n in range(len(texts))]
    features = {"image": torch.randn(len(texts), 6, generator=torch.Generator().manual_seed(1))}
    catalogue = ItemCatalogue(ids, texts, features=features)
    return SpeederForCausalLM.from_backbone(
        tiny_backbone(), catalogue, words=True, experts="linear", **config
    )


def test_words_and_pairs_in_lower_case():
    assert words_of("Crème, RED 5-oz") == ["crème", "red", "5", "oz", "crème red", "red 5", "5 oz"]
    assert words_of("") == []


def test_words_of_all_scripts():
    assert words_of("हिन्दी चाय") == ["हिन्दी", "चाय", "हिन्दी चाय"]  # vowel signs are no letters
    assert words_of("cre\u0300me") == words_of("crème")
    assert words_of("化粧水") == ["化", "粧", "水", "化 粧", "粧 水"]
    assert words_of("น้ำ 5 ml") == ["น้", "ำ", "5", "ml", "น้ ำ", "ำ 5", "5 ml"]
    assert words_of("크림 カバー")[:4] == ["크림", "カ", "バ", "ー"]
    assert len(words_of("a " * 5000)) == 2 * LONGEST_TEXT - 1


def test_items_of_a_script_without_spaces_share_words():
    hashes, _ = fit_vocabulary(["資生堂化粧水", "薬用化粧水", "口紅"])
    _, _, starts = count_words(["化粧水", "口"], hashes)
    assert starts.tolist() == [0, 5, 5]


def test_only_words_of_two_texts_are_known_and_the_most_frequent_first():
    hashes, counts = fit_vocabulary(TEXTS)
    assert sorted(counts.tolist()) == [2, 2, 2, 3, 3]  # nail, red nail, crème; red, polish
    assert (hashes[1:] > hashes[:-1]).all()
    assert fit_vocabulary(TEXTS, most=2)[1].tolist() == [3, 3]
    ids, counts, starts = count_words(["polish polish soap", "", "red nail"], hashes)
    assert counts.tolist() == [2, 1, 1, 1] and starts.tolist() == [0, 1, 1, 4] and len(ids) == 4


def test_sums_are_the_tf_idf_rows_times_the_vectors():
    model = worded()
    words = model.mrc.words
    hashes, occurrences = fit_vocabulary(TEXTS)
    for item, text in enumerate(TEXTS):
        ids, _, _ = count_words([text], hashes)
        count = Counter(words_of(text))
        known = {
            int(i): next(c for w, c in count.items() if count_words([w], hashes)[0][:1].tolist() == [int(i)])
            for i in ids
            if len(ids)
        }
        row = {
            i: (1 + math.log(c)) * (1 + math.log((1 + len(TEXTS)) / (1 + occurrences[i])))
            for i, c in known.items()
        }
        length = math.sqrt(sum(v * v for v in row.values())) or 1
        expected = sum((v / length * words.vectors.weight[i] for i, v in row.items()), torch.zeros(128))
        torch.testing.assert_close(words.sums(None)[item], expected, atol=1e-5, rtol=1e-5)
    some = torch.tensor([6, 2, 2, 0])
    torch.testing.assert_close(words.sums(some), words.sums(None)[some])
    assert model.mrc.presence()["words"].tolist() == [True] * 5 + [False] * 2


def test_dropout_leaves_a_word_out_of_all_items():
    model = worded(word_dropout=0.5)
    words = model.mrc.words.train()
    torch.manual_seed(0)
    with torch.no_grad():
        words.vectors.weight.copy_(torch.eye(words.vectors.num_embeddings, 128))
        drawn = words.sums(None)[:, : words.vectors.num_embeddings]
        whole = words.eval().sums(None)[:, : words.vectors.num_embeddings]
    kept = drawn != 0
    assert torch.equal(kept, (whole != 0) & kept.any(dim=0)), "a word is there for all items or for none"
    torch.testing.assert_close(drawn[kept], 2 * whole[kept])


def test_without_a_common_word_it_is_refused():
    with pytest.raises(SpeederError, match="words: expected a word that two items have"):
        worded(["one", "two", "three"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_items_are_whitened_and_read_as_the_first_ones_were(tmp_path, dtype):
    """A twin of an item, added later, gets the item's token; so does a loaded model's."""
    model = tiny_model(experts="linear", words=True, history_lookup=True).to(dtype)
    catalogue = model.catalogue
    model.save_pretrained(tmp_path)
    loaded = SpeederForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.mrc.experts["text"].whitening.matrix.dtype == torch.float32
    whitening = Whitening.fit(catalogue.features["text"], catalogue.present["text"])
    torch.testing.assert_close(loaded.mrc.experts["text"].whitening.matrix, whitening.matrix.float())
    twins = ItemCatalogue(
        [f"twin{i}" for i in range(20)],
        catalogue.titles,
        features=catalogue.features,
        present=catalogue.present,
    )
    for each in (model, loaded):
        before = each.item_tokens()[0].clone()
        each.add_items(twins)
        tokens = each.item_tokens()[0]
        assert torch.equal(tokens[:20], before)
        torch.testing.assert_close(tokens[20:], before)


def test_experts_of_one_size_so_that_gates_are_contributions():
    model = tiny_model(experts="linear", words=True)
    with torch.no_grad():
        model.mrc.experts["text"].direct.weight.mul_(100)
        model.mrc.experts["text"].up.weight.zero_()
        model.mrc.experts["text"].up.bias.zero_()
        model.mrc.experts["text"].down.bias.zero_()
        model.mrc.norm_weight.fill_(1)
        first = model.mrc()[0].clone()
        model.mrc.experts["text"].direct.weight.div_(100)
        torch.testing.assert_close(model.mrc()[0], first, atol=1e-4, rtol=1e-3)
    gates = torch.stack(list(model.gates().values()))
    torch.testing.assert_close(gates.sum(0), torch.ones(20))


def test_tokens_on_disk_know_their_texts():
    first, second = worded(), worded([*TEXTS[:-1], "red"])
    second.mrc.load_state_dict(first.mrc.state_dict())
    assert token_identity(first)["catalogue"] != token_identity(second)["catalogue"]


@pytest.mark.parametrize("negatives", ["full", "sampled"])
def test_a_loaded_whitening_and_vocabulary_read_the_catalogue_anew(negatives):
    """Weights that were fitted on another catalogue."""
    model = worded(history_lookup=True, negatives=negatives)
    features = {"image": model.catalogue.features["image"] ** 2}
    texts = [text.replace("nail", "tube") for text in TEXTS]  # as many words, of other hashes
    other = SpeederForCausalLM.from_backbone(
        tiny_backbone(),
        ItemCatalogue(model.catalogue.ids, texts, features=features),
        words=True,
        experts="linear",
    )
    model.mrc.load_state_dict(other.mrc.state_dict())
    found = model.item_tokens()[0].clone()
    copied = copy.deepcopy(model)
    model.set_catalogue(model.catalogue)
    assert torch.equal(found, model.item_tokens()[0])
    assert torch.equal(found, copied.item_tokens()[0])


def test_whitening_is_float32_whatever_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert LinearExpert(4, 4, 4, 1).whitening.matrix.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="experts: expected one of mlp, linear, got 'x'"):
        tiny_model(experts="x")
    with pytest.raises(ValueError, match='the name "words" is kept'):
        catalogue = tiny_catalogue()
        catalogue.features["words"] = catalogue.features.pop("text")
        catalogue.present["words"] = catalogue.present.pop("text")
        SpeederForCausalLM.from_backbone(tiny_backbone(), catalogue, words=True)
