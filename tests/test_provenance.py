"""Provenance against models in which nothing but merging changes a token.

With attention and MLP outputs zeroed, and a linear projector, every surviving hidden state is a weighted sum of
source patches: its weights must be what provenance says.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import needs_ready_features
from illava_hooks import PatchStateError, patch
from illava_hooks.methods import Method
from tiny_models import Inputs, Sample, inputs_for, tiny_model

SETTINGS: dict[str, dict[str, Any]] = {
    "llava_onevision": {"vit_layers": [1, 2], "vit_r": 14, "llm_layers": [1, 3], "llm_ratio": 0.6},
    "qwen2_vl": {"vit_layers": [1, 2], "vit_r": 0.25, "llm_layers": [1, 3], "llm_ratio": 0.6},
}
MERGING = ("recycle", "nearest", "diverse", "bipartite", "cluster")
CASES = {
    "tiles": Sample(text_seed=1, images=((48, 30),)),
    "more tiles than the limit": Sample(text_seed=2, images=((100, 120),)),
    "two images": Sample(text_seed=3, images=((48, 30), (64, 64))),
    "video": Sample(text_seed=4, videos=(6,)),
    "image and video": Sample(text_seed=5, images=((48, 30),), videos=(4,)),
}


class Identity(nn.Module):
    """Stands in for a projector."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def still_model(family: str) -> Any:
    """A model whose layers pass hidden states on unchanged."""
    model = tiny_model(family, dtype=torch.float64)
    silent = ("out_proj", "fc2", "o_proj", "down_proj", "attn.proj")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(silent):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if family == "llava_onevision":
        model.model.multi_modal_projector.act = Identity()
        for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
    return model


class InputsOf:
    """Collects the first positional or named input of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.seen: list[Tensor] = []
        module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen.append((args[0] if args else next(iter(kwargs.values()))).detach())


def patches_by_image(model: Any, family: str, inputs: Inputs) -> list[Tensor]:
    """Patch embeddings of each image and video, in the unpatched model: (P, C)."""
    layer = model.model.vision_tower.encoder.layers[0] if family == "llava_onevision" else model.model.visual.blocks[0]
    seen = InputsOf(layer).seen
    with torch.no_grad():
        model(**inputs)
    if family == "llava_onevision":
        counts = [len(inputs[k]) for k in ("image_sizes", "pixel_values_videos") if k in inputs]
        parts = [part for hidden, count in zip(seen, counts, strict=True) for part in hidden.chunk(count)]
        return [part.flatten(0, 1) for part in parts]
    grids = [inputs[k].prod(-1).tolist() for k in ("image_grid_thw", "video_grid_thw") if k in inputs]
    return [part for hidden, sizes in zip(seen, grids, strict=True) for part in hidden.split(sizes)]


@pytest.mark.parametrize("rule", MERGING)
@pytest.mark.parametrize(("family", "case"), families_and(CASES))
def test_weights_are_those_of_the_hidden_states(family: str, case: str, rule: str) -> None:
    model = still_model(family)
    inputs = inputs_for(model, [CASES[case]])
    sources = patches_by_image(model, family, inputs)
    method = Method(rule, merge=rule)
    session = patch(model, **SETTINGS[family], method=method, track=True)
    last_layer = (
        model.model.vision_tower.encoder.layers[3] if family == "llava_onevision" else model.model.visual.blocks[3]
    )
    seen = InputsOf(last_layer).seen
    final = InputsOf(model.model.language_model.norm).seen
    with torch.no_grad():
        model(**inputs)
    tracked = session.provenance.at("vision", 2).images
    survivors = torch.cat([hidden.reshape(-1, hidden.shape[-1]) for hidden in seen])
    rebuilt = torch.cat([image.weights.double() @ patches for image, patches in zip(tracked, sources, strict=True)])
    torch.testing.assert_close(rebuilt, survivors, atol=1e-6, rtol=1e-6)
    if family == "qwen2_vl":
        return  # its patch merger is not linear: the language stage has the next test
    projector = model.model.multi_modal_projector
    language = session.provenance.at("language", 3).images
    visual = []
    for image, patches in zip(language, sources, strict=True):
        mixed = projector(image.weights.double() @ patches)
        text = image.weights.to_dense().sum(1) < 0.5
        visual.append(torch.where(text[:, None], model.model.image_newline, mixed))
    expected = torch.cat(visual)
    hidden = final[-1][0]
    distance = torch.cdist(expected, hidden).min(1).values
    # A newline may itself have been merged: its row then holds part of a newline.
    pure = torch.cat([(image.weights.to_dense().sum(1) - 1).abs() < 1e-6 for image in language])
    assert pure.float().mean() > 0.5
    torch.testing.assert_close(distance[pure], torch.zeros_like(distance[pure]), atol=1e-5, rtol=0)


@needs_ready_features
@pytest.mark.parametrize("rule", MERGING)
def test_language_weights_of_qwen2_vl(rule: str) -> None:
    """With ready-made features the source of a visual token is itself."""
    model = still_model("qwen2_vl")
    inputs = inputs_for(model, [CASES["two images"]])
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    session = patch(model, **SETTINGS["qwen2_vl"], method=Method(rule, merge=rule), track=True)
    final = InputsOf(model.model.language_model.norm).seen
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with torch.no_grad():
        model(**rest, mm_encoder_outputs={"image": features})
    images = session.provenance.at("language", 3).images
    visual = torch.cat([image.weights.double() @ f for image, f in zip(images, features.pooler_output, strict=True)])
    assert torch.cdist(visual, final[-1][0]).min(1).values.max() < 1e-6
    assert sum(len(image.seats) for image in images) == sum(v.language_tokens[-1] for v in session.report.visuals)


@pytest.mark.parametrize("rule", ["recycle", "nearest", "diverse", "bipartite"])
@pytest.mark.parametrize(("family", "case"), families_and(CASES))
def test_each_source_has_one_place_and_weights_sum_to_one(family: str, case: str, rule: str) -> None:
    model = tiny_model(family)
    inputs = inputs_for(model, [CASES[case]])
    session = patch(model, **SETTINGS[family], method=Method(rule, merge=rule), track=True)
    with torch.no_grad():
        model(**inputs)
    for layer in (1, 2):
        for image in session.provenance.at("vision", layer).images:
            dense = image.weights.to_dense()
            torch.testing.assert_close(dense.sum(1), torch.ones(len(dense)), atol=1e-5, rtol=0)
            assert ((dense > 0).sum(0) == 1).all()
            assert image.seats.unique().numel() == len(image.seats) == len(dense)
    for layer in (0, 1, 3):
        for image, visual in zip(session.provenance.at("language", layer).images, session.report.visuals, strict=True):
            dense = image.weights.to_dense()
            assert len(dense) == len(image.seats) == visual.language_tokens[layer]
            assert (dense.sum(1) < 1 + 1e-5).all()
            assert image.seats.max() < visual.prompt_tokens
            if family == "qwen2_vl":
                torch.testing.assert_close(dense.sum(1), torch.ones(len(dense)), atol=1e-5, rtol=0)
                assert ((dense > 0).sum(0) == 1).all()


def test_provenance_must_be_asked_for() -> None:
    model = tiny_model("qwen2_vl")
    session = patch(model, **SETTINGS["qwen2_vl"])
    with pytest.raises(PatchStateError, match="track is False"):
        _ = session.provenance
    session = patch(model, **SETTINGS["qwen2_vl"], track=True)
    with pytest.raises(PatchStateError, match="no provenance yet"):
        _ = session.provenance
    with torch.no_grad():
        model(**inputs_for(model, [CASES["tiles"]]))
    with pytest.raises(PatchStateError, match=r"\('vision', 3\) did not merge"):
        session.provenance.at("vision", 3)


def test_features_alone_have_provenance_of_the_vision_stage() -> None:
    model = tiny_model("llava_onevision")
    inputs = inputs_for(model, [CASES["tiles"]])
    session = patch(model, **SETTINGS["llava_onevision"], track=True)
    with torch.no_grad():
        model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    (image,) = session.provenance.at("vision", 2).images
    assert image.weights.shape == (3 * 36, 3 * 64)


def test_every_visual_keeps_its_place_where_only_some_merge() -> None:
    model = tiny_model("llava_onevision", vision={"num_hidden_layers": 8}, text={"num_hidden_layers": 6})
    inputs = inputs_for(model, [Sample(text_seed=6, images=((48, 30),), videos=(4,))])
    session = patch(model, track=True)  # the preset of this depth: images merge in layers 3 and 4, videos in 2 and 3
    with torch.no_grad():
        model(**inputs)
    seats = {layer: [len(v.seats) for v in session.provenance.at("vision", layer).images] for layer in (2, 3, 4)}
    tiles, frames = int(seats[2][0] / 64), 4
    assert seats == {2: [64 * tiles, 48 * frames], 3: [48 * tiles, 32 * frames], 4: [32 * tiles, 32 * frames]}
    untouched = session.provenance.at("vision", 2).images[0]
    torch.testing.assert_close(untouched.weights.to_dense(), torch.eye(64 * tiles))
