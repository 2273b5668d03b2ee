"""What only LLaVA-OneVision has: packed tiles, borders that are cropped away, big images that are shrunk, SigLIP."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
)

import reference as ref
from decode_helpers import IMAGE, patched, single
from helpers import assert_says
from illava_hooks import MergeConfigError, UnsupportedModelError, patch, session_of
from reference_checks import RULES, SAMPLES, SETTINGS, TOLERANCE, assert_close, check_forward
from test_report import RAGGED, run
from tiny_models import Sample, inputs_for, tiny_model

NAME = "llava_onevision"
GOOD: dict[str, Any] = {"vit_layers": [1], "vit_r": 4, "llm_layers": [1], "llm_ratio": 0.5}


def test_unmerged_reference_shrinks_big_images_like_the_stock_model() -> None:
    model = tiny_model(NAME, dtype=torch.float64, vision_aspect_ratio="anyres_max_2")
    inputs = inputs_for(model, [Sample(7, images=((60, 64),))])
    with torch.no_grad():
        stock = model(**inputs).logits[0]
    assert len(stock) < 64 * 5, "nothing was shrunk"
    assert_close(ref.reference_forward(model, inputs).logits, stock, TOLERANCE)


def test_cropped_seats_occur_in_the_test_image() -> None:
    model = tiny_model(NAME)
    inputs = inputs_for(model, [SAMPLES["image"]])
    visual = ref.vision_stage(model, inputs, ref.ReferenceSettings(vit_layers=[1, 2], vit_r=0.25))[0]
    assert any(not segment.visible[seat] for segment in visual.segments for seat in segment.seats)
    assert all(holder is not None for holder in visual.holder)


@pytest.mark.parametrize("rule", RULES)
def test_library_shrinks_big_images(rule: str) -> None:
    sample = Sample(7, images=((60, 64),))
    check_forward(NAME, [sample], rule, SETTINGS, vision_aspect_ratio="anyres_max_2")


def test_library_shrinks_by_whole_numbers() -> None:
    """Every third token is read: what the interpolation shows are tokens as they are, yet it is one."""
    sample = Sample(7, images=((96, 96),))
    check_forward(NAME, [sample], "nearest", SETTINGS, vision_aspect_ratio="anyres_max_1")


@pytest.mark.parametrize("vit_r", [0.6, 31])
def test_library_halves_at_most_by_matching(vit_r: float) -> None:
    settings = {**SETTINGS, "vit_layers": [0, 1], "vit_r": vit_r}
    check_forward(NAME, [SAMPLES["image"]], "bipartite", settings)


def test_vision_tokens_come_in_tiles() -> None:
    *_, report = run(NAME, RAGGED, vit_r=7)
    single_tile = (64, 64, 57, 50, 50)
    assert report.visuals[0].vision_tokens == single_tile  # two images in one sample: a base tile each
    tiles = report.visuals[2].vision_tokens[0] // 64
    assert report.visuals[2].vision_tokens == tuple(tiles * n for n in single_tile)
    assert report.visuals[3].vision_tokens == tuple(4 * n for n in single_tile)
    pooled = 16  # 8 x 8 tokens of a frame become 4 x 4
    assert report.visuals[3].language_tokens[0] == 4 * math.ceil(pooled * 50 / 64) + 1


def test_every_visual_keeps_its_place_where_only_some_merge() -> None:
    model = tiny_model(NAME, vision={"num_hidden_layers": 8}, text={"num_hidden_layers": 6})
    inputs = inputs_for(model, [Sample(text_seed=6, images=((48, 30),), videos=(4,))])
    model.config.illava_presets = {  # a preset of the model's own: only so can images and videos differ
        "image": {"vit_layers": [3, 4], "vit_r": 16, "llm_layers": [2], "llm_ratio": 0.7},
        "video": {"vit_layers": [2, 3], "vit_r": 16, "llm_layers": [1], "llm_ratio": 0.7},
    }
    session = patch(model, track=True)
    with torch.no_grad():
        model(**inputs)
    seats = {layer: [len(v.seats) for v in session.provenance.at("vision", layer).images] for layer in (2, 3, 4)}
    tiles, frames = int(seats[2][0] / 64), 4
    assert seats == {2: [64 * tiles, 48 * frames], 3: [48 * tiles, 32 * frames], 4: [32 * tiles, 32 * frames]}
    untouched = session.provenance.at("vision", 2).images[0]
    torch.testing.assert_close(untouched.weights.to_dense(), torch.eye(64 * tiles))


def test_another_vision_tower() -> None:
    text = tiny_model(NAME).config.text_config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=4),
            text_config=Qwen2Config(**{name: getattr(text, name) for name in names}, num_key_value_heads=2),
            image_token_index=5,
            video_token_index=6,
        )
    )
    before = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, [1], 4, [1], 0.5)
    assert_says(caught.value, "^vision_tower has CLIPEncoderLayer layers", "only SigLIP towers", "use one")
    assert session_of(model) is None and [type(module) for module in model.modules()] == before


def test_feature_layers_on_both_sides_of_a_merge() -> None:
    model = tiny_model(NAME, vision_feature_layer=[-1, -3])
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, [1, 2], 4, [1], 0.5)
    assert_says(caught.value, r"^vision_feature_layer is \[-1, -3\]", r"\[1, 2\]", "vit_layers below 2")
    patch(model, [1], 4, [1], 0.5)


def test_feature_layer_given_to_a_call() -> None:
    model = patched(NAME)
    with pytest.raises(UnsupportedModelError, match="spans the merging layers"):
        model(**single(model, IMAGE), vision_feature_layer=[-1, 1])
    with pytest.raises(UnsupportedModelError, match=r"layer is 1, in front of merging layers among \[1, 2\]"):
        model(**single(model, IMAGE), vision_feature_layer=1)
    with pytest.raises(UnsupportedModelError, match="strategy is 'default'.*use 'full'"):
        model(**single(model, IMAGE), vision_feature_select_strategy="default")


def test_strategy_that_drops_a_token() -> None:
    model = tiny_model(NAME, vision_feature_select_strategy="default")
    with pytest.raises(UnsupportedModelError, match="strategy is 'default'.*use 'full' or vit_layers"):
        patch(model, **GOOD)


def test_compact_layout_needs_a_square() -> None:
    with pytest.raises(MergeConfigError) as caught:
        patch(tiny_model(NAME), [1], 4, [1], 0.5, method="illava-reference")
    assert_says(caught.value, "layout 'compact'", "leaves 60", "'aligned'", "49")
    with pytest.raises(MergeConfigError) as caught:
        patch(tiny_model(NAME), [1], llm_layers=[1], keep=0.5, method="illava-reference")
    assert_says(caught.value, "layout 'compact'", "keep leaves 45", "'aligned'", "36")


def test_tiles_are_clamped_where_a_method_can_give_only_half(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(NAME)
    session = patch(model, [1, 2], 30, [1], 0.5, method="tome")
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="illava_hooks"):
        for _ in range(2):
            model(**single(model, IMAGE))
    tiles = session.report.images[0].vision_tokens[0] // 64
    assert session.report.images[0].vision_tokens == tuple(tiles * n for n in (64, 64, 34, 17, 17))
    (said,) = (record.getMessage() for record in caplog.records if record.name == "illava_hooks")
    assert said.startswith("vit_r is 30, more than some images") and "use a smaller vit_r" in said and "\n" not in said


def test_more_images_counted_than_there_are() -> None:
    """Stock reads on; the image stands as one of two, which has a base tile alone."""
    model = tiny_model(NAME)
    inputs = {**inputs_for(model, [Sample(7, images=((30, 30), (30, 30)))])}
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum()) // 2
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    kept = torch.ones_like(inputs["input_ids"][0], dtype=torch.bool)
    kept[places[tokens:]] = False
    one: dict[str, Any] = {name: inputs[name][:, kept] for name in ("input_ids", "attention_mask")}
    one |= {name: inputs[name][:1] for name in ("pixel_values", "image_sizes")}
    one["batch_num_images"] = torch.tensor([2])
    with torch.no_grad():
        stock = model(**one).logits
        patch(model, vit_layers=[1], vit_r=1e-4, llm_layers=[1], llm_ratio=0.9999)
        assert_close(model(**one).logits, stock, TOLERANCE)
        session = patch(model, vit_layers=[1], vit_r=4, llm_layers=[], llm_ratio=1.0)
        model(**one)
    assert session.report.visuals[0].vision_tokens[-1] < session.report.visuals[0].vision_tokens[0]
