"""What only LLaVA-NeXT has: the layout of its tiles, by arithmetic; how many tokens stay, from shapes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from families.llava_next import num_tiles
from helpers import assert_says, feature_outputs
from illava_hooks import MergeConfigError, Method, patch
from illava_hooks.engine.finding import find_family
from illava_hooks.engine.records import VisualRecord, records_of
from illava_hooks.patchers import _anyres
from illava_hooks.patchers._tiles import Geometry
from reference_checks import check_forward
from tiny_models import Sample, inputs_for, tiny_model

SIDE, TILE, N = 8, 32, 64
#: The pinpoint (rows, columns of tiles) that stock chooses for each size, read off by hand; those that crop are odd.
GRIDS = {(64, 64): (2, 2), (32, 64): (1, 2), (96, 32): (3, 1), (60, 64): (2, 2), (40, 96): (1, 3), (90, 33): (3, 1)}
SETTINGS: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 14, "llm_layers": [2], "llm_ratio": 0.5}


def packed_by_hand(size: tuple[int, int]) -> list[tuple[int, int] | None]:
    """Tile and patch at every packed place, None for a newline: the base view, then rows without their padding."""
    rows, columns = (count * SIDE for count in GRIDS[size])
    height, width = size
    top = left = 0
    if width * rows > height * columns:  # wider than its grid: what was padded are rows
        top = (rows - int(round(height * columns / width, 7))) // 2
    else:
        left = (columns - int(round(width * rows / height, 7))) // 2
    places: list[tuple[int, int] | None] = [(0, patch) for patch in range(N)]
    for row in range(top, rows - top):
        for column in range(left, columns - left):
            tile = 1 + row // SIDE * (columns // SIDE) + column // SIDE
            places.append((tile, row % SIDE * SIDE + column % SIDE))
        places.append(None)
    return places


def sample(size: tuple[int, int], seed: int = 1) -> list[Sample]:
    return [Sample(seed, images=(size,))]


@torch.no_grad()
def features_of(model: Any, size: tuple[int, int], seed: int = 1) -> tuple[Tensor, VisualRecord]:
    output = feature_outputs(model, inputs_for(model, sample(size, seed)), return_dict=True)["image"]
    (found,), (record,) = output.pooler_output, records_of(output)
    return found, record


class Survivors:
    """Features of survivors as the projector gives them, and where they stood in their tile."""

    def __init__(self, model: Any) -> None:
        self.values = torch.empty(0)
        model.model.multi_modal_projector.register_forward_hook(self)

    def __call__(self, module: Any, args: Any, output: Tensor) -> None:
        self.values = output


def check_layout(size: tuple[int, int]) -> None:
    """Every packed token shows the survivor that stands for the patch at its place, and newlines stay."""
    model = tiny_model("llava_next", dtype=torch.float64)
    session = patch(model, **{**SETTINGS, "llm_layers": []}, method="nearest", track=True)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs_for(model, sample(size)).items()}
    survivors = Survivors(model)
    with torch.no_grad():
        output = feature_outputs(model, inputs, return_dict=True)["image"]
    (found,), (record,) = output.pooler_output, records_of(output)
    tracked = session.provenance.at("vision", 2).images[0]
    weights, count = tracked.weights.to_dense(), survivors.values.shape[1]
    owner = (weights > 0).float().argmax(0).tolist()  # by patch of the whole image, the survivor that holds it
    values, seats = survivors.values.flatten(0, 1), tracked.seats.tolist()
    places = packed_by_hand(size)
    assert len(places) == len(found) and len(seats) == count * num_tiles(model.config, size)
    for token, place in enumerate(places):
        if place is None:
            torch.testing.assert_close(found[token], model.model.image_newline.detach())
            assert record.keep[token]
        else:
            patch_index = place[0] * N + place[1]
            torch.testing.assert_close(found[token], values[owner[patch_index]], atol=1e-9, rtol=0)
            assert bool(record.keep[token]) == (patch_index in seats)


@pytest.mark.parametrize("size", GRIDS)
def test_packed_tokens_show_the_patches_at_their_places(size: tuple[int, int]) -> None:
    check_layout(size)


def test_newlines_at_wrong_places_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _anyres.image_geometry

    def shifted(*args: Any) -> Geometry:
        """Newlines one place further on."""
        found = plain(*args)
        return Geometry(found.source.roll(1), found.packed, found.visible, found.is_newline.roll(1), found.shrunk)

    monkeypatch.setattr(_anyres, "image_geometry", shifted)
    with pytest.raises(AssertionError):
        check_layout((60, 64))
    with pytest.raises(AssertionError):
        check_forward("llava_next", sample((60, 64)), "nearest", {**SETTINGS, "llm_layers": [1, 3]})


def test_every_image_is_tiled_also_several() -> None:
    model = tiny_model("llava_next")
    session = patch(model, **SETTINGS)
    with torch.no_grad():
        model(**inputs_for(model, [Sample(2, images=((64, 64), (32, 64), (90, 33)))]))
    assert [visual.vision_tokens[0] for visual in session.report.images] == [5 * N, 3 * N, 4 * N]
    assert [visual.vision_tokens[-1] for visual in session.report.images] == [5 * 36, 3 * 36, 4 * 36]


@pytest.mark.parametrize("form", [list, tuple, "tensor", "numpy"])
def test_sizes_in_any_form(form: Any) -> None:
    model = tiny_model("llava_next")
    patch(model, **SETTINGS)
    inputs = inputs_for(model, sample((60, 64)))
    sizes = inputs["image_sizes"]
    given = {"tensor": sizes, "numpy": sizes.numpy()}.get(form) if isinstance(form, str) else form(sizes.tolist())
    with torch.no_grad():
        expected = model.get_image_features(inputs["pixel_values"], sizes).pooler_output[0]
        found = model.get_image_features(inputs["pixel_values"], given).pooler_output[0]
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def kept_tokens(session: Any, size: tuple[int, int]) -> int:
    model = session.root
    shape = (num_tiles(model.config, size), *size)
    return find_family(model).kept_tokens(model.model, session.config, "image", shape)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", GRIDS)
def test_a_quota_makes_lengths_follow_from_shapes(size: tuple[int, int], seed: int) -> None:
    draw, model = random.Random(seed), tiny_model("llava_next")
    layers = sorted(draw.sample(range(4), draw.randint(1, 3)))
    merge = draw.choice(["recycle", "nearest", "diverse", "cluster", "drop"])
    session = patch(
        model, layers, draw.randint(1, 62 // len(layers)), [], 1.0, method=Method("q", merge=merge, quota=True)
    )
    _, record = features_of(model, size, seed)
    assert int(record.keep.sum()) == kept_tokens(session, size)


def test_without_a_quota_pictures_decide() -> None:
    model = tiny_model("llava_next")
    session = patch(model, **{**SETTINGS, "llm_layers": []})
    assert len({int(features_of(model, (90, 33), seed)[1].keep.sum()) for seed in range(8)}) > 1
    with pytest.raises(MergeConfigError) as caught:
        kept_tokens(session, (90, 33))
    assert_says(caught.value, "90 x 33 is cropped", "'illava'", "quota=True")
    assert int(features_of(model, (64, 64))[1].keep.sum()) == kept_tokens(session, (64, 64))
