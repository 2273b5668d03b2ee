"""The launch budget at the depths and sizes of published models."""

from __future__ import annotations

from typing import Any

import pytest

from families import family_of
from helpers import MERGING
from illava_hooks import patch
from test_launches import METHODS, ONE, added, as_on_a_device, assert_budget, counted
from tiny_models import Sample, inputs_for, tiny_model

__all__ = ["as_on_a_device"]


#: By family: prompts, and how many segments their encoder sees.
SIZES = {
    "llava_onevision": {"10 tiles": (Sample(1, images=ONE * 10), 10), "37 frames": (Sample(1, videos=(37,)), 37)},
    "qwen2_vl": {"one": (Sample(1, videos=(2,)), 1), "32 slices": (Sample(1, videos=(64,)), 32)},
}


@pytest.mark.parametrize(("family", "size"), [(family, size) for family, sizes in SIZES.items() for size in sizes])
def test_tiles_frames_and_slices(family: str, size: str) -> None:
    model = tiny_model(family)
    patch(model, **MERGING, method="diverse")
    sample, segments = SIZES[family][size]
    assert sum(map(len, family_of(model).segments(model, [sample]))) == segments
    assert_budget(added(*counted(model, inputs_for(model, [sample]))))


@pytest.mark.slow
@pytest.mark.parametrize("method", [pytest.param("illava", marks=pytest.mark.nightly), "diverse"])
def test_from_256_to_16384_patches(method: str) -> None:
    model = tiny_model("qwen2_vl")
    patch(model, **MERGING, method=method)
    found = []
    for side in (64, 512):
        samples = [Sample(1, images=((side, side),))]
        assert family_of(model).segments(model, samples) == [[side * side // 16]]
        found.append(added(*counted(model, inputs_for(model, samples))))
    assert found[0] == found[1]


DEEP: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"vision": {"depth": 32}, "text": {"num_hidden_layers": 28}},
    "llava_onevision": {"vision": {"num_hidden_layers": 26}, "text": {"num_hidden_layers": 28}},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", DEEP)
def test_a_whole_prefill_has_a_budget(family: str, method: str) -> None:
    """The depth of the published models, with their presets."""
    model = tiny_model(family, **DEEP[family])
    fraction: dict[str, Any] = {"vit_r": 2} if family == "llava_onevision" else {}
    patch(model, method=method, **fraction)
    totals = []
    for images in (ONE, ((128, 128),)):
        ours, stock = counted(model, inputs_for(model, [Sample(1, images=images)]))
        assert sum(ours.launches[f"illava::{name}"] for name in ("column_means", "match_behind")) > 0
        assert ours.total <= 1.15 * stock.total + 200, (ours.total, stock.total)
        totals.append(ours.total - stock.total)
    # One more for sizes whose number is no multiple of what kernels of attention want.
    assert family == "llava_onevision" or max(totals) - min(totals) <= 1, totals
