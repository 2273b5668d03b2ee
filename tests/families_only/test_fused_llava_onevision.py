"""Queries and keys are heard where the attention is called: however a tower of SigLIP layers projects them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip.modeling_siglip import SiglipAttention, eager_attention_forward

from helpers import PROMPTS, feature_outputs
from illava_hooks import patch, unpatch
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.records import records_of
from tiny_models import inputs_for, tiny_model

SETTINGS: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 14, "llm_layers": [2], "llm_ratio": 0.5}


class FusedAttention(SiglipAttention):
    """One projection for all three, as engines make them of a stock layer."""

    def __init__(self, stock: SiglipAttention) -> None:
        super().__init__(stock.config)
        projections = [stock.q_proj, stock.k_proj, stock.v_proj]
        self.qkv_proj = nn.Linear(self.embed_dim, 3 * self.embed_dim)
        self.qkv_proj.weight.data = torch.cat([projection.weight.data for projection in projections])
        self.qkv_proj.bias.data = torch.cat([projection.bias.data for projection in projections])
        self.out_proj = stock.out_proj
        del self.q_proj, self.k_proj, self.v_proj

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        shape = hidden_states.shape[:-1]
        tables = self.qkv_proj(hidden_states).view(*shape, 3, self.num_heads, self.head_dim)
        query, key, value = (table.transpose(1, 2) for table in tables.unbind(-3))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, paid = attend(self, query, key, value, attention_mask, is_causal=False, scaling=self.scale)
        return self.out_proj(mixed.reshape(*shape, -1)), paid


def fused(back_end: str) -> Any:
    model = tiny_model("llava_onevision", attn_implementation=back_end).eval()
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn = FusedAttention(layer.self_attn).eval()
    return model


def scores_of(model: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], dict[str, Any]]:
    """The scores of every merge, and what the feature methods give."""
    found: list[Tensor] = []
    inner = EncoderRun.scores

    def listen(*args: Any) -> Tensor:
        found.append(inner(*args))
        return found[-1]

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(EncoderRun, "scores", listen)
        return found, feature_outputs(model, inputs_for(model, PROMPTS[kind]))


@pytest.mark.parametrize("method", ["illava", "diverse", "tome"])
@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["image", "image and video"])
def test_a_fused_projection_is_heard(kind: str, back_end: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stock = fused(back_end), tiny_model("llava_onevision", attn_implementation=back_end)
    for each in (model, stock):
        patch(each, **SETTINGS, method=method)
    (scores, ours), (expected, theirs) = (scores_of(m, kind, monkeypatch) for m in (model, stock))
    assert len(scores) == 2 * len(theirs)
    for one, other in zip(scores, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    for modality, output in theirs.items():
        for found, record in zip(records_of(ours[modality]), records_of(output), strict=True):
            assert torch.equal(found.keep, record.keep) and torch.equal(found.survivor_of, record.survivor_of)
        for one, other in zip(ours[modality].pooler_output, output.pooler_output, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_a_fused_projection_is_left_as_it_was() -> None:
    model = fused("sdpa")
    inputs = inputs_for(model, PROMPTS["image"])
    with torch.no_grad():
        expected = model(**inputs).logits
        patch(model, **SETTINGS)
        assert not torch.equal(model(**inputs).logits, expected)
        unpatch(model)
        assert torch.equal(model(**inputs).logits, expected)
    assert {type(layer.self_attn) for layer in model.model.vision_tower.encoder.layers} == {FusedAttention}
