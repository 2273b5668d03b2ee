"""How many tokens stay is a function of shapes, and it is what runs do; the vision stage stands by itself."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from decode_helpers import RAGGED, RICHEST, single
from families import FAMILIES, families, family
from helpers import feature_outputs
from illava_hooks import METHODS, MergeConfig, Method, PatchStateError, patch, session_of
from illava_hooks.config import ModelLimits
from illava_hooks.engine.counts import encoder_counts, shown_units
from illava_hooks.engine.family import ModelParts
from illava_hooks.engine.finding import find_family
from illava_hooks.engine.install import install_encoder
from illava_hooks.engine.records import VisualRecord, records_of
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.traits import EncoderTraits
from kind_helpers import tower, vision_layers
from test_no_trace import differences, snapshot
from tiny_models import Sample, inputs_for, tiny_model

SEEDS = range(20)
#: Sizes that fill a grid of tiles, where a family has tiles: nothing is cropped.
WHOLE = [(32, 32), (32, 64), (64, 64), (96, 32), (128, 128)]
RULES = ("illava", "illava-v2", "nearest", "diverse", "selective", "fastv", "random")


@cache
def shared_model(name: str) -> Any:
    """One model of a family, to be patched anew by whoever uses it."""
    return tiny_model(name)


def random_schedule(draw: random.Random, name: str) -> dict[str, Any]:
    """Layers and amounts of the encoder; whole numbers leave something of a tile."""
    layers = sorted(draw.sample(family(name).merging_layers, draw.randint(1, 3)))
    most = ((family(name).tile_patches or 150) - 2) // len(layers)
    return {"vit_layers": layers, "vit_r": draw.choice([draw.randint(1, most), draw.uniform(0.01, 0.6)])}


def with_quota(name: str) -> Method:
    stock = METHODS[name]
    return Method(name, stock.encoder_score, merge=stock.merge, proportional=stock.proportional, quota=True)


def random_samples(draw: random.Random, name: str, sizes: list[tuple[int, int]] | None = None) -> list[Sample]:
    """One or two rows, of one or two images each, some with a video."""

    def size() -> tuple[int, int]:
        return draw.choice(sizes) if sizes else (draw.randint(8, 130), draw.randint(8, 130))

    rows = []
    for index in range(draw.randint(1, 2)):
        images = tuple(size() for _ in range(draw.choice([1, 1, 2])))
        videos = (4,) if family(name).with_videos and draw.random() < 0.4 else ()
        rows.append(Sample(10 * index + draw.randint(1, 9), images=images, videos=videos, video_size=size()))
    return rows


@torch.no_grad()
def records(model: Any, samples: list[Sample]) -> dict[Any, list[VisualRecord]]:
    """Of each image and video, by modality."""
    return {kind: records_of(out) for kind, out in feature_outputs(model, inputs_for(model, samples)).items()}


def check_counts(model: Any, samples: list[Sample]) -> None:
    """A patched model keeps what its family says."""
    config, shapes = session_of(model).config, family(model.config.model_type).visual_shapes(model, samples)
    for kind, found in records(model, samples).items():
        expected = [find_family(model).kept_tokens(model.model, config, kind, shape) for shape in shapes[kind]]
        assert [int(record.keep.sum()) for record in found] == expected, (kind, shapes[kind], config.image)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FAMILIES)
class TestShapesTellWhatStays:
    def test_by_any_rule_with_a_quota(self, name: str, seed: int) -> None:
        draw, model = random.Random(seed), shared_model(name)
        patch(model, **random_schedule(draw, name), llm_layers=[], method=with_quota(draw.choice(RULES)))
        check_counts(model, random_samples(draw, name))

    def test_by_any_method_where_nothing_is_cropped(self, name: str, seed: int) -> None:
        draw, model = random.Random(seed), shared_model(name)
        patch(model, **random_schedule(draw, name), llm_layers=[], method=draw.choice([*RULES, "tome"]))
        check_counts(model, random_samples(draw, name, WHOLE))

    def test_before_a_model_is_patched(self, name: str, seed: int) -> None:
        """Nothing but configuration is asked: the counts come without weights."""
        draw, model = random.Random(seed), shared_model(name)
        patch(model, **random_schedule(draw, name), llm_layers=[], method=with_quota(draw.choice(RULES)))
        config, samples = session_of(model).config, random_samples(draw, name)
        with torch.device("meta"):
            bare = type(model)(model.config).model
        for kind, shapes in family(name).visual_shapes(model, samples).items():
            for shape in shapes:
                counts = [find_family(m).kept_tokens(m, config, kind, shape) for m in (bare, model.model)]
                assert counts[0] == counts[1]


@pytest.mark.parametrize("size", [(64, 64), (100, 60), (40, 47), (128, 50)])
@pytest.mark.parametrize("name", families(published=True))
def test_shapes_tell_what_the_published_method_keeps(name: str, size: tuple[int, int]) -> None:
    model = shared_model(name)
    patch(model, **{**family(name).settings, "llm_layers": []}, method="illava-reference")
    videos = (4,) if family(name).with_videos else ()
    check_counts(model, [Sample(1, images=(size,), videos=videos), Sample(2, images=(size, (30, 60)))])


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_tell_that_everything_stays(name: str) -> None:
    model = shared_model(name)
    samples = random_samples(random.Random(0), name)
    patch(model, vit_layers=[1], vit_r=0, llm_layers=[])
    config, found = session_of(model).config, feature_outputs(model, inputs_for(model, samples))
    for kind, shapes in family(name).visual_shapes(model, samples).items():
        lengths = [len(f) + family(name).beyond_features(kind) for f in found[kind].pooler_output] if shapes else []
        assert [find_family(model).kept_tokens(model.model, config, kind, shape) for shape in shapes] == lengths


@pytest.mark.parametrize("seed", SEEDS)
def test_counts_of_segments_keep_whole_units_and_leave_one(seed: int) -> None:
    """Down in every layer, by as much as was asked for if there is as much to give."""
    draw = random.Random(seed)
    unit = draw.choice([1, 4])
    traits = EncoderTraits(unit, draw.choice([g for g in (1, 4, 16) if g % unit == 0]))
    amount = draw.choice([draw.randint(1, 60), draw.uniform(0.01, 0.99)])
    method = draw.choice([METHODS["illava"], METHODS["tome"]])
    schedule = MergeConfig.build(ModelLimits("any", 4, 4, None), [0, 1, 2], amount, [], 1.0, method, "image", False)
    size = 16 * draw.randint(1, 12)
    found = encoder_counts(schedule, "image", traits, size)
    units = found.units
    assert units[0] == size // unit and len(units) == 4 and units[-1] >= max(1, traits.granularity // unit)
    for before, after in zip(units, units[1:], strict=False):
        wish = amount if isinstance(amount, int) else int(amount * before * unit)
        wish -= wish % traits.granularity
        removed = (before - after) * unit
        assert 0 <= removed <= wish and removed % traits.granularity == 0
        if removed < wish:
            assert after == 1 or after * unit < 2 * traits.granularity or method.merge == "bipartite"
            assert found.short_of > 0 or isinstance(amount, float)


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_of_a_tile_always_have_someone_left(seed: int) -> None:
    """What is shown keeps its share rounded up, what is cropped one at least, and neither ever grows."""
    draw = random.Random(seed)
    units = sorted((draw.randint(2, 729) for _ in range(5)), reverse=True)
    for shown in {0, 1, units[0] // 3, units[0] - 1, units[0]}:
        mine = shown_units(units, shown)
        rest = [n - m for n, m in zip(units, mine, strict=True)]
        assert mine[0] == shown and list(mine) == sorted(mine, reverse=True) and rest == sorted(rest, reverse=True)
        if 0 < shown < units[0]:
            assert min(mine) > 0 and min(rest) > 0
            assert all(
                0 <= units[0] * m - shown * n < units[0] or n - m == 1 for n, m in zip(units, mine, strict=True)
            )


# ---------------------------------------------------------------------------- the vision stage by itself

ENCODER: dict[str, Any] = {"vit_layers": [1, 2], "vit_r": 0.25, "llm_layers": []}


def parts_without_decoder(model: Any) -> ModelParts:
    """As somebody names them whose decoder is none of transformers'."""
    layers = [[layer] for layer in vision_layers(model)]
    return ModelParts(None, model.model, [tower(model)], [], layers, [])


def encoder_installed(model: Any, track: bool = False, method: str = "illava") -> MergeSession:
    """The vision stage alone, in a model that is not patched."""
    known, found = find_family(model), model.model
    config = MergeConfig.build(known.limits(model), [1, 2], 0.25, [], 1.0, method, "auto", track)
    parts = parts_without_decoder(model)
    session = MergeSession(config, found)
    install_encoder(known, parts, session)
    return session


def assert_same_records(ours: list[VisualRecord], theirs: list[VisualRecord]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.keep, other.keep) and torch.equal(one.survivor_of, other.survivor_of)
        assert (one.num_tokens, one.segments, one.layers) == (other.num_tokens, other.segments, other.layers)
        assert torch.equal(one.sources.to_dense(), other.sources.to_dense())


@pytest.mark.parametrize("method", ["illava", "diverse"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_encoder_alone_merges_as_in_a_patched_model(name: str, method: str) -> None:
    model, whole = tiny_model(name), tiny_model(name)
    encoder_installed(model, track=True, method=method)
    patch(whole, **ENCODER, method=method, track=True)
    samples = [s for s in [*RAGGED, RICHEST[name]] if s.images or s.videos]
    with torch.no_grad():
        ours, theirs = (feature_outputs(m, inputs_for(m, samples)) for m in (model, whole))
    assert ours.keys() == theirs.keys()
    for kind, output in ours.items():
        assert_same_records(records_of(output), records_of(theirs[kind]))
        for one, other in zip(output.pooler_output, theirs[kind].pooler_output, strict=True):
            assert torch.equal(one, other)
        assert any(not record.keep.all() for record in records_of(output))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_encoder_alone_asks_nothing_of_a_decoder(name: str) -> None:
    """Nor does it find one: somebody else's stands there."""
    model, expected = tiny_model(name), tiny_model(name)
    patch(expected, **ENCODER)
    setattr(model.model, family(name).language_name, nn.Identity())
    inputs = inputs_for(model, [RICHEST[name]])
    encoder_installed(model)
    with torch.no_grad():
        ours, theirs = (feature_outputs(m, inputs) for m in (model, expected))
    for kind in theirs:
        for one, other in zip(ours[kind].pooler_output, theirs[kind].pooler_output, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_encoder_alone_leaves_the_decoder_and_the_head_alone(name: str) -> None:
    """And the whole model runs: its decoder gets features of the unpatched shapes."""
    model, stock = tiny_model(name), tiny_model(name)
    inputs = single(model, RICHEST[name])
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)
    before = snapshot(model)
    session = encoder_installed(model)
    changed = differences(before, snapshot(model))
    parts = [part for part in (family(name).tower_name, family(name).pooler_name) if part]
    assert changed and all(part == "model" or any(one in part for one in parts) for part in changed), changed
    with torch.no_grad():
        found, expected = model(**inputs).logits, stock(**inputs).logits
    assert found.shape == expected.shape and not torch.equal(found, expected)
    with pytest.raises(PatchStateError, match="^no report"):
        _ = session.report.kept_fraction


@pytest.mark.parametrize("name", FAMILIES)
def test_the_encoder_alone_is_taken_out_without_a_trace(name: str) -> None:
    model = tiny_model(name)
    inputs = single(model, RICHEST[name])

    def run() -> Tensor:
        with torch.no_grad():
            return model(**inputs, output_hidden_states=True).logits

    expected, before = run(), snapshot(model)
    session = encoder_installed(model)
    assert not torch.equal(run(), expected)
    session.hooks.remove(model)
    assert differences(before, snapshot(model)) == []
    assert torch.equal(run(), expected)
