"""Scores that fall out of the attention itself: right, only where that is possible, and unseen by others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from families import family_of
from helpers import MERGING, prompt, richest
from illava_hooks import patch
from illava_hooks.merge import attention as blocks
from illava_hooks.merge.attention import attend_and_receive
from illava_hooks.patchers.vision import listening, scores
from illava_hooks.patchers.vision.listening import Eavesdropper
from tiny_models import FAMILIES, tiny_model


def tables(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key and value ``(S, H, N, D)``, laid out as projections give them."""
    segments, heads, num, width = shape
    return [torch.randn(segments, num, heads, width, dtype=dtype).transpose(1, 2) for _ in range(3)]


@pytest.mark.parametrize("block", [1, 40, 1 << 20])
@pytest.mark.parametrize("num", [1, 7, 33])
def test_blocks_are_attention_and_its_column_means(num: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block)
    query, key, value = tables(3, 2, num, 8)
    mixed, received = attend_and_receive(query, key, value, 0.3)
    attention = (query.double() @ key.double().transpose(2, 3) * 0.3).softmax(-1)
    torch.testing.assert_close(mixed.double(), attention @ value.double(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(received.double(), attention.mean((1, 2)), atol=1e-7, rtol=1e-6)
    assert mixed.transpose(1, 2).is_contiguous()


class TestListening:
    def test_answers_plain_calls(self) -> None:
        query, key, value = tables(2, 2, 9, 8)
        with torch.no_grad(), Eavesdropper(True) as heard:
            mixed = scaled_dot_product_attention(query, key, value)
        torch.testing.assert_close(mixed, scaled_dot_product_attention(query, key, value), atol=1e-6, rtol=1e-6)
        assert [tuple(table.shape) for table in heard.received] == [(2, 9)]

    @pytest.mark.parametrize(
        "settings", [{"is_causal": True}, {"attn_mask": torch.ones(9, 9, dtype=torch.bool)}, {"enable_gqa": True}]
    )
    def test_lets_other_calls_through(self, settings: dict[str, Any]) -> None:
        query, key, value = tables(2, 2, 9, 8)
        with torch.no_grad(), Eavesdropper(True) as heard:
            mixed = scaled_dot_product_attention(query, key, value, **settings)
        assert torch.equal(mixed, scaled_dot_product_attention(query, key, value, **settings)) and not heard.received

    @pytest.mark.parametrize("why", ["bfloat16", "gradients", "not wanted"])
    def test_lets_other_tables_through(self, why: str) -> None:
        query, key, value = tables(2, 2, 9, 8, dtype=torch.bfloat16 if why == "bfloat16" else torch.float32)
        query = query.requires_grad_(why == "gradients")
        with Eavesdropper(why != "not wanted") as heard:
            mixed = scaled_dot_product_attention(query, key, value)
        assert torch.equal(mixed, scaled_dot_product_attention(query, key, value)) and not heard.received


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
class TestInAModel:
    def test_both_ways_give_the_same(self, family: str, back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model(family, attn_implementation=back_end)
        inputs = prompt(model, richest(family))
        session = patch(model, **MERGING, track=True)
        found = []
        for answers in (True, False):
            monkeypatch.setattr(listening, "_is_plain", lambda *_, answers=answers, **__: answers)
            with torch.no_grad():
                found.append((model(**inputs).logits, session.provenance.merges))
        torch.testing.assert_close(found[0][0], found[1][0], atol=2e-5, rtol=1e-5)
        for step, merged in found[0][1].items():
            for one, other in zip(merged.images, found[1][1][step].images, strict=True):
                assert torch.equal(one.seats, other.seats)

    def test_no_second_look_at_the_map(self, family: str, back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """With SDPA on a CPU the projections are not scored again; with other back-ends they are."""
        model = tiny_model(family, attn_implementation=back_end)
        patch(model, **MERGING)
        looked: list[int] = []
        inner = scores.LayerAttention.heads.fget
        assert inner is not None

        def heads(attention: Any) -> Any:
            looked.append(attention.layer_idx)
            return inner(attention)

        monkeypatch.setattr(scores.LayerAttention, "heads", property(heads))
        with torch.no_grad():
            model(**prompt(model, "image"))
        assert bool(looked) == (back_end == "eager")

    def test_foreign_hooks_on_the_attention_still_run(self, family: str, back_end: str) -> None:
        model = tiny_model(family, attn_implementation=back_end)
        patch(model, **MERGING)
        layer = MERGING["vit_layers"][0]
        known = family_of(family)
        attention = known.encoder_attention(known.encoder_layers(model)[layer])
        seen: list[int] = []
        attention.register_forward_hook(lambda *_: seen.append(layer))
        with torch.no_grad():
            model(**prompt(model, "image"))
        assert seen == [layer]
