"""Listening to attention: queries, keys and scores as the layer has them, and unseen by others."""

from __future__ import annotations

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import SiglipVisionConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip import modeling_siglip as siglip

from families import family_of
from helpers import MERGING, prompt, richest
from illava_hooks import PatchStateError, patch
from illava_hooks.engine import attention_tap
from illava_hooks.engine.attention_tap import AttentionTap, EncoderTap, TappedConfig
from illava_hooks.merge import attention as blocks
from illava_hooks.merge.attention import attend_and_receive, attend_with_lse
from illava_hooks.merge.scores import query_lse, received_attention
from tiny_models import FAMILIES, tiny_model


def tables(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value ``(S, H, N, D)``, laid out as projections give them."""
    segments, heads, num, width = shape
    return [torch.randn(segments, num, heads, width, dtype=dtype).transpose(1, 2) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 40, 1 << 20])
@pytest.mark.parametrize("num", [1, 7, 33])
def test_blocks_are_attention_and_its_column_means(
    num: int, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision, too, everything is summed in float32: only the output is rounded."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block)
    query, key, value = tables(3, 2, num, 8, dtype=dtype)
    mixed, received = attend_and_receive(query, key, value, 0.3)
    attention = (query.double() @ key.double().transpose(2, 3) * 0.3).softmax(-1)
    step = max(1e-6, torch.finfo(dtype).eps)
    assert mixed.dtype == dtype and received.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), attention @ value.double(), atol=step, rtol=step)
    torch.testing.assert_close(received.double(), attention.mean((1, 2)), atol=1e-7, rtol=2e-6)
    assert mixed.transpose(1, 2).is_contiguous()


def exact_lse(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """``(S, H, N)`` float64, one row after the other."""
    rows = []
    for segment, (queries, keys) in enumerate(zip(query.double(), key.double(), strict=True)):
        added = 0.0 if bias is None else bias[segment].double()
        for head in range(len(queries)):
            rows += [torch.logsumexp(keys[head] @ row * scale + added, 0) for row in queries[head]]
    return torch.stack(rows).view(query.shape[:3])


class TestLse:
    """One operator gives SDPA's output and the LSE of its rows."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("num", [1, 40])
    @pytest.mark.parametrize("width", [8, 72, 80, 128])
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_is_sdpa_and_its_lse(self, with_bias: bool, width: int, num: int, dtype: torch.dtype) -> None:
        query, key, value = tables(3, 2, num, width, dtype=dtype)
        bias = torch.randn(3, num).to(dtype) if with_bias else None
        found = attend_with_lse(query, key, value, 0.3, bias)
        assert found is not None
        stock = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, None if bias is None else bias[:, None, None], scale=0.3
        )
        assert torch.equal(found[0], stock) and found[1].dtype == torch.float32
        step = 1e-5 if dtype == torch.float32 else 1e-3  # SDPA rounds logits where it multiplies halves
        torch.testing.assert_close(found[1].double(), exact_lse(query, key, 0.3, bias), atol=step, rtol=step)

    @pytest.mark.parametrize("mutation", ["scale", "bias", "row", "head", "base 2"])
    def test_the_oracle_sees_mistakes(self, mutation: str) -> None:
        query, key, value = tables(2, 3, 9, 8)
        bias = torch.randn(2, 9)
        found = attend_with_lse(
            query, key, value, 0.31 if mutation == "scale" else 0.3, None if mutation == "bias" else bias
        )
        assert found is not None
        lse = found[1].roll(1, {"row": 2, "head": 1}[mutation]) if mutation in ("row", "head") else found[1]
        lse = lse / math.log(2) if mutation == "base 2" else lse
        with pytest.raises(AssertionError):
            torch.testing.assert_close(lse.double(), exact_lse(query, key, 0.3, bias), atol=1e-3, rtol=1e-3)

    @pytest.mark.parametrize("num", [9, 32, 40])
    @pytest.mark.parametrize("kind", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
    def test_those_of_cuda_by_their_shapes(self, kind: str, num: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """PyTorch's own rules for shapes know what they are called with, and how long the rows of their LSE are."""
        number = int(getattr(SDPBackend, kind).value)
        monkeypatch.setitem(blocks._WITH_LSE, ("meta", number), blocks._WITH_LSE["cuda", number])
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: number)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # knows no device without memory
        query, key, value = (table.to("meta", torch.bfloat16) for table in tables(3, 2, num, 72))
        for bias in (None, query.new_empty(3, num))[: 1 if kind == "FLASH_ATTENTION" else 2]:
            found = attend_with_lse(query, key, value, 0.3, bias)
            assert found is not None
            assert (found[0].shape, found[1].shape) == (query.shape, (3, 2, num)) and found[1].dtype == torch.float32

    def test_gives_way(self) -> None:
        """To operators without an LSE, and to casts."""
        query, key, value = tables(1, 2, 9, 8)
        with sdpa_kernel(SDPBackend.MATH):
            assert attend_with_lse(query, key, value, 0.3) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert attend_with_lse(query, key, value, 0.3) is None
        assert attend_with_lse(query, key, value, 0.3) is not None


class Attention(torch.nn.Module):
    """What a stock attention layer does: looks its back-end up by its configuration, and calls it."""

    is_causal = False

    def __init__(self, back_end: str = "sdpa") -> None:
        super().__init__()
        self.config: Any = SiglipVisionConfig(attn_implementation=back_end)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return attend(self, query, key, value, mask, scaling=0.3, **kwargs)[0]


def eager_attention_forward(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Found as the eager attention of this module, as stock's is in theirs."""
    return siglip.eager_attention_forward(module, query, key, value, *args, **kwargs)


def tapped(back_end: str = "sdpa") -> Attention:
    """A layer that can be listened to."""
    attention = Attention(back_end).eval()
    attention.config = TappedConfig(attention.config)
    return attention


class TestTap:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_answers_plain_calls(self, dtype: torch.dtype) -> None:
        given, layer = tables(2, 2, 9, 8, dtype=dtype), tapped()
        listener = EncoderTap([9, 9], ranks=True, score=received_attention)
        with torch.no_grad(), AttentionTap(listener):
            mixed = layer(*given)
        step = max(1e-6, 2 * torch.finfo(dtype).eps)
        torch.testing.assert_close(mixed, layer(*given), atol=step, rtol=step)
        assert [tuple(table.shape) for table in listener.received] == [(2, 9)] and listener.scale == 0.3
        assert listener.row_lse() is None

    @pytest.mark.parametrize("back_end", ["sdpa", "eager"])
    @pytest.mark.parametrize("takes", [False, True])
    def test_leaves_the_lse(self, takes: bool, back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of all tokens or of none, in the order of the segments; the output is bitwise stock's."""
        monkeypatch.setattr(attention_tap, "takes", lambda device: takes)
        layer, parts = tapped(back_end), [tables(1, 2, 9, 8), tables(1, 2, 4, 8)]
        for score in (query_lse, received_attention):
            listener = EncoderTap([9, 4], ranks=True, score=score)
            with torch.no_grad(), AttentionTap(listener):
                found = [layer(*part) for part in parts]
            if score is query_lse or takes:
                assert all(torch.equal(one, layer(*part)) for one, part in zip(found, parts, strict=True))
            lse = listener.row_lse()
            assert (lse is None) == (back_end == "eager" or (score is received_attention and not takes))
            if lse is not None:
                expected = torch.cat([exact_lse(part[0], part[1], 0.3, None)[0] for part in parts], 1)
                torch.testing.assert_close(lse.double(), expected, atol=1e-5, rtol=1e-5)
                assert lse.is_contiguous() and not listener.received

    def test_half_an_lse_is_none(self) -> None:
        listener, layer = EncoderTap([9, 4], ranks=True, score=query_lse), tapped()
        with torch.no_grad(), AttentionTap(listener):
            layer(*tables(1, 2, 9, 8))
            layer(*tables(1, 2, 4, 8), mask=torch.zeros(1, 1, 4, 4))
        assert listener.row_lse() is None

    def test_hears_what_another_engine_attends_with(self) -> None:
        """Which says no lengths, and lends no LSE."""
        listener = EncoderTap([], ranks=True)
        query, key, _ = tables(1, 2, 9, 8)
        listener.hear(query, key, 0.3)
        assert listener.row_lse() is None
        assert torch.equal(listener.keys(), key[0].transpose(0, 1))

    @pytest.mark.parametrize(
        "settings", [{"is_causal": True}, {"mask": torch.zeros(2, 1, 9, 9)}, {"dropout": 0.5}, {"training": True}]
    )
    def test_lets_other_calls_through(self, settings: dict[str, Any]) -> None:
        given, layer = tables(2, 2, 9, 8), tapped()
        layer.train(settings.pop("training", False))
        listener = EncoderTap([9, 9], ranks=True, score=received_attention)
        with torch.no_grad():
            torch.manual_seed(0)
            with AttentionTap(listener):
                mixed = layer(*given, **settings)
            torch.manual_seed(0)
            assert torch.equal(mixed, layer(*given, **settings)) and not listener.received

    @pytest.mark.parametrize("why", ["float64", "gradients", "not wanted", "eager"])
    def test_lets_other_tables_through(self, why: str) -> None:
        given = tables(2, 2, 9, 8, dtype=torch.float64 if why == "float64" else torch.float32)
        given[0].requires_grad_(why == "gradients")
        layer = tapped("eager" if why == "eager" else "sdpa")
        listener = EncoderTap([9, 9], ranks=True, score=None if why == "not wanted" else received_attention)
        with AttentionTap(listener):
            mixed = layer(*given)
        assert torch.equal(mixed, layer(*given)) and not listener.received
        query, key = listener.heads()
        assert torch.equal(query, given[0].transpose(1, 2).flatten(0, 1)) and not query.requires_grad
        assert torch.equal(key, given[1].transpose(1, 2).flatten(0, 1))

    @pytest.mark.parametrize("back_end", ["sdpa", "eager"])
    def test_segments_follow_each_other(self, back_end: str) -> None:
        layer, parts = tapped(back_end), [tables(1, 2, num, 8) for num in (3, 9, 5)]
        listener = EncoderTap([3, 9, 5], ranks=True)
        with torch.no_grad(), AttentionTap(listener) as tap:
            for part in parts:
                layer(*part)
        assert tap.calls == 3
        for table, index in zip(listener.heads(), (0, 1), strict=True):
            assert torch.equal(table, torch.cat([part[index][0].transpose(0, 1) for part in parts]))

    def test_a_closed_tap_changes_nothing(self) -> None:
        layer, plain = tapped(), Attention().eval()
        given, names = tables(1, 2, 9, 8), set(ALL_ATTENTION_FUNCTIONS)
        with AttentionTap(EncoderTap([9], ranks=True)):
            assert layer.config._attn_implementation == "illava|sdpa" and set(ALL_ATTENTION_FUNCTIONS) != names
            assert layer.config.hidden_size == plain.config.hidden_size
            layer(*given)
        assert layer.config._attn_implementation == "sdpa" and set(ALL_ATTENTION_FUNCTIONS) == names
        assert torch.equal(layer(*given), plain(*given))

    def test_who_calls_no_back_end_is_not_heard(self) -> None:
        names = set(ALL_ATTENTION_FUNCTIONS)
        with pytest.raises(PatchStateError, match="did not call transformers' attention interface"):
            with AttentionTap(EncoderTap([9], ranks=True)):
                assert tapped().config._attn_implementation == "illava|sdpa"
        assert set(ALL_ATTENTION_FUNCTIONS) == names

    def test_threads_do_not_hear_each_other(self) -> None:
        layer, given = tapped(), tables(1, 2, 9, 8)
        with AttentionTap(EncoderTap([9], ranks=True)) as tap:
            with ThreadPoolExecutor(1) as other:
                other.submit(layer, *given).result()
            assert tap.calls == 0
            layer(*given)

    def test_copies_and_pickles(self) -> None:
        layer = tapped()
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(twin.config) is TappedConfig and twin.config.stock is not layer.config.stock
            assert twin.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
class TestInAModel:
    def test_both_ways_give_the_same(self, family: str, back_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model(family, attn_implementation=back_end)
        inputs = prompt(model, richest(family))
        session = patch(model, **MERGING, track=True)
        found = []
        for answers in (True, False):
            monkeypatch.setattr(attention_tap, "_is_plain", lambda *_, answers=answers, **__: answers)
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
        inner = EncoderTap.heads

        def heads(listener: EncoderTap) -> Any:
            looked.append(1)
            return inner(listener)

        monkeypatch.setattr(EncoderTap, "heads", heads)
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
