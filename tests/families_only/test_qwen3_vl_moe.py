"""Qwen3-VL's mixture of experts: the family's model with another tower class and experts in the decoder.

What the suite asks every family is asked here of this model: the family's builder is replaced.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_qwen3_vl import RAGGED, taken
from transformers import Qwen3VLMoeForConditionalGeneration

import test_batching
import test_every_family
import test_generate
import test_identity
import test_no_trace
import test_past_and_report
import test_report
from decode_helpers import BOTH, IMAGE, IMAGES, TEXT
from families import family_of
from families.qwen3_vl import EXPERTS, Qwen3VL
from helpers import PROMPTS, VISUAL, assert_same, assert_says, everything, needs_ready_features, prompt
from illava_hooks import METHODS, PatchStateError, UnsupportedModelError, merging, patch, session_of
from illava_hooks.patchers import qwen3_vl
from illava_hooks.tools.bench import Workload, build_shape, build_workload, compare
from kind_helpers import assert_balancing_loss_is_stocks
from reference_checks import RULES, SAMPLES, SETTINGS, check_forward
from tiny_models import build, inputs_for, tiny_model

NAME = "qwen3_vl"
#: One layer without experts.
MIXED: dict[str, Any] = {"mlp_only_layers": [2]}


def experts(
    known: Qwen3VL,
    attn_implementation: str = "sdpa",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **overrides: Any,
) -> Any:
    """The tiny model with experts in all but one layer."""
    kind = Qwen3VLMoeForConditionalGeneration
    config = known.config(vision, EXPERTS | MIXED | (text or {}), model_class=kind, **overrides)
    model = build(kind, config, attn_implementation, seed, dtype)
    if dtype is torch.float64:
        model.set_experts_implementation("eager")  # stock: grouped products take no float64
    with torch.no_grad():  # a table of matrices was drawn as one
        for name, weight in model.named_parameters():
            if "experts" in name:
                weight *= math.sqrt(weight.shape[1])
    return model


@pytest.fixture(autouse=True)
def the_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for the family's tiny model gets this one."""
    monkeypatch.setattr(Qwen3VL, "build", experts)


def test_it_is_the_mixture() -> None:
    model = tiny_model(NAME)
    assert model.config.model_type == "qwen3_vl_moe"
    kinds = [type(layer.mlp).__name__ for layer in model.model.language_model.layers]
    assert kinds == ["Qwen3VLMoeTextSparseMoeBlock"] * 2 + ["Qwen3VLMoeTextMLP", "Qwen3VLMoeTextSparseMoeBlock"]


# ------------------------------------------------------------------------------- what every family shows


@pytest.mark.parametrize("kind", PROMPTS)
def test_stock_where_nothing_merges(kind: str) -> None:
    model, stock = tiny_model(NAME), tiny_model(NAME)
    inputs = prompt(model, kind)
    expected = everything(stock, inputs)
    patch(model, [1, 2], 0, [2], 1.0)
    assert_same(everything(model, inputs), expected)
    patch(model, **SETTINGS)
    with merging(model, False):
        assert_same(everything(model, inputs), expected)


@pytest.mark.parametrize("kind", VISUAL)
def test_idle_machinery(kind: str) -> None:
    test_identity.check_idle(NAME, kind, test_identity.IDLE, everything, dtype=torch.float64)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("kind", ["ragged", "image and video"])
def test_the_score_is_the_row_of_the_eager_attention(kind: str, layer: int) -> None:
    test_every_family.test_the_score_is_the_row_of_the_eager_attention(NAME, kind, layer, "left")


@pytest.mark.parametrize("layers", [[1], [2], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("kind", ["ragged", "image and video"])
def test_the_decoder_is_its_layers_one_by_one(kind: str, layers: list[int]) -> None:
    test_every_family.test_the_decoder_is_its_layers_one_by_one(NAME, kind, "sdpa", layers, "left")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch", RAGGED)
def test_against_the_reference(batch: str, rule: str) -> None:
    """Stock weighs experts in float32, so rounding shows a bit more than elsewhere."""
    check_forward(NAME, RAGGED[batch], rule, SETTINGS, tolerance=4e-6)


@pytest.mark.parametrize("rule", ["recycle", "diverse"])
def test_taking_stacked_features_is_noticed(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen3_vl, "apply_merge", taken)
    with pytest.raises(AssertionError, match="not close"):
        check_forward(NAME, RAGGED["images"], rule, SETTINGS)


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
    patch(model, **SETTINGS)
    inputs = inputs_for(model, [IMAGES, TEXT, IMAGE, BOTH])
    ids = [model.generate(**inputs, max_new_tokens=5, **more) for more in ({}, {"cache_implementation": "static"})]
    assert torch.equal(*ids)


def test_no_trace_is_left() -> None:
    test_no_trace.test_unpatch_leaves_nothing(NAME)
    test_no_trace.test_deepcopy_is_an_independent_patched_model(NAME)


# -------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("merged", [False, True])
def test_flops_are_those_of_the_experts_that_a_token_is_sent_to(merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(known: Qwen3VL, *args: Any, **kwargs: Any) -> Any:
        model = experts(known, *args, **kwargs)
        model.set_experts_implementation("eager")  # torch's counter does not know grouped products
        return model

    monkeypatch.setattr(Qwen3VL, "build", counted)
    test_report.test_flops_are_those_that_run(NAME, merged)


def test_flops_behind_a_past() -> None:
    test_past_and_report.test_flops_count_the_keys_of_the_past(NAME, "two turns")


def test_a_dense_layer_is_counted_as_one() -> None:
    model = tiny_model(NAME)
    shape = qwen3_vl.FAMILY.decoder_shape(model)
    routed = 6 * 48 * 24 * 2 + 2 * 48 * 6
    assert shape.mlp_flops == (routed, routed, 6 * 48 * 96, routed)
    assert qwen3_vl.FAMILY.decoder_shape(tiny_model(NAME, text={"decoder_sparse_step": 2})).mlp_flops == (
        6 * 48 * 96,
        routed,
        6 * 48 * 96,
        routed,
    )


@pytest.mark.parametrize("settings", [SETTINGS, SETTINGS | {"llm_layers": []}], ids=["both", "encoder"])
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
    assert_balancing_loss_is_stocks(tiny_model(NAME), SAMPLES["image"], SETTINGS)


def test_a_balancing_loss_by_default_is_refused_by_patch() -> None:
    model = tiny_model(NAME, text={"output_router_logits": True})
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, **SETTINGS)
    assert_says(caught.value, "^text_config.output_router_logits is True", "set output_router_logits=False")
    assert session_of(model) is None
    patch(model, [], 0, [], 1.0)


def test_its_family_is_the_dense_one() -> None:
    assert family_of(tiny_model(NAME)).name == NAME
    assert qwen3_vl.FAMILY.limits(tiny_model(NAME)).family == NAME


@needs_ready_features
def test_bench_counts_the_experts_that_a_token_is_sent_to() -> None:
    """And the router; the published shape is a mixture."""
    model = build_shape("qwen3-vl-30b-a3b", narrow=True)
    load = Workload(patches=256, text=20, new=2)
    assert isinstance(model, Qwen3VLMoeForConditionalGeneration)
    found = compare(model, load, {}, 1, warm_up=False)
    tokens = int(build_workload(model, load)["input_ids"].shape[1])
    width, heads, keys = 64, 2 * 32, 32
    mlp = 6 * width * 32 * 2 + 2 * width * 4  # two of four experts, 32 wide
    layer = 4 * tokens * width * (heads + keys) + 2 * tokens**2 * heads + tokens * mlp
    assert found.report.llm_flops[1] == 10 * layer
    assert found.report.llm_flops[0] < found.report.llm_flops[1] and found.cost.decoding > 0
