"""A fresh wrapper reads and writes text exactly as its backbone does, whatever the family."""

import pytest
import torch

from speeder.errors import SpeederError
from speeder.model.config import CACHE_NAME
from speeder.model.modeling import SpeederForCausalLM
from tests.model.worlds import FAMILIES, TEXT, tiny_backbone, tiny_catalogue, tiny_model

NEAR = dict(atol=2e-6, rtol=1e-5)


def text_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, TEXT, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padded on the left
    mask[2, 6:] = 0  # and on the right
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_text_logits_equal_the_backbones(family):
    backbone = tiny_backbone(family)
    ids, mask = text_batch()
    with torch.no_grad():
        expected = backbone(ids, attention_mask=mask).logits
        model = SpeederForCausalLM.from_backbone(backbone, tiny_catalogue())
        cached = model(ids, attention_mask=mask)
        packed = model(ids, attention_mask=mask, use_cache=False)
    kept = mask.bool()
    assert cached.logits.shape == (3, 9, TEXT + 20)
    assert CACHE_NAME in cached and CACHE_NAME not in packed
    torch.testing.assert_close(cached.logits[..., :TEXT][kept], expected[kept], **NEAR)
    torch.testing.assert_close(packed.logits[kept], cached.logits[kept], **NEAR)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_text_loss_and_generation_equal_the_backbones(family):
    backbone = tiny_backbone(family)
    ids = text_batch()[0][1:2]
    expected_loss = backbone(ids, labels=ids).loss
    expected_ids = backbone.generate(ids, max_new_tokens=6, do_sample=False)
    model = SpeederForCausalLM.from_backbone(backbone, tiny_catalogue())
    torch.testing.assert_close(model(ids, labels=ids).loss, expected_loss, **NEAR)
    written = model.generate(ids, vocabulary="text", max_new_tokens=6, do_sample=False)
    assert written.tolist() == expected_ids.tolist()


def test_position_tables_start_at_zero_and_change_items_alone():
    """SPAE's tables, once trained, still leave pure text as it was: its tokens have no rank."""
    ids, mask = text_batch()
    model = tiny_model(stir=False)
    assert all(not table.any() for table in model.spae.parameters())
    with torch.no_grad():
        before = model(ids, attention_mask=mask, vocabulary="text").logits
        history = model.score([[1, 2, 3]])
        for table in model.spae.parameters():
            table.normal_()
        after = model(ids, attention_mask=mask, vocabulary="text").logits
        moved = model.score([[1, 2, 3]])
    torch.testing.assert_close(after, before, **NEAR)
    assert (moved - history).abs().max() > 1e-3


def test_item_tokens_have_the_norm_of_text_embeddings():
    model = tiny_model(stir=False)
    words = model.backbone.get_input_embeddings().weight
    expected = words.pow(2).mean(dim=1).sqrt().mean()
    with torch.no_grad():
        tokens = model.item_tokens()[0][:, 0] * model.config.embedding_rms
    torch.testing.assert_close(
        tokens.pow(2).mean(dim=1).sqrt(), expected.expand(len(tokens)), rtol=1e-3, atol=0
    )


def test_layers_are_cut_and_random_weights_drawn():
    backbone = tiny_backbone()
    first = backbone.model.layers[0].self_attn.q_proj.weight.clone()
    cut = SpeederForCausalLM.from_backbone(backbone, tiny_catalogue(), layers=1)
    assert len(cut.backbone.model.layers) == cut.config.text_config.num_hidden_layers == 1
    assert torch.equal(cut.backbone.model.layers[0].self_attn.q_proj.weight, first)
    fresh = SpeederForCausalLM.from_backbone(tiny_backbone(), tiny_catalogue(), random_weights=True)
    assert not torch.equal(fresh.backbone.model.layers[0].self_attn.q_proj.weight, first)
    with pytest.raises(SpeederError, match=r"layers: expected 1..2 .* got 9"):
        SpeederForCausalLM.from_backbone(tiny_backbone(), tiny_catalogue(), layers=9)
    with pytest.raises(
        SpeederError, match="modalities: expected some of text, image, collaborative, got sound"
    ):
        SpeederForCausalLM.from_backbone(tiny_backbone(), tiny_catalogue(), modalities=["sound"])


def test_another_attention_is_refused_rather_than_dropping_spae():
    model = tiny_model()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation: expected 'spae'"):
        model(torch.tensor([[3, 4]]))
