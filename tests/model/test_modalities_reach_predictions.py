"""In planted worlds the next item follows from one modality alone, or from order alone: the model must find it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from speeder.model.modeling import SpeederForCausalLM
from speeder.model.mrc import CLOSED
from speeder.model.sequences import build_sequence, pack_batch
from speeder.prepare.synthetic import synthetic_world
from tests.model.worlds import TEXT, tiny_backbone

CHANCE = 1 / 6


def fit(model: SpeederForCausalLM, sequences: list[list[int]], epochs: int, rate: float = 3e-3) -> None:
    """Plain training over packed batches, every position asked for."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(sequences)).split(64):
            batch = [build_sequence(sequences[i][:-1], model.config, sequences[i][-1]) for i in rows]
            model(**pack_batch(batch, with_labels=True)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("follows", ["text", "image", "collaborative"])
def test_each_modality_reaches_the_prediction(follows, tmp_path):
    """Half of the users' last known item was never trained on: its features alone can tell what follows it."""
    world = synthetic_world(follows=follows, num_users=400, folder=tmp_path)
    model = SpeederForCausalLM.from_backbone(tiny_backbone(), world.catalogue)
    fit(model, [row.tolist() for row in world.split.training()], epochs=25)
    scores = model.score(world.split.histories("test"))
    assert world.group_accuracy(scores, "test") > 0.55 > 3 * CHANCE
    assert world.group_accuracy(scores, "test", world.cold_users) > 0.4 > 2 * CHANCE
    # with that modality's gate closed, nothing of the rule is left to see
    model.mrc.gate_offset[model.mrc.names.index(follows)] = CLOSED
    assert world.group_accuracy(model.score(world.split.histories("test")), "test") < 0.4


@pytest.mark.slow
@pytest.mark.parametrize("spae", ["none", "relative", "absolute"])
def test_order_reaches_the_prediction_through_spae_alone(spae):
    """One layer, a backbone without positions: a bag of items to it. Only SPAE can tell which of two came first.

    Episodes are: two of topics 0 and 1 in either order, one of topic 2 or 3, then 4 or 5 by that order. The model
    is asked for the outcome of users that it was not trained on.
    """
    world = synthetic_world(follows="order", num_users=500, held_out=0.0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    blind = GPTNeoXConfig(vocab_size=TEXT, rotary_pct=0.0, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    model = SpeederForCausalLM.from_backbone(
        AutoModelForCausalLM.from_config(blind),
        world.catalogue,
        modalities=["text"],
        relative_bias=spae == "relative",
        position_prompts=spae == "absolute",
        absolute_bias=spae == "absolute",
    )
    sequences = [row[:8].tolist() for row in world.split.training()]
    fit(model, sequences[:400], epochs=40)
    histories, outcomes = [row[:7] for row in sequences[400:]], [row[7] for row in sequences[400:]]
    found = world.groups[model.score(histories).argmax(dim=1).numpy()]
    share = float((found == world.groups[outcomes]).mean())
    if spae == "none":
        assert share < 0.7, "a bag of items cannot tell the outcome: 0.5 by chance"
    else:
        assert share > 0.9
