"""Proportional attention: a merged token counts as the tokens that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip import modeling_siglip as siglip

from families import family_of
from helpers import MERGING, prompt, richest
from illava_hooks import Method, patch, unpatch
from illava_hooks.engine import attention_tap
from illava_hooks.engine.attention_tap import EncoderTap
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.merge import attention as blocks
from illava_hooks.merge.attention import SizeBias, attend_and_receive
from illava_hooks.merge.scores import ScoreInputs, query_lse, received_attention
from tiny_models import FAMILIES, tiny_model

SIZES = torch.tensor([[1, 3, 2, 1], [4, 1, 1, 2]])


def tables() -> list[Tensor]:
    """Query, key and value ``(S, H, N, D)`` of two segments of four tokens."""
    return [torch.randn(2, 3, 4, 8) for _ in range(3)]


def repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The oracle: attention to as many copies of each token as it stands for."""
    rows = []
    for segment, sizes in enumerate(SIZES):
        keys, values = (table[segment].repeat_interleave(sizes, dim=1).double() for table in (key, value))
        rows.append((query[segment].double() @ keys.transpose(1, 2) / 8**0.5).softmax(-1) @ values)
    return torch.stack(rows)


LENGTHS = [4, 4]
WAYS = ("sdpa", "eager", "another kernel")


def weighed(back_end: str, wanted: bool, *calls: list[Tensor], **kwargs: Any) -> Tensor:
    """What a layer gives that listens with sizes, ``(S, N, H, D)`` as ``(S, H, N, D)``."""
    attend = {"sdpa": sdpa_attention_forward, "eager": siglip.eager_attention_forward}.get(back_end, kernel)
    score = received_attention if wanted else None
    listener = EncoderTap(LENGTHS, ranks=True, score=score, sizes=SizeBias(SIZES.log().flatten(), LENGTHS))
    layer = torch.nn.Identity().eval()
    found = [listener.attend(attend, layer, *call, scaling=8**-0.5, is_causal=False, **kwargs)[0] for call in calls]
    return torch.cat(found).transpose(1, 2)


def kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """A fused attention that takes no bias."""
    weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
    return (weights @ value).transpose(1, 2), None


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("back_end", WAYS)
class TestListening:
    def test_counts_copies(self, back_end: str, wanted: bool) -> None:
        given = tables()
        with torch.no_grad():
            found = weighed(back_end, wanted, given)
        torch.testing.assert_close(found.double(), repeated(*given), atol=1e-6, rtol=1e-6)

    def test_in_one_call_for_each_segment(self, back_end: str, wanted: bool) -> None:
        given = tables()
        with torch.no_grad():
            found = weighed(back_end, wanted, *([table[i : i + 1] for table in given] for i in range(2)))
        torch.testing.assert_close(found.double(), repeated(*given), atol=1e-6, rtol=1e-6)

    def test_with_gradients(self, back_end: str, wanted: bool) -> None:
        given = [table.requires_grad_() for table in tables()]
        found = weighed(back_end, wanted, given)
        expected = torch.autograd.grad(repeated(*given).square().sum(), given)
        for one, other in zip(torch.autograd.grad(found.square().sum(), given), expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(4, 32, 9), (16, 32, 7), (16, 9, 32)])
def test_a_bias_starts_where_kernels_can_read_it(lengths: tuple[int, ...]) -> None:
    """At whole words of 16 elements, each row: SDPA itself copies only rows whose stride is another."""
    listener = EncoderTap(lengths, ranks=False, sizes=SizeBias(torch.arange(1.0, 1 + sum(lengths)).log(), lengths))
    seen: list[Tensor] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: Any) -> tuple[Tensor, None]:
        seen.append(mask)
        return query.transpose(1, 2), None

    attend.__name__ = "eager_attention_forward"
    for length in lengths:
        listener.attend(attend, torch.nn.Identity(), *[torch.randn(1, 3, length, 8)] * 3)
    assert torch.equal(torch.cat([mask.flatten() for mask in seen]), torch.arange(1.0, 1 + sum(lengths)).log())
    assert all(mask.storage_offset() % 16 == 0 and mask.stride(2) % 16 == 0 for mask in seen)


@pytest.mark.parametrize("lengths", [(4, 4), (5, 1, 2), (8,)])
def test_one_row_of_all_segments(lengths: tuple[int, ...]) -> None:
    """As flash attention takes it, cut by lengths."""
    query, key, value = (torch.randn(1, 3, 8, 8) for _ in range(3))
    sizes = torch.tensor([1, 3, 2, 1, 4, 1, 1, 2])
    listener = EncoderTap(lengths, ranks=True, sizes=SizeBias(sizes.log(), lengths))
    borders = torch.tensor([0, *lengths]).cumsum(0)
    found, _ = listener.attend(kernel, torch.nn.Identity(), query, key, value, scaling=8**-0.5, cu_seq_lens_q=borders)
    for first, last in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        rows = slice(first, last)
        logits = query[0, :, rows] @ key[0, :, rows].transpose(1, 2) * 8**-0.5 + sizes[rows].log()
        expected = (logits.softmax(-1) @ value[0, :, rows]).transpose(0, 1)
        torch.testing.assert_close(found[0, rows], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("block", [1, 9, 1 << 20])
def test_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block)
    query, key, value = tables()
    mixed, received = attend_and_receive(query, key, value, 8**-0.5, SIZES.log())
    torch.testing.assert_close(mixed.double(), repeated(query, key, value), atol=1e-6, rtol=1e-6)
    logits = query @ key.transpose(2, 3) * 8**-0.5 + SIZES.log()[:, None, None]
    torch.testing.assert_close(received, logits.softmax(-1).mean((1, 2)), atol=1e-6, rtol=1e-6)


def test_scores_see_the_sizes() -> None:
    query, key, _ = tables()
    inputs = ScoreInputs(
        key,
        lambda: query,
        lambda: query[:, :, -1],
        torch.arange(4).expand(2, 4),
        None,
        8**-0.5,
        3,
        causal=False,
        key_bias=SIZES.log(),
    )
    logits = query @ key.transpose(2, 3) * 8**-0.5 + SIZES.log()[:, None, None]
    torch.testing.assert_close(received_attention(inputs), logits.softmax(-1).mean((1, 2)), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(query_lse(inputs), logits.logsumexp(-1).mean(1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
class TestInAModel:
    def test_all_ways_give_the_same(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        found = []
        for back_end in ("sdpa", "eager", "sdpa without blocks"):
            if back_end == "sdpa without blocks":
                monkeypatch.setattr(attention_tap, "_is_plain", lambda *_, **__: False)
            torch.manual_seed(0)
            model = tiny_model(family, attn_implementation=back_end.split()[0])
            patch(model, **MERGING, method="diverse")
            with torch.no_grad():
                found.append(model(**prompt(model, richest(family))).logits)
        torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(found[0], found[2], atol=2e-5, rtol=1e-5)

    def test_every_layer_behind_the_first_merge_weighs(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model(family)
        patch(model, **MERGING, method="diverse")
        seen: dict[int, bool] = {}
        inner = EncoderRun.tap

        def tap(run: EncoderRun, layer_idx: int) -> EncoderTap:
            listener = inner(run, layer_idx)
            seen[layer_idx] = listener.sizes is not None and bool(listener.sizes.log_sizes.max() > 0)
            return listener

        monkeypatch.setattr(EncoderRun, "tap", tap)
        with torch.no_grad():
            model(**prompt(model, "image"))
        depth = len(family_of(family).encoder_layers(model))
        first = MERGING["vit_layers"][0]
        assert seen == {layer: layer > first for layer in range(first, depth)}

    def test_changes_the_answer_only_where_tokens_grew(self, family: str) -> None:
        model = tiny_model(family)
        inputs = prompt(model, "image")
        found = {}
        for merge in ("drop", "nearest"):
            for proportional in (False, True):
                patch(model, **MERGING, method=Method("own", merge=merge, proportional=proportional))
                with torch.no_grad():
                    found[merge, proportional] = model(**inputs).logits
                unpatch(model)
        torch.testing.assert_close(found["drop", True], found["drop", False], atol=1e-5, rtol=1e-5)
        assert (found["nearest", True] - found["nearest", False]).abs().max() > 1e-3

    def test_a_back_end_that_takes_no_bias(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """It gives way where tokens have to be weighed: the same answer as with SDPA."""
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "kernel", kernel)
        found = []
        for back_end in ("sdpa", "kernel"):
            model = tiny_model(family)
            model.set_attn_implementation({"vision_config": back_end, "text_config": "sdpa"})
            patch(model, **MERGING, method="diverse")
            with torch.no_grad():
                kind = "image and video" if family_of(family).with_videos else "image"
                found.append(model(**prompt(model, kind)).logits)
        torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-5)
