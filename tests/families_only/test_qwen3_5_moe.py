"""Qwen3.5's mixture of experts: the family's model with another tower class, experts and one that all tokens share.

What the suite asks every family is asked here of this model: the family's builder is replaced.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_qwen3_5 import BATCHES, CLOSE, ENCODER, FULL, LINEAR, RULES, needs_solver
from transformers import Qwen3_5MoeForConditionalGeneration

import test_batching
import test_every_family
import test_generate
import test_no_trace
import test_past_and_report
import test_report
from decode_helpers import BOTH, IMAGE, IMAGES, SETTINGS, TEXT, steps
from families import family_of
from families.qwen3_5 import EXPERTS, Qwen35, settle
from helpers import PROMPTS, assert_same, assert_says, everything, needs_ready_features, prompt
from illava_hooks import METHODS, PatchStateError, UnsupportedModelError, merging, patch, session_of
from illava_hooks.engine import decoder
from illava_hooks.patchers import qwen3_5
from kind_helpers import assert_balancing_loss_is_stocks
from reference_checks import SAMPLES, check_forward
from tiny_models import build, inputs_for, tiny_model

NAME = "qwen3_5"
IN_TURN: dict[str, Any] = EXPERTS | {"layer_types": [LINEAR, FULL] * 2}
MERGING: dict[str, Any] = ENCODER | {"llm_layers": [2], "llm_ratio": 0.5}


def experts(
    known: Qwen35,
    attn_implementation: str = "sdpa",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **overrides: Any,
) -> Any:
    """The tiny model with experts, both kinds of layers in turn."""
    config = known.config(vision, IN_TURN | (text or {}), Qwen3_5MoeForConditionalGeneration, **overrides)
    model = settle(build(Qwen3_5MoeForConditionalGeneration, config, attn_implementation, seed, dtype))
    if dtype is torch.float64:
        model.set_experts_implementation("eager")  # stock: grouped products take no float64
    with torch.no_grad():  # a table of matrices was drawn as one
        for name, weight in model.named_parameters():
            if ".experts." in name:
                weight *= math.sqrt(weight.shape[1])
    return model


@pytest.fixture(autouse=True)
def the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for the family's tiny model gets this one."""
    monkeypatch.setattr(Qwen35, "build", experts)
    monkeypatch.setattr(Qwen35, "closest", CLOSE)
    monkeypatch.setitem(SETTINGS, NAME, MERGING)


def test_it_is_the_mixture() -> None:
    model = tiny_model(NAME)
    assert model.config.model_type == "qwen3_5_moe"
    assert {type(layer.mlp).__name__ for layer in model.model.language_model.layers} == {"Qwen3_5MoeSparseMoeBlock"}
    assert family_of(model).name == NAME
    assert qwen3_5.FAMILY.limits(model).family == NAME


# ------------------------------------------------------------------------------- what every family shows


@pytest.mark.parametrize("kind", PROMPTS)
def test_stock_where_nothing_merges(kind: str) -> None:
    model, stock = tiny_model(NAME), tiny_model(NAME)
    inputs = prompt(model, kind)
    expected = everything(stock, inputs)
    patch(model, [1, 2], 0, [2], 1.0)
    assert_same(everything(model, inputs), expected)
    patch(model, **MERGING)
    with merging(model, False):
        assert_same(everything(model, inputs), expected)


@pytest.mark.parametrize("kind", ["ragged", "image and video"])
def test_the_score_is_the_row_of_the_eager_attention(kind: str) -> None:
    test_every_family.test_the_score_is_the_row_of_the_eager_attention(NAME, kind, 2, "left")


@pytest.mark.parametrize("kind", ["ragged", "image and video"])
def test_the_decoder_is_its_layers_one_by_one(kind: str) -> None:
    test_every_family.test_the_decoder_is_its_layers_one_by_one(NAME, kind, "sdpa", [2], "left")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch", BATCHES)
def test_against_the_reference(batch: str, rule: str) -> None:
    check_forward(NAME, BATCHES[batch], rule, MERGING, tolerance=CLOSE)


def test_merging_at_the_wrong_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above could fail: survivors whose positions are those of their neighbours."""
    after = decoder._after

    def shifted(plan: Any, state: Any, counts: Any) -> Any:
        found = after(plan, state, counts)
        found.rope = found.rope.roll(1, dims=1)
        return found

    monkeypatch.setattr(decoder, "_after", shifted)
    with pytest.raises(AssertionError, match="not close"):
        check_forward(NAME, BATCHES["images"], "drop", MERGING, tolerance=CLOSE)


@pytest.mark.parametrize("batch", test_batching.BATCHES)
def test_a_batch_answers_as_its_samples(batch: str) -> None:
    test_batching.test_forward(NAME, batch, "sdpa", "left")
    test_batching.test_greedy(NAME, batch)
    test_batching.test_beam_search(NAME, batch)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "illava-reference"])
def test_every_method(method: str) -> None:
    test_batching.test_forward_of_every_method(NAME, method)


@pytest.mark.parametrize("kind", ["images", "with text"])
def test_a_second_turn(kind: str) -> None:
    test_generate.test_a_second_turn_goes_on_with_the_cache(NAME, kind)


def test_static_cache() -> None:
    model = tiny_model(NAME)
    patch(model, **MERGING)
    inputs = inputs_for(model, [IMAGES, TEXT, IMAGE, BOTH])
    caches: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}]
    ids = [steps(model, inputs, **cache)[0] for cache in caches]
    assert torch.equal(*ids)


def test_no_trace_is_left() -> None:
    test_no_trace.test_unpatch_leaves_nothing(NAME)
    test_no_trace.test_deepcopy_is_an_independent_patched_model(NAME)


# -------------------------------------------------------------------------------------------- experts


@needs_solver
@pytest.mark.parametrize("merged", [False, True])
def test_flops_are_those_of_the_experts_that_a_token_is_sent_to(merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(known: Qwen35, *args: Any, **kwargs: Any) -> Any:
        model = experts(known, *args, **kwargs)
        model.set_experts_implementation("eager")  # torch's counter does not know grouped products
        return model

    monkeypatch.setattr(Qwen35, "build", counted)
    test_report.test_flops_are_those_that_run(NAME, merged)


@needs_ready_features
def test_flops_behind_a_past() -> None:
    test_past_and_report.test_flops_count_the_keys_of_the_past(NAME, "two turns")


@pytest.mark.parametrize("settings", [MERGING, MERGING | {"llm_layers": []}], ids=["both", "encoder"])
def test_a_balancing_loss_is_refused_in_a_call_that_merges(settings: dict[str, Any]) -> None:
    model = tiny_model(NAME)
    inputs = inputs_for(model, [SAMPLES["image"]])
    stock = model(**inputs, output_router_logits=True, labels=inputs["input_ids"])
    patch(model, **settings)
    with pytest.raises(PatchStateError) as caught:
        model(**inputs, output_router_logits=True)
    assert_says(caught.value, "^output_router_logits is True", r"use output_router_logits=False, or merging\(")
    with merging(model, False):
        again = model(**inputs, output_router_logits=True, labels=inputs["input_ids"])
    assert torch.equal(stock.aux_loss, again.aux_loss) and torch.equal(stock.loss, again.loss)
    text = inputs_for(model, [SAMPLES["text"]])
    assert model(**text, output_router_logits=True).aux_loss is not None


@torch.no_grad()
def test_a_balancing_loss_is_stocks_where_nothing_is_removed() -> None:
    """Routers see what they see in stock, though every layer that could merge is in place."""
    assert_balancing_loss_is_stocks(tiny_model(NAME), SAMPLES["image"], MERGING)


def test_a_balancing_loss_by_default_is_refused_by_patch() -> None:
    model = tiny_model(NAME, text={"output_router_logits": True})
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, **MERGING)
    assert_says(caught.value, "^text_config.output_router_logits is True", "set output_router_logits=False")
    assert session_of(model) is None
    patch(model, [], 0, [], 1.0)
