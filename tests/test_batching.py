"""A batch answers as its samples alone, however it is padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.specifiers import SpecifierSet

from decode_helpers import (
    BOTH,
    IMAGE,
    IMAGES,
    RAGGED,
    TEXT,
    VIDEO,
    patched,
    single,
    skip_where_stock_mixes_images,
    steps,
    stock_keeps_images_apart,
)
from families import families_and, families_and_methods, family_of
from illava_hooks import METHODS, patch
from tiny_models import FAMILIES, Sample, inputs_for, tiny_model

BATCHES = {"ragged": RAGGED, "with video": [VIDEO, TEXT, BOTH], "text first": [TEXT, IMAGE, IMAGES]}
TOLERANCE: dict[str, Any] = {"atol": 2e-4, "rtol": 0.0}


def check_forward(model: Any, batch: list[Sample], side: Any, uncounted: bool = False) -> None:
    inputs = inputs_for(model, batch, side=side)
    if uncounted:
        inputs["position_ids"] = family_of(model).positions(model, inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
        for row, sample in enumerate(batch):
            alone = model(**single(model, sample)).logits[0]
            real = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(logits[row][real], alone, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "batch"), families_and(BATCHES))
def test_forward(family: str, batch: str, back_end: str, side: str) -> None:
    check_forward(patched(family, attn_implementation=back_end), BATCHES[batch], side)


@pytest.mark.parametrize(("family", "method"), families_and_methods(METHODS))
def test_forward_of_every_method(family: str, method: str) -> None:
    """Where stock counts positions over padding, angles round differently, and near ties between tokens break so."""
    counts = family_of(family).forward_counts_padding
    check_forward(patched(family, method=method), RAGGED, "left", uncounted=counts)


@pytest.mark.parametrize(("family", "batch"), families_and(BATCHES))
def test_greedy(family: str, batch: str) -> None:
    model = patched(family)
    ids, logits = steps(model, inputs_for(model, BATCHES[batch]))
    for row, sample in enumerate(BATCHES[batch]):
        alone_ids, alone = steps(model, single(model, sample))
        assert torch.equal(ids[row], alone_ids[0])
        for ours, expected in zip(logits, alone, strict=True):
            torch.testing.assert_close(ours[row], expected[0], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_stock_mixes_images(family: str) -> None:
    """What the skip below measures is what is known of releases."""
    mixed = SpecifierSet(family_of(family).beams_mix_images).contains(transformers.__version__)
    assert stock_keeps_images_apart(family) == (not mixed)


@pytest.mark.parametrize(("family", "batch"), families_and(BATCHES))
def test_beam_search(family: str, batch: str) -> None:
    skip_where_stock_mixes_images(family, BATCHES[batch])
    model = patched(family)
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 5}
    wanted = {"return_dict_in_generate": True, "output_scores": True}
    whole = model.generate(**inputs_for(model, BATCHES[batch]), **settings, **wanted)
    for row, sample in enumerate(BATCHES[batch]):
        alone = model.generate(**single(model, sample), **settings, **wanted)
        assert torch.equal(whole.sequences[row, -5:], alone.sequences[0, -5:])
        torch.testing.assert_close(whole.sequences_scores[row], alone.sequences_scores[0], **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [1, 3, 20])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_never_changes_an_answer(family: str, padding: int, side: str) -> None:
    model = patched(family)
    inputs = single(model, IMAGES)
    with torch.no_grad():
        expected = model(**inputs).logits
        padded = dict(inputs)
        for name in family_of(family).token_inputs:
            amount = (padding, 0) if side == "left" else (0, padding)
            padded[name] = torch.nn.functional.pad(padded[name], amount)
        logits = model(**padded).logits
    real = slice(padding, None) if side == "left" else slice(None, -padding)
    torch.testing.assert_close(logits[:, real], expected, **TOLERANCE)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("method", ["illava", "diverse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_longest_row_that_loses_nothing(family: str, method: str, cache: str | None) -> None:
    """It says how many columns there are behind a merge, too; what then fills up the others is seen by no step."""
    model, batch = tiny_model(family), [Sample(9, text=(300, 40)), IMAGE]
    patch(model, vit_layers=[], llm_layers=[1, 2], llm_ratio=0.5, method=method)
    ids, logits = steps(model, inputs_for(model, batch), cache_implementation=cache)
    for row, sample in enumerate(batch):
        alone_ids, alone = steps(model, single(model, sample), cache_implementation=cache)
        assert torch.equal(ids[row], alone_ids[0])
        for ours, expected in zip(logits, alone, strict=True):
            torch.testing.assert_close(ours[row], expected[0], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_changes_something(family: str) -> None:
    """The tests above compare merged with merged; a model that forgot to merge would pass them."""
    model = patched(family)
    with torch.no_grad():
        merged = model(**inputs_for(model, RAGGED)).logits
        model._illava_session.enabled = False
        stock = model(**inputs_for(model, RAGGED)).logits
    assert (merged - stock).abs().max() > 0.01
