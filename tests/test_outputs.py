"""Outputs as other code reads them: by the configuration, compared with each other, with gradients."""

from __future__ import annotations

import pytest
import torch

from decode_helpers import RAGGED, RICHEST, patched, single
from families import family_of
from helpers import RECORDS, feature_outputs
from illava_hooks import merging
from tiny_models import FAMILIES, FIRST_TEXT_ID, inputs_for


@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("caller", ["inside", "around"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tuples_are_returned_where_stock_returns_them(
    family: str, caller: str, configured: bool, asked: bool | None
) -> None:
    model = patched(family)
    inputs = single(model, RICHEST[family])
    called = model.model if caller == "inside" else model
    model.config.return_dict = configured
    options = {} if asked is None else {"return_dict": asked}
    with torch.no_grad():
        found = feature_outputs(called, inputs, **options)
        with merging(model, False):
            expected = feature_outputs(called, inputs, **options)
    assert set(found) == set(family_of(family).modalities)
    for kind, output in found.items():
        if kind == "video" and asked and not configured and family_of(family).videos_follow_the_config:
            assert isinstance(expected[kind], tuple) and RECORDS in output, "merged, it is what was asked for"
            continue
        assert type(output) is type(expected[kind])
        if isinstance(output, tuple):
            assert len(output) == len(expected[kind])
        else:
            assert set(output) == {*expected[kind], RECORDS}


@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_outputs_compare(family: str, track: bool) -> None:
    model = patched(family, track=track)
    inputs = single(model, RICHEST[family])
    with torch.no_grad():
        first, second = (feature_outputs(model, inputs) for _ in range(2))
        other = feature_outputs(model, {**inputs, "pixel_values": -inputs["pixel_values"]})
    for kind in family_of(family).modalities:
        torch.testing.assert_close(dict(first[kind]), dict(second[kind]), atol=0, rtol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(first["image"][RECORDS], other["image"][RECORDS])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_first_hidden_state(family: str) -> None:
    model = patched(family)
    inputs = inputs_for(model, RAGGED)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    output = model(**inputs, output_hidden_states=True)
    first = output.hidden_states[0]
    text = inputs["input_ids"] >= FIRST_TEXT_ID
    torch.testing.assert_close(first[text], embeds[text], atol=0, rtol=0)
    (gradient,) = torch.autograd.grad(output.logits[:, -1].sum(), first)
    assert gradient[text].abs().amax(-1).min() > 0


@pytest.mark.parametrize("caller", ["inside", "around"])
@pytest.mark.parametrize("family", FAMILIES)
def test_visual_outputs_of_a_forward_keep_the_order_of_their_parts(family: str, caller: str) -> None:
    """From 5.24 on a forward returns them; as tuples they are told apart by their order alone."""
    model = patched(family)
    inputs = single(model, RICHEST[family])
    called = model.model if caller == "inside" else model
    with torch.no_grad():
        found = called(**inputs, output_hidden_states=True)
        with merging(model, False):
            expected = called(**inputs, output_hidden_states=True)
    parts = [
        {k: list(v) for k, v in out.items() if k in ("image_outputs", "video_outputs")} for out in (found, expected)
    ]
    assert {k: [name for name in names if name != RECORDS] for k, names in parts[0].items()} == parts[1]
