"""What a decode step behind a merge costs the host: calls of ours for each layer, counted and not timed."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import illava_hooks
from decode_helpers import IMAGE, next_positions, single
from families import FAMILIES
from helpers import MERGING
from illava_hooks import patch
from illava_hooks.engine.compat import CACHE
from tiny_models import tiny_model

OURS = str(Path(illava_hooks.__file__).parent)
LAYERS = (4, 12)


def calls_of_a_step(family: str, num_layers: int) -> Counter[str]:
    """Python functions of this library that one step calls, once its masks are known."""
    model = tiny_model(family, text={"num_hidden_layers": num_layers})
    patch(model, **MERGING)
    inputs = single(model, IMAGE)
    seen: Counter[str] = Counter()

    def count(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            seen[f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname}"] += 1

    with torch.no_grad():
        cache = model(**inputs)[CACHE]
        length = inputs["input_ids"].shape[1]
        at = next_positions(model, inputs, 1) or {"position_ids": torch.tensor([[length]])}
        step = {"input_ids": torch.tensor([[30]]), **at, CACHE: cache}
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            model(**step)
        finally:
            sys.setprofile(before)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_costs_one_call(family: str) -> None:
    """The hook that has nothing to do: a cache, a mask or a tap of ours that asks each layer would be seen."""
    shallow, deep = (calls_of_a_step(family, n) for n in LAYERS)
    assert deep - shallow == {"decoder_hooks.DecoderLayerHook.__call__": LAYERS[1] - LAYERS[0]}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_counter_counts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from illava_hooks.engine import decoder_masks

    monkeypatch.setattr(decoder_masks, "_grows_plainly", lambda layer: False)
    shallow, deep = (calls_of_a_step(family, n) for n in LAYERS)
    assert sum((deep - shallow).values()) > 2 * (LAYERS[1] - LAYERS[0])
