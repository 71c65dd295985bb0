"""BSARec is the authors' layer on histories padded to the left, no state sees what it predicts, and it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from speeder.baselines import BSARec, BSARecConfig, SASRec, SASRecConfig, fit_bsarec
from speeder.baselines.auto import load_recommender
from speeder.baselines.bsarec.model import low_pass_matrix
from speeder.baselines.sequential.fit import cut_windows
from speeder.errors import SpeederError
from tests.baselines.cycles import NUM_ITEMS, cycle_histories

SMALL = BSARecConfig(
    32, max_length=12, dropout=0.1, learning_rate=5e-3, batch_size=128, epochs=8, alpha=0.4, c=3
)
histories = st.lists(st.integers(0, NUM_ITEMS - 1), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def cycle():
    return cycle_histories()


@pytest.fixture(scope="module")
def model(cycle):
    return fit_bsarec(cycle, NUM_ITEMS, SMALL)


def rough(config: BSARecConfig = SMALL) -> BSARec:
    """A model of large random weights, whose every part shows in what it gives."""
    torch.manual_seed(3)
    model = BSARec(NUM_ITEMS, config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.6)
    return model


def by_the_authors_layer(model: BSARec, history: list[int]) -> torch.Tensor:
    """The last state, by Fourier transforms over all places, one history at a time, every position in every layer."""
    config, size = model.config, model.config.max_length
    items = torch.tensor(history[-size:])
    empty = size - len(items)

    def norm(layer, x):
        return (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, unbiased=False, keepdim=True)
        ).sqrt() * layer.weight + layer.bias

    x = norm(model.norm, model.items(items) + model.positions(torch.arange(len(items)).flip(0)))
    for block in model.blocks:
        spectrum = torch.fft.rfft(F.pad(x, (0, 0, empty, 0)), dim=0, norm="ortho")
        spectrum[config.c // 2 + 1 :] = 0
        low = torch.fft.irfft(spectrum, n=size, dim=0, norm="ortho")[empty:]
        filtered = norm(block.filter_norm, low + block.root_beta**2 * (x - low) + x)
        parts = (block.query(x), *block.key_value(x).chunk(2, dim=-1))
        q, k, v = (part.unflatten(-1, (config.heads, -1)).transpose(0, 1) for part in parts)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        attended = block.out((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        x = config.alpha * filtered + (1 - config.alpha) * norm(block.attention_norm, attended + x)
        x = norm(block.forward_norm, block.down(F.gelu(block.up(x))) + x)
    return x[-1]


@pytest.mark.parametrize(
    "changes", [{}, {"heads": 4, "c": 4}, {"layers": 1, "alpha": 0.9}, {"layers": 3, "c": 12}]
)
def test_it_is_the_authors_layer_on_histories_padded_to_the_left(changes):
    model = rough(replace(SMALL, **changes))
    rows = [[5], [1, 2, 3, 4], list(range(12)), list(range(17, 0, -1))]
    with torch.no_grad():
        expected = torch.stack([by_the_authors_layer(model, row) for row in rows]) @ model.items.weight.T
    torch.testing.assert_close(model.score(rows), expected, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 60), st.data())
def test_the_filter_keeps_the_lowest_frequencies(length, data):
    c = data.draw(st.integers(1, length))
    matrix, x = low_pass_matrix(length, c), torch.randn(length, 3)
    spectrum = torch.fft.rfft(x, dim=0)
    spectrum[c // 2 + 1 :] = 0
    torch.testing.assert_close(matrix @ x, torch.fft.irfft(spectrum, n=length, dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(matrix @ matrix, matrix, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(matrix[1:, 1:], matrix[:-1, :-1], rtol=1e-4, atol=1e-5)
    if c // 2 == length // 2:
        torch.testing.assert_close(matrix, torch.eye(length), rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 9))
def test_every_item_but_the_first_is_predicted_once_from_those_before_it(lengths, max_length):
    model = BSARec(1, replace(SMALL, max_length=max_length, c=1))
    sequences = [np.arange(length) + 100 * number for number, length in enumerate(lengths)]
    examples = model.examples(cut_windows(sequences, max_length))
    assert sorted(example[-1] for example in examples) == sorted(
        item for each in sequences for item in each[1:]
    )
    for example in examples:
        np.testing.assert_array_equal(example, np.arange(example[0], example[-1] + 1))
        assert 2 <= len(example) <= max_length + 1


@given(st.lists(st.integers(0, NUM_ITEMS - 1), min_size=3, max_size=13), st.data())
def test_no_state_in_training_sees_its_target_or_later_items(window, data):
    model = rough()
    cut = data.draw(st.integers(1, len(window) - 1))
    changed = window[:cut] + [(item + 7) % NUM_ITEMS for item in window[cut:]]
    with torch.no_grad():
        before, targets = model.states(model.examples([np.array(window)]))
        after, others = model.states(model.examples([np.array(changed)]))
    torch.testing.assert_close(after[:cut], before[:cut], rtol=1e-4, atol=1e-4)
    assert targets.tolist() == window[1:] and others.tolist() == changed[1:]
    prefixes = [window[:end] for end in range(1, len(window))]
    torch.testing.assert_close(before @ model.items.weight.T, model.score(prefixes), rtol=1e-4, atol=1e-3)


def test_in_one_pass_over_a_window_earlier_states_would_see_later_items():
    """Why each prefix is an example of its own."""
    model = rough()
    x_BLC = torch.randn(1, 8, SMALL.hidden_size)
    changed = x_BLC.clone()
    changed[:, 7] += 1
    causal = torch.ones(8, 8).tril().bool()

    def third(x: torch.Tensor, alpha: float) -> torch.Tensor:
        block = model.blocks[0]
        block.alpha = alpha
        return block(x, x, model.low_pass[:8, :8], causal)[:, 2]

    with torch.no_grad():
        assert not torch.allclose(third(x_BLC, 0.5), third(changed, 0.5), atol=1e-3)
        torch.testing.assert_close(third(x_BLC, 0.0), third(changed, 0.0))


@given(st.lists(histories, min_size=1, max_size=8))
def test_a_batch_scores_as_one_by_one(model, rows):
    """Neighbours, and with them the padding, have no effect; only the last ``max_length`` items are read."""
    together = model.score(rows)
    assert together.shape == (len(rows), NUM_ITEMS) and together.dtype == torch.float32
    alone = torch.cat([model.score([row[-SMALL.max_length :]]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_it_learns_a_cycle(model):
    rows = [[(start + step) % NUM_ITEMS for step in range(1 + start % 9)] for start in range(NUM_ITEMS)]
    assert model.score(rows).argmax(dim=1).tolist() == [(row[-1] + 1) % NUM_ITEMS for row in rows]


def test_every_weight_learns():
    model = BSARec(NUM_ITEMS, SMALL)
    states, _ = model.states([np.arange(9), np.arange(3)])
    states.square().sum().backward()
    still = [name for name, weight in model.named_parameters() if not weight.grad.any()]
    assert not still


@pytest.mark.exact
def test_saved_and_loaded_is_the_same(model, tmp_path):
    model.save(tmp_path)
    for loaded in (BSARec.load(tmp_path), load_recommender(tmp_path)):
        assert (
            type(loaded) is BSARec and loaded.config == SMALL and loaded.training_hash == model.training_hash
        )
        assert torch.equal(loaded.score([[1, 2], [5]]), model.score([[1, 2], [5]]))


def test_another_kind_of_model_is_refused(model, tmp_path):
    model.save(tmp_path / "bsarec")
    SASRec(NUM_ITEMS).save(tmp_path / "sasrec")
    with pytest.raises(SpeederError, match="not a saved SASRec: baseline: expected 'sasrec', got 'bsarec'"):
        SASRec.load(tmp_path / "bsarec")
    with pytest.raises(SpeederError, match="not a saved BSARec: baseline: expected 'bsarec', got 'sasrec'"):
        BSARec.load(tmp_path / "sasrec")
    with pytest.raises(TypeError, match="config: expected SASRecConfig, got BSARecConfig"):
        SASRec(NUM_ITEMS, SMALL)
    with pytest.raises(TypeError, match="config: expected BSARecConfig, got SASRecConfig"):
        BSARec(NUM_ITEMS, SASRecConfig())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 1.1}, "alpha: expected at most 1, got 1.1"),
        ({"alpha": -0.1}, "alpha: expected at least 0"),
        ({"c": 0}, "c: expected at least 1, got 0"),
        ({"c": 13}, "c: expected at most max_length=12, got 13"),
        ({"heads": 3}, "hidden_size: expected a multiple of heads=3, got 32"),
    ],
)
def test_wrong_configurations_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **wrong)
