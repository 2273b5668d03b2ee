"""Caches that `generate` can be asked for beside dynamic and static ones, and continuous batching."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import transformers.cache_utils
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cache_utils import QuantizedLayer

from decode_helpers import (
    IMAGE,
    KINDS,
    RAGGED,
    SETTINGS,
    TEXT,
    next_positions,
    patched,
    single,
    skip_where_stock_mixes_images,
)
from families import families, families_and
from helpers import assert_differ, keyed
from illava_hooks import merging, patch
from illava_hooks.engine.compat import CACHE
from tiny_models import FAMILIES, Inputs, Sample, inputs_for, tiny_model

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}}
NEW = 5


def generated(model: Any, inputs: Inputs, **kwargs: Any) -> Any:
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **wanted, **kwargs})


def assert_same_answers(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), **CLOSE)
    assert torch.equal(ours.sequences[:, -NEW:], theirs.sequences[:, -NEW:])


def physical(cache: Any) -> list[int]:
    """Keys in each layer, also where they are not to be seen as one tensor."""
    return [int(layer.num_keys()) for layer in keyed(cache)]


# ------------------------------------------------------------------------------------ quantized caches


class Exact(QuantizedLayer):
    """Stands in for a back-end's layer: everything goes through the quantized states, and nothing is rounded."""

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor]:
        return (tensor.clone(),)

    def _dequantize(self, quantized: tuple[Tensor]) -> Tensor:
        return quantized[0]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of `generate` for a quantized cache that rounds nothing; it is folded in at every third token."""
    monkeypatch.setattr(transformers.cache_utils, "QuantoQuantizedLayer", Exact)
    return {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "residual_length": 3}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "kind"), families_and(KINDS, carries_state=False))
def test_quantized_cache(family: str, kind: str, way: str, exact: dict[str, Any]) -> None:
    if way == "beams" and "reorder_cache" not in vars(QuantizedLayer):
        pytest.skip("stock: quantized caches of this release cannot be reordered")
    if way == "beams":
        skip_where_stock_mixes_images(family, KINDS[kind])
    model = patched(family)
    inputs = inputs_for(model, KINDS[kind])
    expected = generated(model, inputs, **WAYS[way])
    found = generated(model, inputs, **exact, **WAYS[way])
    assert_same_answers(found, expected)
    assert [isinstance(layer, Exact) for layer in found.past_key_values.layers] == [True] * 4
    assert physical(found.past_key_values) == physical(expected.past_key_values)
    assert max(physical(found.past_key_values)) < inputs["input_ids"].shape[1]
    with merging(model, False):
        assert_differ(generated(model, inputs, **exact, **WAYS[way]).logits[0], expected.logits[0])


@pytest.mark.skipif(
    not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"), reason="this release has no fp8 caches"
)
@pytest.mark.parametrize("family", families(carries_state=False))
def test_fp8_cache(family: str) -> None:
    """Really rounded: near, and not the same."""
    model = patched(family)
    inputs = single(model, IMAGE)
    expected = generated(model, inputs)
    found = generated(model, inputs, cache_implementation="quantized", cache_config={"backend": "fp8"})
    torch.testing.assert_close(found.logits[0], expected.logits[0], **CLOSE)
    torch.testing.assert_close(found.logits[1], expected.logits[1], atol=0.3, rtol=0.0)
    assert_differ(found.logits[1], expected.logits[1])
    assert physical(found.past_key_values) == physical(expected.past_key_values)


@pytest.mark.parametrize("tokens", [1, 4, 5], ids=["a prompt", "all folded in", "some behind"])
@pytest.mark.parametrize("family", families(carries_state=False))
def test_a_new_image_behind_a_quantized_cache(family: str, tokens: int, exact: dict[str, Any]) -> None:
    """Its tokens are ranked by the keys that the attention gets, whatever form the cache keeps them in."""
    model = patched(family)
    first, second = single(model, IMAGE), single(model, Sample(text_seed=8, images=((40, 40),)))
    done = [generated(model, first, max_new_tokens=tokens, **kwargs) for kwargs in (exact, {})]
    second.pop("attention_mask")
    where = next_positions(model, first, second["input_ids"].shape[1])
    caches = [each.past_key_values for each in done]
    with torch.no_grad():
        found, expected = (model(**second, **{CACHE: cache}, **where).logits for cache in caches)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert physical(caches[0]) == physical(caches[1])
    done = [generated(model, first, max_new_tokens=tokens, **kwargs) for kwargs in (exact, {})]
    with torch.no_grad(), merging(model, False):
        found, expected = (model(**second, **{CACHE: each.past_key_values}, **where).logits for each in done)
    torch.testing.assert_close(found, expected, **CLOSE)


# ------------------------------------------------------------------------------------ offloaded caches


class NoStream(contextlib.nullcontext[None]):
    """Stands in for a CUDA stream, so that caches go to and fro on a CPU."""

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def wait_stream(self, other: Any) -> None: ...


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that a machine without a GPU has not."""
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", NoStream)


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("samples", [[IMAGE], RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_cache(family: str, samples: list[Sample], implementation: str, way: str) -> None:
    if way == "beams":
        skip_where_stock_mixes_images(family, samples)
    model = patched(family)
    inputs = inputs_for(model, samples)
    expected = generated(model, inputs, **WAYS[way])
    found = generated(model, inputs, cache_implementation=implementation, disable_compile=True, **WAYS[way])
    assert_same_answers(found, expected)
    assert found.past_key_values.offloading
    assert physical(found.past_key_values) == physical(expected.past_key_values)


# --------------------------------------------------------------------------------- continuous batching


def batched(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """New tokens of each prompt by continuous batching, in little memory."""
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=512, max_memory_percent=0.01)
    done = model.generate_batch(
        prompts, generation_config=settings, continuous_batching_config=small, warmup=False, progress_bar=False
    )
    return [done[name].generated_tokens for name in sorted(done)]


@pytest.mark.parametrize("family", families(carries_state=False))
def test_continuous_batching_is_for_text(family: str) -> None:
    """`generate_batch` takes ids only: nothing can merge in it. Text is answered as ever, and later images merge."""
    model, stock = patched(family), tiny_model(family)
    if not (expected := batched(stock, [[30, 40, 50], [60, 70]])):
        pytest.skip("stock: continuous batching of this release does not find the heads in a composite config")
    assert batched(model, [[30, 40, 50], [60, 70]]) == expected
    assert model.config._attn_implementation == "sdpa"
    fresh = tiny_model(family)
    patch(fresh, **SETTINGS[family])
    after, before = (generated(m, single(m, IMAGE)) for m in (model, fresh))
    torch.testing.assert_close(torch.stack(after.logits), torch.stack(before.logits), **CLOSE)
    assert physical(after.past_key_values) == physical(before.past_key_values)
    alone = generated(stock, single(stock, TEXT))
    ids = single(model, TEXT)["input_ids"][0].tolist()
    assert batched(model, [ids]) == [alone.sequences[0, -NEW:].tolist()]
