"""Contexts, number types and attention back-ends that change around a model which is already patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from decode_helpers import IMAGE, RAGGED, SETTINGS, patched, single
from families import families, family_of
from helpers import (
    OLD_TORCH,
    Found,
    assert_differ,
    assert_near,
    assert_same,
    forward,
    key_lengths,
    keyed,
    needs_any_head_width,
)
from illava_hooks import merging, patch, session_of, unpatch
from tiny_models import FAMILIES, Inputs, Sample, inputs_for, tiny_model

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}
NEW = 4


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def generated(model: Any, inputs: Inputs, **kwargs: Any) -> Found:
    """Logits of each step, and every layer's keys."""
    done = model.generate(
        **inputs, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True, do_sample=False, **kwargs
    )
    layers = enumerate(keyed(done.past_key_values))
    return {"logits": torch.stack(list(done.logits)), **{f"keys {index}": layer.keys for index, layer in layers}}


def assert_merged(model: Any, inputs: Inputs, found: Found) -> None:
    """Fewer keys than tokens in every layer, and ever fewer."""
    widths = [keys.shape[-2] for name, keys in found.items() if name.startswith("keys")]
    assert widths[-1] < widths[0] < inputs["input_ids"].shape[1]
    assert session_of(model).report.kept_fraction < 0.5


# ------------------------------------------------------------------------------------------- contexts


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("family", FAMILIES)
def test_contexts(family: str, context: Callable[[], Any]) -> None:
    """The same everywhere; with gradients to rounding, for scores are then taken beside the stock attention."""
    model = patched(family)
    inputs = inputs_for(model, RAGGED)
    expected = forward(model, inputs)
    with context():
        out = model(**inputs, output_hidden_states=True)
        found = generated(model, inputs)
    tolerance = CLOSE if context is torch.enable_grad else {"atol": 0.0, "rtol": 0.0}
    torch.testing.assert_close(out.logits, expected["forward.logits"], **tolerance)
    assert out.logits.is_inference() == (context is torch.inference_mode)
    assert out.logits.requires_grad == (context is torch.enable_grad)
    assert_merged(model, inputs, found)
    assert_same(found, generated(model, inputs))
    with merging(model, False), context():
        assert_differ(model(**inputs).logits.clone(), expected["forward.logits"])


@pytest.mark.parametrize("samples", [[IMAGE], RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_merges_as_many_and_answers_nearly_the_same(family: str, samples: list[Sample]) -> None:
    model = patched(family)
    inputs = inputs_for(model, samples)
    wide = generated(model, inputs)
    report = session_of(model).report
    with torch.autocast("cpu", torch.bfloat16):
        narrow = generated(model, inputs)
    assert_merged(model, inputs, narrow)
    again = session_of(model).report
    assert [visual.vision_tokens for visual in again.visuals] == [visual.vision_tokens for visual in report.visuals]
    # Where a tile's padding is cut off, how many tokens are cut depends on which ones survived rounding.
    slack = 2 if OLD_TORCH and not family_of(family).one_to_one else 0
    for counts, expected in zip(again.sequence_tokens, report.sequence_tokens, strict=True):
        assert counts == pytest.approx(expected, abs=slack)
    if not slack:
        assert {name: found.shape for name, found in narrow.items()} == {name: t.shape for name, t in wide.items()}
    with merging(model, False), torch.autocast("cpu", torch.bfloat16):
        stock = generated(model, inputs)
    rounding = (narrow["logits"][0].float() - wide["logits"][0]).abs().mean()
    assert rounding < 0.5 * (narrow["logits"][0].float() - stock["logits"][0].float()).abs().mean()


# ---------------------------------------------------------------------------------------- number types


CASTS: dict[str, tuple[torch.dtype, Callable[[Any], Any]]] = {
    "half()": (torch.float16, lambda model: model.half()),
    "bfloat16()": (torch.bfloat16, lambda model: model.bfloat16()),
    "double()": (torch.float64, lambda model: model.double()),
    "to(bfloat16)": (torch.bfloat16, lambda model: model.to(torch.bfloat16)),
    "to(cpu, float16)": (torch.float16, lambda model: model.to("cpu", torch.float16)),
}


@pytest.mark.parametrize("how", CASTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cast_after_patch_is_a_cast_before_patch(family: str, how: str) -> None:
    dtype, change = CASTS[how]
    after, before = change(patched(family)), change(tiny_model(family))
    patch(before, **SETTINGS[family])
    inputs = cast(inputs_for(after, RAGGED), dtype)
    found = generated(after, inputs)
    assert_merged(after, inputs, found)
    assert {tensor.dtype for name, tensor in found.items() if name != "logits"} == {dtype}
    assert_same(found, generated(before, inputs))
    unpatch(after)
    with merging(before, False):
        assert_same(generated(after, inputs), generated(before, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_to_wide_and_back(family: str) -> None:
    """What float32 holds, float64 holds: nothing is left over of the detour."""
    model = patched(family)
    inputs = inputs_for(model, RAGGED)
    expected = generated(model, inputs)
    wide = generated(model.double(), cast(inputs, torch.float64))
    assert wide["keys 0"].dtype == torch.float64
    assert_same(generated(model.float(), inputs), expected)


# ------------------------------------------------------------------------------------------ back-ends


@pytest.mark.parametrize("samples", [[IMAGE], RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_back_end_after_patch(family: str, samples: list[Sample]) -> None:
    model = patched(family)
    inputs = inputs_for(model, samples)
    for name in ("eager", "sdpa", "eager"):
        model.set_attn_implementation(name)
        found, fresh = generated(model, inputs), patched(family, attn_implementation=name)
        assert_merged(model, inputs, found)
        assert_same(found, generated(fresh, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_back_end_for_each_part(family: str) -> None:
    """Only the text model can then tell its attentions."""
    model, expected = patched(family), patched(family)
    inputs = single(model, IMAGE)
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    lengths = key_lengths(out.past_key_values)
    assert [weights.shape[-2:] for weights in out.attentions] == [(n, n) for n in lengths]
    assert_near({"": out.logits}, {"": forward(expected, inputs)["forward.logits"]}, **CLOSE)


@needs_any_head_width
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # fused needs a compiler
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # transformers' own call
@pytest.mark.parametrize("family", families(back_end="flex_attention"))
def test_flex_attention_after_patch(family: str) -> None:
    model, reference = patched(family), patched(family)
    inputs = inputs_for(model, RAGGED)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        found = generated(model, inputs)
    assert_merged(model, inputs, found)
    assert_near(found, generated(reference, inputs), atol=1e-4)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(families(back_end="flex_attention"))))
def test_a_back_end_that_stock_does_not_offer(family: str) -> None:
    with pytest.raises(ValueError, match="does not support an attention implementation through torch's flex"):
        patched(family).set_attn_implementation("flex_attention")


@pytest.mark.parametrize("family", FAMILIES)
def test_attentions_of_a_back_end_without_them(family: str) -> None:
    """As stock: none are given."""
    model, stock = patched(family), tiny_model(family)
    inputs = single(model, IMAGE)

    def attentions(of: Any) -> Tensor | tuple[Any, ...] | None:
        with torch.no_grad():
            return of(**inputs, output_attentions=True).attentions

    assert attentions(model) == attentions(stock)
