"""Idefics3: SmolVLM's elder, with classes of its own and placeholders that are found where they are filled.

What the suite asks every family is asked here of this model: the family's builder takes other classes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Idefics3ForConditionalGeneration

import test_batching
import test_every_family
import test_generate
import test_no_trace
import test_provenance
import test_report
import test_shapes
from decode_helpers import IMAGE, IMAGES, TEXT
from families.smolvlm import SmolVLM
from helpers import PROMPTS, VISUAL, assert_differ, assert_same, everything, prompt
from illava_hooks import METHODS, merging, patch
from illava_hooks.patchers import smolvlm
from test_identity import IDLE, check_idle
from tiny_models import inputs_for, tiny_model

NAME = "smolvlm"
SETTINGS: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 0.25, "llm_layers": [2], "llm_ratio": 0.5}


@pytest.fixture(autouse=True)
def the_elder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for the family's tiny model gets this one."""
    monkeypatch.setattr(SmolVLM, "model_class", Idefics3ForConditionalGeneration)


def test_it_is_the_elder() -> None:
    model = tiny_model(NAME)
    assert model.config.model_type == "idefics3" and not hasattr(model.model, "get_placeholder_mask")


IMAGE_KINDS = [kind for kind in VISUAL if "video" not in kind]


@pytest.mark.parametrize("kind", [kind for kind in PROMPTS if "video" not in kind])
def test_stock_where_nothing_merges(kind: str) -> None:
    model, stock = tiny_model(NAME), tiny_model(NAME)
    inputs = prompt(model, kind)
    expected = everything(stock, inputs)
    patch(model, [1, 2], 0, [2], 1.0)
    assert_same(everything(model, inputs), expected)
    patch(model, **SETTINGS)
    with merging(model, False):
        assert_same(everything(model, inputs), expected)
    patch(model, **SETTINGS)
    assert_differ(everything(model, inputs)["forward.logits"], expected["forward.logits"]) if kind != "text" else None


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_idle_machinery(kind: str) -> None:
    check_idle(NAME, kind, IDLE, everything, dtype=torch.float64)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_the_score_is_the_row_of_the_eager_attention(kind: str, layer: int) -> None:
    test_every_family.test_the_score_is_the_row_of_the_eager_attention(NAME, kind, layer, "left")


@pytest.mark.parametrize("layers", [[1], [2], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_the_decoder_is_its_layers_one_by_one(kind: str, layers: list[int]) -> None:
    test_every_family.test_the_decoder_is_its_layers_one_by_one(NAME, kind, "sdpa", layers, "left")


@pytest.mark.parametrize("batch", ["ragged", "text first"])
def test_a_batch_answers_as_its_samples(batch: str) -> None:
    test_batching.test_forward(NAME, batch, "sdpa", "left")
    test_batching.test_greedy(NAME, batch)
    test_batching.test_beam_search(NAME, batch)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "illava-reference"])
def test_every_method(method: str) -> None:
    test_batching.test_forward_of_every_method(NAME, method)


def test_a_second_turn() -> None:
    test_generate.test_a_second_turn_goes_on_with_the_cache(NAME, "images")


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_embeddings_give_what_ids_give(way: str) -> None:
    test_generate.test_embeddings_give_what_ids_give(NAME, "images", way)


def test_static_cache() -> None:
    model = tiny_model(NAME)
    patch(model, **SETTINGS)
    inputs = inputs_for(model, [IMAGES, TEXT, IMAGE])
    ids = [model.generate(**inputs, max_new_tokens=5, **more) for more in ({}, {"cache_implementation": "static"})]
    assert torch.equal(*ids)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # newer releases rename it
def test_gradients() -> None:
    test_shapes.test_loss_and_gradients(NAME, "image")
    for reentrant in (False, True):
        test_shapes.test_checkpointing_gives_the_same_gradients(NAME, reentrant)


@pytest.mark.parametrize("merged", [False, True])
def test_flops_are_those_that_run(merged: bool) -> None:
    test_report.test_flops_are_those_that_run(NAME, merged)


def test_weights_are_those_of_the_hidden_states() -> None:
    test_provenance.test_weights_are_those_of_the_hidden_states(NAME, "two images", "recycle")


def test_no_trace_is_left() -> None:
    test_no_trace.test_unpatch_leaves_nothing(NAME)
    test_no_trace.test_deepcopy_is_an_independent_patched_model(NAME)


def test_its_family_is_smolvlm() -> None:
    assert smolvlm.FAMILY.limits(tiny_model(NAME)).family == NAME
