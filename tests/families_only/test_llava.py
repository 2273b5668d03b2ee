"""What only LLaVA-1.5 and its kin have: a class token, feature layers, other towers, decoders that slide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    SiglipVisionConfig,
)

from decode_helpers import IMAGE, IMAGES, patched, single
from families.llava import LLAMA
from helpers import assert_differ, assert_says, feature_outputs
from illava_hooks import UnsupportedModelError, merging, patch, session_of
from illava_hooks.engine import encoder
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.encoder_scores import ScoredLayer
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.patchers._towers import TowerFeatures
from reference_checks import check_forward
from tiny_models import IMAGE_ID, build, inputs_for, tiny_model

NAMES = ("llava", "llava_next")
SETTINGS: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 0.25, "llm_layers": [1, 3], "llm_ratio": 0.6}
GOOD: dict[str, Any] = {"vit_layers": [1], "vit_r": 4, "llm_layers": [1], "llm_ratio": 0.5}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def hosted(vision: Any, text: Any = None, **settings: Any) -> Any:
    """A model of type `llava` around another tower or decoder."""
    given = {"image_token_index": IMAGE_ID, "image_seq_length": 64, "tie_word_embeddings": False} | settings
    config = LlavaConfig(vision_config=vision, text_config=text or LlamaConfig(**LLAMA), **given)
    return build(LlavaForConditionalGeneration, config, "sdpa", 0, torch.float64)


def interleaved() -> Any:
    """SigLIP, as LLaVA-Interleave has it."""
    vision = SiglipVisionConfig(**SIZES, image_size=32, patch_size=4, vision_use_head=False)
    return hosted(vision, vision_feature_layer=-1, vision_feature_select_strategy="full")


# ----------------------------------------------------------------------------------- the class token


class Rows:
    """Notes the hidden states that enter the layers of the tower."""

    def __init__(self, model: Any) -> None:
        self.seen: dict[int, Tensor] = {}
        for index, layer in enumerate(model.model.vision_tower.encoder.layers):
            layer.register_forward_pre_hook(lambda _, args, i=index: self.seen.__setitem__(i, args[0]))


def class_alone(model: Any, hidden: Tensor, index: int) -> Tensor:
    """The class token behind a layer, ``(T, C)``, where all the patches in front of it are given."""
    layer = model.model.vision_tower.encoder.layers[index]
    with torch.no_grad():
        mixed, _ = layer.self_attn(layer.layer_norm1(hidden), attention_mask=None)
        front = (hidden + mixed)[:, :1]
        return (front + layer.mlp(layer.layer_norm2(front)))[:, 0]


@pytest.mark.parametrize("method", ["illava", "diverse", "nearest", "fastv"])
@pytest.mark.parametrize("name", NAMES)
def test_the_class_token_attends_and_stays_as_it_is(name: str, method: str) -> None:
    """It is first in every row, and behind each layer what its own attention makes of it: nothing is mixed in."""
    model, stock = patched(name, method=method, dtype=torch.float64), tiny_model(name, dtype=torch.float64)
    rows = Rows(model)
    with torch.no_grad():
        model(**double(inputs_for(model, [IMAGES])))
    lengths = [rows.seen[index].shape[1] for index in range(5)]
    assert lengths[0] == lengths[1] == 65 > lengths[2] > lengths[3] == lengths[4]
    for index in (0, 1, 2) if method != "diverse" else (0, 1):  # behind its first merge it weighs by size
        expected = class_alone(stock, rows.seen[index], index)
        torch.testing.assert_close(rows.seen[index + 1][:, 0], expected, atol=1e-6, rtol=0)


def double(inputs: Any) -> Any:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_class_token_that_merges_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference and the row above fail where the tower's first token counts as a patch."""
    monkeypatch.setattr(EncoderRun, "_split", _split_off_the_last)
    with pytest.raises(AssertionError):
        check_forward(name, [IMAGE], "nearest", SETTINGS)
    with pytest.raises(AssertionError):
        test_the_class_token_attends_and_stays_as_it_is(name, "nearest")


def _split_off_the_last(self: EncoderRun, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """As many tokens, but the class token is among those that merge."""
    rows = hidden.reshape(self.num_rows, -1, hidden.shape[-1])
    return rows[:, -1:], rows[:, :-1]


@pytest.mark.parametrize("name", NAMES)
def test_scores_that_leave_the_class_token_out_are_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a query like all others: whom it looks at counts."""
    plain = encoder.unit_scores

    def without(layer: ScoredLayer, tap: Any) -> Tensor:
        """The mean over the queries of patches alone."""
        query, key = (part.view(layer.num_rows, -1, *part.shape[1:]).transpose(1, 2) for part in tap.heads())
        maps = (query @ key.transpose(-1, -2) * tap.scale).softmax(-1)
        assert plain(layer, tap).numel() == maps[:, 0, 1:, 1:].sum(1).numel()
        return maps[:, :, 1:, 1:].mean((1, 2)).flatten().float()

    monkeypatch.setattr(encoder, "unit_scores", without)
    with pytest.raises(AssertionError):
        check_forward(name, [IMAGE], "recycle", SETTINGS)


@pytest.mark.parametrize("name", NAMES)
def test_features_with_the_class_token_are_refused(name: str) -> None:
    model = tiny_model(name, vision_feature_select_strategy="full")
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, **GOOD)
    assert_says(caught.value, "strategy is 'full', which keeps the class token", "use 'default' or vit_layers=\\[\\]$")
    assert session_of(model) is None
    model = patched(name)
    inputs = single(model, IMAGE)
    with pytest.raises(UnsupportedModelError, match="strategy is 'full'"):
        feature_outputs(model, inputs, vision_feature_select_strategy="full")
    with merging(model, False):
        found = model.model.vision_tower(inputs["pixel_values"].flatten(0, -4)).last_hidden_state
    assert found.shape[1] == 65


# ------------------------------------------------------------------------------------ feature layers


@pytest.mark.parametrize("layer", [-1, -2, -3, 3, 4])
def test_any_one_feature_layer(layer: int) -> None:
    """Counted from either end."""
    settings = {**SETTINGS, "vit_layers": [0, 1]}
    check_forward("llava", [IMAGES], "nearest", settings, vision_feature_layer=layer)


@pytest.mark.parametrize("name", NAMES)
def test_layers_behind_the_features_are_refused(name: str) -> None:
    model = tiny_model(name, vision_feature_layer=-3)
    for layer in (3, 4):
        with pytest.raises(Exception, match=rf"vit_layers contains {layer}; this model allows 0\.\.2; choose other"):
            patch(model, [layer], 4, [1], 0.5)
    patch(model, [2], 4, [1], 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_several_feature_layers(name: str) -> None:
    """Behind all merges they lie side by side as in stock; merges between them are refused."""
    model, stock = (tiny_model(name, dtype=torch.float64, vision_feature_layer=[-2, -1]) for _ in range(2))
    inputs = double(single(model, IMAGE))
    session = patch(model, [1, 2], 8, [1], 0.5)
    with torch.no_grad():
        logits, expected = model(**inputs).logits, stock(**inputs).logits
    assert logits.shape == expected.shape and session.report.kept_fraction < 0.5
    assert_differ(logits, expected)
    rows = Rows(model)
    with torch.no_grad():
        features = feature_outputs(model, inputs, return_dict=True)["image"]
    (record,) = features.illava_records
    hidden = torch.cat([rows.seen[4], model.model.vision_tower.encoder.layers[4](rows.seen[4], None)], -1)[:, 1:]
    mine = model.model.multi_modal_projector(hidden).flatten(0, 1)
    shown = features.pooler_output[0][record.keep]
    assert torch.cdist(shown, torch.cat([mine, *extra_tokens(model)])).min(1).values.max() < 1e-5
    model = tiny_model(name, vision_feature_layer=[-2, 2])
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, [1, 2], 4, [1], 0.5)
    assert_says(caught.value, r"^vision_feature_layer is \[-2, 2\]", r"\[1, 2\]", "vit_layers below 2")


def extra_tokens(model: Any) -> list[Tensor]:
    """Newlines, where there are some."""
    newline = getattr(model.model, "image_newline", None)
    return [] if newline is None else [newline[None]]


@pytest.mark.parametrize("name", NAMES)
def test_feature_layers_given_to_a_call(name: str) -> None:
    model = patched(name)
    inputs = single(model, IMAGE)
    with pytest.raises(UnsupportedModelError, match=r"layer is 1, in front of merging layers among \[1, 2\]"):
        model(**inputs, vision_feature_layer=1)
    with pytest.raises(UnsupportedModelError, match="spans the merging layers"):
        model(**inputs, vision_feature_layer=[-2, 1])
    with torch.no_grad():
        logits = model(**inputs, vision_feature_layer=-1).logits
        assert_differ(logits, model(**inputs).logits)


# ------------------------------------------------------------------------------ towers and decoders


def test_a_siglip_tower_merges_without_a_class_token() -> None:
    """As a loop over its layers says: features of survivors, each at its place."""
    model = interleaved()
    inputs = double(inputs_for(model, [IMAGES]))
    session = patch(model, [1, 2], 0.25, [1], 0.5, method="nearest", track=True)
    with torch.no_grad():
        features = feature_outputs(model, inputs, return_dict=True)["image"]
        model(**inputs)
    assert session.report.images[0].vision_tokens == (64, 64, 48, 36, 36)
    for found, record in zip(features.pooler_output, features.illava_records, strict=True):
        assert len(found) == 64 and int(record.keep.sum()) == 36
        torch.testing.assert_close(found, found[record.survivor_of], atol=0, rtol=0)


def test_a_siglip_tower_has_no_token_to_drop() -> None:
    model = interleaved()
    model.config.vision_feature_select_strategy = "default"
    with pytest.raises(UnsupportedModelError, match="'default', which drops the first patch; use 'full'"):
        patch(model, **GOOD)


def test_pixtral_is_refused() -> None:
    vision = PixtralVisionConfig(**SIZES, image_size=32, patch_size=4, head_dim=8)
    model = hosted(vision, vision_feature_layer=-1, vision_feature_select_strategy="full")
    before = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, **GOOD)
    assert_says(caught.value, "^vision_tower is a PixtralVisionModel", "CLIP and SigLIP", "use a model with one$")
    assert session_of(model) is None and [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("window", [None, 8])
def test_a_mistral_that_slides_is_refused(window: int | None) -> None:
    """By `patch`, and not in the first forward; without a window it merges."""
    clip = tiny_model("llava").config.vision_config
    text = MistralConfig(**{**LLAMA, "rope_parameters": dict(LLAMA["rope_parameters"])}, sliding_window=window)
    model = hosted(clip, text)
    if window is not None:
        with pytest.raises(UnsupportedModelError, match="sliding-window layers.*sliding_window=None"):
            patch(model, **GOOD)
        assert session_of(model) is None
        return
    session = patch(model, **GOOD)
    with torch.no_grad():
        model(**double(inputs_for(model, [IMAGES])))
    assert session.report.kept_fraction < 0.6


def test_the_tower_is_told_by_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CLIP that is taken for a SigLIP fails at once."""
    monkeypatch.setattr(TowerFeatures, "traits", lambda self: EncoderTraits())
    with pytest.raises(Exception, match=r"."):
        check_forward("llava", [IMAGE], "nearest", SETTINGS)
