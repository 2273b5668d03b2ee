"""What only LLaVA-NeXT-Video has: frames that are pooled between the tower and the projector."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from decode_helpers import patched, single
from families.llava import PATCHES
from helpers import assert_says, feature_outputs
from illava_hooks import UnsupportedModelError, merging, patch, session_of
from illava_hooks.engine.records import records_of
from illava_hooks.patchers import llava_next_video as patcher
from reference_checks import check_forward
from tiny_models import Sample, inputs_for, tiny_model

NAME = "llava_next_video"
SETTINGS: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 0.25, "llm_layers": [1, 3], "llm_ratio": 0.6}
VIDEO = Sample(3, videos=(4,))
POOLED = PATCHES // 4


def test_of_a_frame_as_many_tokens_stay_as_the_encoder_keeps() -> None:
    """Rounded up; there is no newline behind a video."""
    model = tiny_model(NAME)
    session = patch(model, **SETTINGS, track=True)
    with torch.no_grad():
        model(**inputs_for(model, [Sample(3, videos=(4, 4))]))
    for video in session.report.videos:
        assert video.vision_tokens[0] == 4 * PATCHES and video.prompt_tokens == 4 * POOLED
        assert video.language_tokens[0] == 4 * math.ceil(POOLED * video.vision_tokens[-1] / video.vision_tokens[0])


@torch.no_grad()
def test_dropped_tokens_show_those_that_stay() -> None:
    model = patched(NAME)
    output = feature_outputs(model, single(model, VIDEO), return_dict=True)["video"]
    (record,) = records_of(output)
    tokens = output.pooler_output[0].flatten(0, -2)
    assert len(tokens) == 4 * POOLED == record.num_tokens and not record.keep.all()
    torch.testing.assert_close(tokens, tokens[record.survivor_of], atol=0, rtol=0)
    assert torch.equal(record.survivor_of[record.keep], record.keep.nonzero().flatten())


@pytest.mark.parametrize("merged", [False, True])
def test_the_projector_works_on_pooled_frames(merged: bool) -> None:
    """It costs the same with and without merging, and the report says so."""
    model = tiny_model(NAME)
    inputs = single(model, VIDEO)
    session = patch(model, **SETTINGS, method="random")
    counter = FlopCounterMode(display=False)
    with torch.no_grad():
        model(**inputs)
        report = session.report
        with merging(model, merged), counter:
            model(**inputs)
    counts = counter.get_flop_counts()
    ran = sum(next(n for name, n in counts.items() if name.endswith("multi_modal_projector")).values())
    assert report.projector_flops == (ran, ran)
    assert report.encoder_flops[0] < report.encoder_flops[1]


@pytest.mark.parametrize("mode", ["max", "conv"])
def test_other_poolings_are_refused(mode: str) -> None:
    model = tiny_model(NAME, spatial_pool_mode=mode)
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, **SETTINGS)
    assert_says(caught.value, f"^spatial_pool_mode is '{mode}'", "takes averages", r"vit_layers=\[\]$")
    assert session_of(model) is None
    session = patch(model, [], 0, [1], 0.5, track=True)
    with torch.no_grad():
        model(**single(model, VIDEO))
    assert session.report.kept_fraction == 0.5


def test_frames_that_are_not_expanded_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Survivors that are pooled as they follow each other lie beside strangers."""

    def first_ones(self: Any, module: Any, args: Any, kwargs: Any, *output: Any) -> Any:
        run = patcher.current_run()
        if run is None:
            return None
        rows = torch.arange(PATCHES).clamp_max(args[0].shape[1] - 1)
        return (args[0][:, rows],), kwargs

    monkeypatch.setattr(patcher.ExpandFrames, "__call__", first_ones)
    with pytest.raises(AssertionError):
        check_forward(NAME, [VIDEO], "nearest", SETTINGS)
