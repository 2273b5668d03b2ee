"""Provenance against models in which nothing but merging changes a token.

With attention and MLP outputs zeroed, and a linear projector, every surviving hidden state is a weighted sum of
source patches: its weights must be what provenance says.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decode_helpers import SETTINGS
from families import FAMILIES, families_and, family_of
from fuzz_oracles import removed_in_encoder
from helpers import needs_ready_features
from illava_hooks import PatchStateError, patch
from illava_hooks.methods import Method
from tiny_models import Inputs, Sample, inputs_for, tiny_model

MERGING = ("recycle", "nearest", "diverse", "bipartite", "cluster")
CASES = {
    "tiles": Sample(text_seed=1, images=((48, 30),)),
    "more tiles than the limit": Sample(text_seed=2, images=((100, 120),)),
    "two images": Sample(text_seed=3, images=((48, 30), (64, 64))),
    "video": Sample(text_seed=4, videos=(6,)),
    "image and video": Sample(text_seed=5, images=((48, 30),), videos=(4,)),
}


def still_model(family: str) -> Any:
    """A model whose layers pass hidden states on unchanged."""
    model = tiny_model(family, dtype=torch.float64)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(family_of(family).silenced):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    family_of(family).make_projector_linear(model)
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
    known = family_of(family)
    seen = InputsOf(known.encoder_layers(model)[0]).seen
    with torch.no_grad():
        model(**inputs)
    return known.split_patches(seen, inputs)


@pytest.mark.parametrize("rule", MERGING)
@pytest.mark.parametrize(("family", "case"), families_and(CASES))
def test_weights_are_those_of_the_hidden_states(family: str, case: str, rule: str) -> None:
    model, known = still_model(family), family_of(family)
    inputs = inputs_for(model, [CASES[case]])
    sources = patches_by_image(model, family, inputs)
    method = Method(rule, merge=rule)
    session = patch(model, **SETTINGS[family], method=method, track=True)
    seen = InputsOf(known.encoder_layers(model)[3]).seen
    final = InputsOf(known.language(model).norm).seen
    with torch.no_grad():
        model(**inputs)
    tracked = session.provenance.at("vision", 2).images
    survivors = torch.cat([known.patches(hidden) for hidden in seen])
    rebuilt = torch.cat([image.weights.double() @ patches for image, patches in zip(tracked, sources, strict=True)])
    torch.testing.assert_close(rebuilt, survivors, atol=1e-6, rtol=1e-6)
    language = session.provenance.at("language", 3).images
    pairs = zip(language, sources, strict=True)
    visual = [known.projected(model, image.weights.double(), patches) for image, patches in pairs]
    if any(one is None for one in visual):
        return  # the projector is not linear: the language stage has the next test
    expected = torch.cat(visual)
    hidden = final[-1][0]
    distance = torch.cdist(expected, hidden).min(1).values
    # A newline may itself have been merged: its row then holds part of a newline.
    pure = torch.cat([(image.weights.to_dense().sum(1) - 1).abs() < 1e-6 for image in language])
    assert pure.float().mean() > 0.5
    torch.testing.assert_close(distance[pure], torch.zeros_like(distance[pure]), atol=1e-5, rtol=0)


@needs_ready_features
@pytest.mark.parametrize("rule", MERGING)
@pytest.mark.parametrize("family", FAMILIES)
def test_language_weights(family: str, rule: str) -> None:
    """With ready-made features the source of a visual token is itself."""
    model, known = still_model(family), family_of(family)
    inputs = inputs_for(model, [CASES["two images"]])
    with torch.no_grad():
        features = model.get_image_features(**known.feature_arguments(inputs)["image"], return_dict=True)
    session = patch(model, **SETTINGS[family], method=Method(rule, merge=rule), track=True)
    final = InputsOf(known.language(model).norm).seen
    with torch.no_grad():
        model(**known.beside_features(inputs), mm_encoder_outputs={"image": features})
    images = session.provenance.at("language", 3).images
    known_features = zip(images, known.visual_features(features), strict=True)
    visual = torch.cat([image.weights.double() @ one for image, one in known_features])
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
            if family_of(family).one_to_one:
                torch.testing.assert_close(dense.sum(1), torch.ones(len(dense)), atol=1e-5, rtol=0)
                assert ((dense > 0).sum(0) == 1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_provenance_must_be_asked_for(family: str) -> None:
    model = tiny_model(family)
    session = patch(model, **SETTINGS[family])
    with pytest.raises(PatchStateError, match="track is False"):
        _ = session.provenance.merges
    session = patch(model, **SETTINGS[family], track=True)
    with pytest.raises(PatchStateError, match="no provenance yet"):
        _ = session.provenance.merges
    with torch.no_grad():
        model(**inputs_for(model, [CASES["tiles"]]))
    with pytest.raises(PatchStateError, match=r"\('vision', 3\) did not merge"):
        session.provenance.at("vision", 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_alone_have_provenance_of_the_vision_stage(family: str) -> None:
    model, known = tiny_model(family), family_of(family)
    inputs = inputs_for(model, [CASES["tiles"]])
    session = patch(model, **SETTINGS[family], track=True)
    with torch.no_grad():
        model.get_image_features(**known.feature_arguments(inputs)["image"])
    (image,) = session.provenance.at("vision", 2).images
    (whole,) = known.segments(model, [CASES["tiles"]])
    left = whole
    for _ in SETTINGS[family]["vit_layers"]:
        left = [n - removed_in_encoder(n, SETTINGS[family]["vit_r"], known.patches_per_token, False) for n in left]
    assert image.weights.shape == (sum(left), sum(whole)) and sum(left) < sum(whole)
