"""Batched, packed, cached and one-by-one runs of the same histories agree; errors name what is wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, StaticCache

from speeder.model.config import CACHE_NAME
from speeder.model.packing import cu_seqlens, item_ranks, item_slots
from speeder.model.sequences import TokenSequence, build_sequence, pack_batch, pad_batch
from tests.model.worlds import TEXT, tiny_model

NEAR = dict(atol=5e-5, rtol=1e-4)  # logits reach 7: some roundings of float32 at that size
HISTORIES = st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=8), min_size=1, max_size=5)
PROMPTS = {"items only": ([], []), "instruction": ([5, 6, 7], [8, 9]), "suffix alone": ([], [4])}


@pytest.fixture(scope="module", params=PROMPTS)
def model(request):
    prefix, suffix = PROMPTS[request.param]
    return tiny_model(prompt_prefix=prefix, prompt_suffix=suffix, item_embedding=True)


@pytest.mark.parametrize("tokens_per_item", [1, 3])
@settings(max_examples=15, deadline=None)
@given(histories=HISTORIES)
def test_padded_packed_and_single_runs_agree(tokens_per_item, histories):
    model = tiny_model(prompt_prefix=[5, 6], prompt_suffix=[7], tokens_per_item=tokens_per_item)
    sequences = [build_sequence(history, model.config) for history in histories]
    with torch.no_grad():
        single = [model(**pad_batch([one], 0)).logits[0, -1] for one in sequences]
        for side in ("left", "right"):
            batch = pad_batch(sequences, 0, side)
            logits = model(**batch).logits
            last = torch.stack(
                [row[mask.bool()][-1] for row, mask in zip(logits, batch["attention_mask"], strict=True)]
            )
            torch.testing.assert_close(last, torch.stack(single), **NEAR)
        packed = pack_batch(sequences)
        ends = packed["cu_seqlens"][1:].long() - 1
        torch.testing.assert_close(model(**packed).logits[0, ends], torch.stack(single), **NEAR)
    torch.testing.assert_close(model.score(histories), torch.stack(single)[:, TEXT:], **NEAR)


@settings(max_examples=20, deadline=None)
@given(tokens=st.lists(st.integers(3, TEXT + 19), min_size=2, max_size=14), cut=st.integers(1, 13))
def test_a_cache_continues_where_the_full_forward_would_be(tokens, cut):
    model, cut = tiny_model(), min(cut, len(tokens) - 1)
    ids = torch.tensor([tokens])
    ranks = item_ranks(ids >= TEXT)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        head = model(ids[:, :cut], use_cache=True)
        rest, cache = [head.logits], head[CACHE_NAME]
        for place in range(cut, len(tokens)):  # one token at a time
            step = model(ids[:, place : place + 1], past_key_values=cache, ranks=ranks[:, : place + 1])
            cache = step[CACHE_NAME]
            rest.append(step.logits)
        at_once = model(
            ids[:, cut:], cache=model(ids[:, :cut], use_cache=True)[CACHE_NAME], ranks=ranks
        ).logits
    torch.testing.assert_close(torch.cat(rest, dim=1), full, **NEAR)
    torch.testing.assert_close(at_once, full[:, cut:], **NEAR)


def test_generation_with_and_without_a_cache_agree(model):
    sequences = [build_sequence(history, model.config) for history in ([1, 2, 3, 4], [5, 6], [7])]
    batch = pad_batch(sequences, 0, "left")
    wanted = dict(max_new_tokens=4, do_sample=False, no_repeat_ngram_size=1)
    cached = model.generate(**batch, **wanted, use_cache=True)
    uncached = model.generate(**batch, **wanted, use_cache=False)
    assert cached.tolist() == uncached.tolist()
    new = cached[:, batch["input_ids"].shape[1] :]
    assert (new >= TEXT).all(), "items only, by default"
    for row, history in zip(new.tolist(), ([1, 2, 3, 4], [5, 6], [7]), strict=True):
        assert not {token - TEXT for token in row} & set(history), "no item twice"
        assert len(set(row)) == len(row)
    # the first generated item is the best one of the ranking
    best = [row[0].item for row in model.recommend([[1, 2, 3, 4], [5, 6], [7]], k=1)]
    assert [row[0] - TEXT for row in new.tolist()] == best


def test_beams_return_valid_items_in_order_of_their_likelihood(model):
    batch = pad_batch([build_sequence([1, 2, 3], model.config), build_sequence([4], model.config)], 0, "left")
    found = model.generate(
        **batch,
        max_new_tokens=3,
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert (found.sequences[:, -3:] >= TEXT).all()
    scores = found.sequences_scores.view(2, 4)
    assert (scores.diff(dim=1) <= 1e-6).all()
    for row, score in zip(found.sequences, found.sequences_scores, strict=True):
        start = int((row != 0).nonzero()[0])  # padding has id 0
        ids = row[None, start:]
        ranks = item_ranks(ids >= TEXT)
        prompt = batch["input_ids"].shape[1] - start
        suffix = len(model.config.prompt_suffix)
        if suffix:
            ranks[0, prompt - 1] = ranks[0, : prompt - suffix].max() + 1
        with torch.no_grad():
            logits = model(ids, ranks=ranks, vocabulary="items").logits[0, prompt - 1 : -1]
        likelihood = logits.log_softmax(-1).gather(1, ids[0, prompt:, None]).sum() / 3
        torch.testing.assert_close(likelihood, score, atol=1e-4, rtol=1e-3)


def test_a_static_cache_serves_padded_batches():
    model = tiny_model()
    batch = pad_batch(
        [build_sequence([1, 2, 3, 4], model.config), build_sequence([5, 6], model.config)], 0, "left"
    )
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        cache = StaticCache(config=model.config.text_config, max_cache_len=9)
        got = model(**batch, cache=cache).logits
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(got[kept], expected[kept], **NEAR)


@pytest.mark.parametrize("tokens_per_item", [1, 2])
@settings(max_examples=10, deadline=None)
@given(histories=HISTORIES)
def test_training_runs_no_token_that_predicts_nothing(tokens_per_item, histories):
    """The last token of a packed sequence is left out: same loss and gradients as of the whole, in evaluation mode."""
    model = tiny_model(prompt_prefix=[5], prompt_suffix=[7], tokens_per_item=tokens_per_item)
    batch = pack_batch(
        [build_sequence(history[:-1], model.config, history[-1]) for history in histories], with_labels=True
    )
    seen = []
    decoder = model.backbone.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    results = []
    for training in (False, True):
        model.train(training)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    hook.remove()
    tokens = batch["input_ids"].numel()
    assert seen == [tokens, tokens - len(histories)]
    for whole, shorter in zip(*results, strict=True):
        torch.testing.assert_close(shorter, whole, atol=1e-5, rtol=1e-4)


def test_a_sequence_of_one_token_stays():
    """It predicts nothing; alone in a batch, the loss is zero."""
    model = tiny_model().train()
    one, two = [TokenSequence([TEXT], [0], [TEXT])], [build_sequence([1], model.config, 3)]
    assert model(**pack_batch(one, with_labels=True)).loss == 0
    both = model(**pack_batch(one + two, with_labels=True)).loss
    torch.testing.assert_close(both, model(**pack_batch(two, with_labels=True)).loss)


def test_text_and_any_vocabulary(model):
    ids = torch.tensor([[5, 6, TEXT + 3, 7]])
    text = model.generate(ids, vocabulary="text", max_new_tokens=3, do_sample=False)
    assert (text[:, 4:] < TEXT).all()
    with torch.no_grad():
        everything = model(ids).logits
        torch.testing.assert_close(model(ids, vocabulary="items").logits[..., TEXT:], everything[..., TEXT:])
        torch.testing.assert_close(model(ids, vocabulary="text").logits[..., :TEXT], everything[..., :TEXT])
    assert model(ids, logits_to_keep=1).logits.shape == (1, 1, TEXT + 20)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=6), k=st.integers(1, 3), gap=st.booleans())
def test_slots_number_the_tokens_of_an_item(lengths, k, gap):
    ranks, items, expected = [], [], []
    for length in lengths:  # sequences of `length` items each, with or without text between them
        for rank in range(length):
            ranks += [rank] * k
            items += [True] * k
            expected += list(range(k))
        if gap:
            ranks, items, expected = [*ranks, -1], [*items, False], [*expected, 0]
    slots = item_slots(torch.tensor(items), torch.tensor(ranks), k)
    at_items = torch.tensor(items)
    assert slots[at_items].tolist() == torch.tensor(expected)[at_items].tolist()


def test_wrong_arguments_are_named(model):
    ids = torch.tensor([[TEXT, TEXT + 1]])
    cases = [
        (dict(input_ids=torch.zeros(1, 0, dtype=torch.long)), r"input_ids: expected \(B, S\)"),
        (dict(input_ids=torch.tensor([[TEXT + 20]])), "input_ids: expected ids in 0..83"),
        (dict(input_ids=ids, vocabulary="films"), "vocabulary: expected one of all, items, text"),
        (
            dict(input_ids=ids, attention_mask=torch.ones(1, 3)),
            r"attention_mask: expected \(1, 2\), got \(1, 3\)",
        ),
        (dict(input_ids=ids, attention_mask=torch.zeros(1, 2)), "attention_mask: row 0"),
        (dict(input_ids=ids, ranks=torch.zeros(1, 3)), r"ranks: expected \(1, 2\), got \(1, 3\)"),
        (dict(input_ids=ids, cu_seqlens=torch.tensor([0, 1])), "cu_seqlens: expected to end at T = 2, got 1"),
        (dict(input_ids=ids, cu_seqlens=torch.tensor([1, 2])), "cu_seqlens: expected .* rising from 0"),
        (
            dict(input_ids=ids, cu_seqlens=cu_seqlens(torch.tensor([2])), attention_mask=ids),
            "neither attention_mask",
        ),
        (
            dict(input_ids=ids, labels=torch.zeros(1, 5, dtype=torch.long)),
            r"labels: expected \(1, 2\), got \(1, 5\)",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    cache = model(ids, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match=r"ranks: expected .* beside a cache"):
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="cache: expected one of cache and past_key_values"):
        model(ids[:, :1], past_key_values=cache, cache=cache)
    with pytest.raises(ValueError, match="tokens_per_item = 2"):
        tiny_model(tokens_per_item=2).generate(ids, max_new_tokens=1)


def test_no_text_id_is_written_where_no_item_is_left():
    model = tiny_model()
    count = model.config.num_items
    batch = pad_batch([build_sequence([1, 2, 3], model.config)], 0, "left")
    for wanted in ({"num_beams": count + 1}, {"generation_config": GenerationConfig(num_beams=count + 1)}):
        with pytest.raises(
            ValueError, match=f"num_beams: expected at most the {count} items, got {count + 1}"
        ):
            model.generate(**batch, **wanted, max_new_tokens=1, do_sample=False)
    once = dict(do_sample=False, no_repeat_ngram_size=1)
    found = model.generate(**batch, **once, max_new_tokens=count - 3)
    left = {*range(TEXT, TEXT + count)} - {TEXT + item for item in (1, 2, 3)}
    assert sorted(found[0, -(count - 3) :].tolist()) == sorted(left)
    with pytest.raises(ValueError, match=f"no item was left for token {count - 2} of sequence 0"):
        model.generate(**batch, **once, max_new_tokens=count - 2)
    with pytest.raises(
        ValueError, match=f"at most the {count - 3} items that 3 seen ones leave, got {count}"
    ):
        model.generate(**batch, **once, max_new_tokens=1, num_beams=count, num_return_sequences=count)
    short = model.generate(**batch, **once, max_new_tokens=count - 2, num_beams=2)
    assert (short[:, -(count - 3) :] >= TEXT).all(), "beam search ends where no item is left"
    most = model.generate(
        **batch, max_new_tokens=1, do_sample=False, num_beams=count, num_return_sequences=count
    )
    assert sorted(most[:, -1].tolist()) == list(range(TEXT, TEXT + count))
    first = int(found[0, -(count - 3)])  # as a sign to stop
    ended = model.generate(**batch, **once, max_new_tokens=4, eos_token_id=first, pad_token_id=0)
    assert ended.shape[1] == batch["input_ids"].shape[1] + 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shift", [2**32, 2**31, 1_700_000_000_000])
def test_ranks_that_do_not_fit_the_kernels_are_refused(packed, shift):
    """They were cut to int32: a rank of 2^32 + r was taken as r."""
    model, ids = tiny_model(), torch.tensor([[3, 64, 65, 70, 5, 66]])
    ranks = torch.tensor([[-1, 0, 1, 2, -1, 3]])
    how = {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)} if packed else {}
    with pytest.raises(ValueError, match=r"ranks: expected at most 2147483647 \(int32\)"):
        model(ids, ranks=torch.where(ranks < 0, ranks, ranks + shift), **how)
    whole = model(ids, ranks=ranks, **how).logits
    assert torch.equal(whole, model(ids, ranks=ranks.int(), **how).logits)


def test_labels_are_ids_or_nothing():
    model, ids = tiny_model(), torch.tensor([[64, 65, 66]])
    expected = model(ids, labels=ids).loss
    for dtype in (torch.int32, torch.int16, torch.uint8):
        torch.testing.assert_close(model(ids, labels=ids.to(dtype)).loss, expected)
    with pytest.raises(
        ValueError, match=r"labels: expected ids in 0\.\.83, or -100 where there is none, got -7"
    ):
        model(ids, labels=torch.tensor([[64, -7, 66]]))
    with pytest.raises(ValueError, match=r"labels: expected ids in 0\.\.83, .*, got 84"):
        tiny_model(negatives="sampled", num_negatives=4).train()(ids, labels=torch.tensor([[64, 65, 84]]))
    with pytest.raises(TypeError, match=r"labels: expected integers, got torch.uint64"):
        model(ids, labels=ids.to(torch.uint64))
    with pytest.raises(ValueError, match=r"cu_seqlens: expected .* rising from 0"):
        model(torch.full((1, 7), 64), cu_seqlens=torch.tensor([0, 5, 3, 7], dtype=torch.uint8))
