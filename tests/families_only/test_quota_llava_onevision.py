"""LLaVA-OneVision crops tiles: with a quota, what is shown of each merges apart, and shapes tell how many are left."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from families.llava_onevision import num_tiles
from helpers import assert_differ, assert_same, assert_says, everything, feature_outputs
from illava_hooks import METHODS, MergeConfigError, MergeSession, Method, merging, patch
from illava_hooks.engine.counts import shown_units
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.finding import find_family
from illava_hooks.engine.records import VisualRecord, records_of
from illava_hooks.patchers.llava_onevision.packing import Geometry, image_geometry
from tiny_models import Sample, inputs_for, tiny_model

N = 64
#: Odd sizes, of which every one crops some tile.
CROPPED = [(100, 60), (70, 128), (40, 47), (33, 90), (90, 33), (128, 50), (50, 100)]
#: More than two tiles: with ``anyres_max_2`` their grid is interpolated.
INTERPOLATED = [(64, 64), (96, 64), (100, 60), (70, 128), (96, 96)]
#: Rules under which no patch is lost.
LOSSLESS = ("recycle", "nearest", "diverse")
RULES = (*LOSSLESS, "cluster", "drop")
SETTINGS: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 14, "llm_layers": [2], "llm_ratio": 0.5}


def quota(merge: str = "recycle", **kwargs: Any) -> Method:
    return Method("quota", merge=merge, proportional=merge == "diverse", quota=True, **kwargs)


@cache
def model_of(aspect: str = "anyres_max_9") -> Any:
    """One model for all tests that patch it anew."""
    return tiny_model("llava_onevision", vision_aspect_ratio=aspect)


def image(size: tuple[int, int], seed: int = 1) -> list[Sample]:
    return [Sample(seed, images=(size,))]


@torch.no_grad()
def record_of(model: Any, size: tuple[int, int], seed: int = 1) -> VisualRecord:
    (found,) = records_of(feature_outputs(model, inputs_for(model, image(size, seed)))["image"])
    return found


def kept_tokens(session: MergeSession, size: tuple[int, int]) -> int:
    model = session.root
    shape = num_tiles(model.config, size, 1), *size
    return find_family(model).kept_tokens(model.model, session.config, "image", shape)


def geometry_of(size: tuple[int, int]) -> Geometry:
    model = model_of()
    return image_geometry(model.model, num_tiles(model.config, size, 1), N, size, model.config.vision_aspect_ratio)


def random_settings(draw: random.Random) -> dict[str, Any]:
    layers = sorted(draw.sample(range(4), draw.randint(1, 3)))
    return {"vit_layers": layers, "vit_r": draw.choice([draw.randint(1, 62 // len(layers)), draw.uniform(0.02, 0.6)])}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("size", CROPPED)
def test_each_tile_shows_its_share(size: tuple[int, int], seed: int) -> None:
    """Rounded up, and one at least is left for what is cropped away."""
    draw, geometry = random.Random(seed), geometry_of(size)
    session = patch(model_of(), **random_settings(draw), llm_layers=[], method=quota(draw.choice(RULES)))
    record = record_of(model_of(), size, seed)
    left, shown = record.segments[0][-1], geometry.visible.sum(1)
    assert not geometry.shrunk and ((shown > 0) & (shown < N)).any(), "some tile is cropped"
    tile = torch.where(geometry.source < 0, -1, geometry.source // N)
    for index, n in enumerate(shown.tolist()):
        share = left if n == N else min(-(-n * left // N), left - 1)
        assert record.keep[tile == index].sum() == share
    assert record.keep[geometry.is_newline].all()
    assert record.keep.sum() == kept_tokens(session, size)


@pytest.mark.parametrize("size", CROPPED)
def test_without_a_quota_pictures_decide(size: tuple[int, int]) -> None:
    """Which is why shapes are not asked: the family says what to use."""
    session = patch(model_of(), **{**SETTINGS, "llm_layers": []})
    assert len({int(record_of(model_of(), size, seed).keep.sum()) for seed in range(8)}) > 1
    with pytest.raises(MergeConfigError) as caught:
        kept_tokens(session, size)
    assert_says(caught.value, rf"{size[0]} x {size[1]} is cropped", "'illava'", r"quota=True")


@pytest.mark.parametrize(
    "settings",
    [{"method": quota("bipartite")}, {"method": quota(), "vit_layers": [1], "vit_r": 63}],
    ids=["pairs", "one survivor"],
)
def test_where_no_quota_can_be_kept_shapes_are_not_asked(settings: dict[str, Any]) -> None:
    """It merges all the same; whole tiles keep what shapes tell."""
    session = patch(model_of(), **{**SETTINGS, "llm_layers": [], **settings})
    record_of(model_of(), (100, 60))
    with pytest.raises(MergeConfigError, match="100 x 60 is cropped"):
        kept_tokens(session, (100, 60))
    assert record_of(model_of(), (64, 64)).keep.sum() == kept_tokens(session, (64, 64))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("size", INTERPOLATED)
def test_interpolated_grids_keep_their_share(size: tuple[int, int], seed: int) -> None:
    """With a quota and without."""
    draw, model = random.Random(seed), model_of("anyres_max_2")
    name = draw.choice(["illava", "illava-v2", "nearest", "diverse", "tome", "fastv", "random"])
    method = quota(draw.choice(RULES)) if draw.random() < 0.5 else name
    session = patch(model, **random_settings(draw), llm_layers=[], method=method)
    assert record_of(model, size, seed).keep.sum() == kept_tokens(session, size)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[EncoderRun]:
    """Every run of the encoder that ends."""
    found: list[EncoderRun] = []
    finished = EncoderRun.check_finished
    monkeypatch.setattr(EncoderRun, "check_finished", lambda run: found.append(run) or finished(run))
    return found


@pytest.mark.parametrize("merge", RULES)
@pytest.mark.parametrize("size", CROPPED)
def test_nothing_shown_is_folded_into_what_is_cropped(size: tuple[int, int], merge: str, runs: list[Any]) -> None:
    """Neither the other way round, in any layer."""
    patch(model_of(), **SETTINGS, method=quota(merge))
    record_of(model_of(), size)
    (run,) = runs
    assert run.visible is not None and len(run.states) == 3
    for state in run.states:
        seat = state.origins.gather(1, state.kept_at)
        assert torch.equal(run.visible.mask, run.visible.mask.gather(1, seat))
    for before, after in zip(run.lengths[0], run.lengths[0][1:], strict=False):
        assert after < before


@pytest.mark.parametrize("merge", LOSSLESS)
@pytest.mark.parametrize("size", CROPPED)
def test_every_shown_patch_keeps_a_place_in_the_prompt(size: tuple[int, int], merge: str) -> None:
    """And no kept token holds anything that is cropped away."""
    patch(model_of(), **{**SETTINGS, "llm_layers": []}, method=quota(merge), track=True)
    record, visible = record_of(model_of(), size), geometry_of(size).visible.flatten()
    weights = record.sources.to_dense()[record.keep].sum(0)
    assert (weights[visible] > 0).all() and (weights[~visible] == 0).all()
    patch(model_of(), **{**SETTINGS, "llm_layers": []}, method=Method("none", merge=merge), track=True)
    record = record_of(model_of(), size)
    weights = record.sources.to_dense()[record.keep].sum(0)
    assert weights[~visible].max() > 0, "without a quota some are mixed"


def test_what_is_removed_of_a_part_is_what_its_count_says(runs: list[EncoderRun]) -> None:
    patch(model_of(), **SETTINGS, method=quota())
    record_of(model_of(), (100, 60))
    (run,) = runs
    for layer, state in enumerate(run.states):
        for tile, (units, shown) in enumerate(zip(run.lengths, run.visible.counts, strict=True)):
            mine = run.visible.mask[tile].gather(0, state.origins[tile]).sum()
            assert mine == shown_units(units, shown)[layer]


@pytest.mark.parametrize("how", ["nothing to remove", "switched off"])
def test_a_quota_that_removes_nothing_is_stock(how: str) -> None:
    model, stock = tiny_model("llava_onevision"), tiny_model("llava_onevision")
    inputs = inputs_for(model, image((100, 60)))
    idle = {"vit_r": 0, "llm_ratio": 1.0} if how == "nothing to remove" else {}
    patch(model, **{**SETTINGS, **idle}, method=quota())
    with merging(model, how != "switched off"):
        assert_same(everything(model, inputs), everything(stock, inputs))


def test_whole_tiles_merge_as_without_a_quota() -> None:
    found = []
    for method in (quota(), METHODS["illava"]):
        model = tiny_model("llava_onevision")
        patch(model, **SETTINGS, method=method)
        whole, cropped = (inputs_for(model, image(size)) for size in ((64, 64), (100, 60)))
        with torch.no_grad():
            found.append([model(**inputs).logits for inputs in (whole, cropped)])
    (whole, cropped), (same, other) = found
    assert torch.equal(whole, same)
    assert_differ(cropped, other)


@pytest.mark.parametrize("merge", RULES)
def test_a_batch_is_its_rows(merge: str) -> None:
    """Tiles of several images merge in one call, each within its own."""
    model = tiny_model("llava_onevision", dtype=torch.float64)
    patch(model, **SETTINGS, method=quota(merge))
    rows = [Sample(1, images=((100, 60),)), Sample(2, text=(9,)), Sample(3, images=((33, 90),))]
    rows.append(Sample(4, images=((48, 30), (64, 64))))

    def run(samples: list[Sample]) -> tuple[Tensor, Tensor]:
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs_for(model, samples).items()}
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)  # stock counts them over padding
        with torch.no_grad():
            return model(**inputs, position_ids=positions).logits, inputs["attention_mask"].bool()

    found, real = run(rows)
    for index, sample in enumerate(rows):
        alone, _ = run([sample])
        torch.testing.assert_close(found[index][real[index]], alone[0], atol=1e-6, rtol=0)
