"""cold_dropout: in training some items are read as new ones are, and nothing else is touched."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speeder.model.mrc import CLOSED, drop_fitted
from tests.model.worlds import tiny_model

FITTED = torch.tensor([False, False, True, True])
masks = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=8).map(torch.tensor)


@given(masks, st.lists(st.booleans(), min_size=4, max_size=4).map(torch.tensor), st.floats(0, 1))
def test_items_lose_all_that_was_fitted_or_nothing(present, is_open, probability):
    kept = drop_fitted(present, probability, FITTED, is_open)
    for before, after in zip(present, kept, strict=True):
        as_new = before & ~FITTED
        assert torch.equal(after, before) or torch.equal(after, as_new)
        if not (as_new & is_open).any():
            assert torch.equal(after, before), "an item is never left without an open modality"
    certain = drop_fitted(present, 1.1, FITTED, is_open)
    content = (present & ~FITTED & is_open).any(dim=1)
    assert not (certain & FITTED)[content].any()
    assert torch.equal(drop_fitted(present, 0.0, FITTED, is_open), present)


def test_in_training_so_many_items_are_read_as_new_and_in_evaluation_none():
    model = tiny_model(item_embedding=True, cold_dropout=0.5)
    names, whole = model.config.gate_names, model.gates()
    assert (whole["item"] > 0).all()
    model.train()
    gates = torch.stack([model.mrc()[1] for _ in range(200)])
    item, collaborative = gates[..., names.index("item")], gates[..., names.index("collaborative")]
    content = model.mrc.present[:, names.index("text")] | model.mrc.present[:, names.index("image")]
    share = (item == 0).float().mean(dim=0)
    assert (share[content] - 0.5).abs().max() < 0.2 and not share[~content].any()
    assert not collaborative[item == 0].any(), "fitted modalities go together"


def test_nothing_is_drawn_while_no_fitted_modality_is_open():
    """Stages that open content alone train the very same weights with it and without."""
    model = tiny_model(item_embedding=True, cold_dropout=0.5).train()
    names = model.config.gate_names
    for name in ("item", "collaborative"):
        model.mrc.gate_offset[names.index(name)] = CLOSED
    torch.manual_seed(4)
    model.mrc()
    drawn = torch.rand(())
    torch.manual_seed(4)
    assert drawn == torch.rand(())


def test_the_setting_is_checked():
    for wrong in (1.0, -0.1, "half"):
        with pytest.raises((ValueError, TypeError), match="cold_dropout"):
            tiny_model(cold_dropout=wrong)
