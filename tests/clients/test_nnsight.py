"""nnsight puts a `forward` of its own on every module: reading and changing what runs in a merging model.

Either it works, or one line names a layer; after `unpatch` the model is stock again in any case.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from client_helpers import CLOSE, client
from decode_helpers import IMAGES, RICHEST, SETTINGS, patched, single
from helpers import assert_differ, assert_says, logits
from illava_hooks import IllavaHooksError, merging, patch, session_of, unpatch
from tiny_models import FAMILIES, Inputs, tiny_model

nnsight = client("nnsight")
LAYER = r"(layer |layers\.|blocks\.)\d"


def traced(wrapped: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What enters the last decoder layer's MLP, and the logits."""
    with torch.no_grad(), wrapped.trace(**inputs):
        inside = wrapped.model.language_model.layers[3].mlp.input.save()
        found = wrapped.lm_head.output.save()
    return inside, found


def by_hooks(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The same without nnsight."""
    seen: list[Tensor] = []
    handle = model.model.language_model.layers[3].mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    found = logits(model, inputs)
    handle.remove()
    return seen[0], found


@pytest.mark.parametrize("order", ["patch first", "wrap first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tracing(family: str, order: str) -> None:
    model, plain = tiny_model(family), patched(family)
    if order == "patch first":
        patch(model, **SETTINGS[family])
    wrapped = nnsight.NNsight(model)
    all_inputs = [single(model, sample) for sample in (IMAGES, RICHEST[family])]
    try:
        if order == "wrap first":
            patch(model, **SETTINGS[family])
        for inputs in all_inputs:
            for found, expected in zip(traced(wrapped, inputs), by_hooks(plain, inputs), strict=True):
                torch.testing.assert_close(found, expected, **CLOSE)
            assert session_of(model).report.kept_fraction < 0.5
            torch.testing.assert_close(logits(model, inputs), logits(plain, inputs), **CLOSE)
            with merging(model, False):
                torch.testing.assert_close(logits(model, inputs), logits(tiny_model(family), inputs), atol=0, rtol=0)
    except IllavaHooksError as error:
        assert_says(error, LAYER)
    unpatch(model)
    for inputs in all_inputs:
        stock = logits(tiny_model(family), inputs)
        torch.testing.assert_close(logits(model, inputs), stock, atol=0, rtol=0)
        torch.testing.assert_close(traced(wrapped, inputs)[1], stock, atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_intervention(family: str) -> None:
    """An MLP that is switched off in a trace is switched off."""
    model, plain = patched(family), patched(family)
    inputs = single(model, IMAGES)
    untouched = logits(plain, inputs)
    wrapped = nnsight.NNsight(model)
    with torch.no_grad(), wrapped.trace(**inputs):
        wrapped.model.language_model.layers[2].mlp.output[:] = 0
        found = wrapped.lm_head.output.save()
    plain.model.language_model.layers[2].mlp.register_forward_hook(lambda module, args, output: output * 0)
    expected = logits(plain, inputs)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert_differ(found, untouched)
