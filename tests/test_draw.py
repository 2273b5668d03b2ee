"""Pictures of the merging: every patch where it is, every file complete.

One red patch is painted at a known place; a method that keeps only it, or merges only it, must show it bright, or
dark, exactly there. The places come from arithmetic on the sizes, not from the code under test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from drawing import RED, Pixels, Spot, ask, inside, pixels_of, run, soft, stock, texture
from families import families, family_of
from illava_hooks import MergeConfigError, Method, PatchStateError, patch, session_of, unpatch
from illava_hooks.errors import InputError
from illava_hooks.merge.scores import ScoreInputs
from illava_hooks.tools.canvas import GAP, View, colour_of, compose, sharpened, visuals_of
from illava_hooks.tools.draw import MergeMap, _heaviest, draw, merge_maps, save_maps, strip

FAMILIES = families(embedded=True)
WITH_VIDEOS = families(embedded=True, with_videos=True)
#: Settings that remove a little in both stages.
SOME: dict[str, Any] = {"vit_layers": [1], "vit_r": 0.25, "llm_layers": [2], "llm_ratio": 0.5}
SPOTS = [(family, case) for family in families(with_spots=True) for case in family_of(family).spots()]


@pytest.fixture(name="stock", scope="module")
def _stock() -> Callable[[str], tuple[Any, Any]]:
    return stock


def only(family: str, spot: Spot, stage: str, keep: bool, span: int) -> dict[str, Any]:
    """Settings that keep only the spot's token of each tile or span, or that remove only it."""

    def score(inputs: ScoreInputs) -> torch.Tensor:
        group = family_of(family).patches_per_token if stage == "vision" else 1
        place = spot.place if stage == "vision" else spot.token
        hit = (inputs.positions // group == place).float()
        return hit if keep else -hit

    if stage == "vision":
        count = family_of(family).patches_per_token
        removed = span - count if keep else count
        return {
            "vit_layers": [1],
            "vit_r": removed,
            "llm_layers": [],
            "llm_ratio": 1.0,
            "method": Method("mine", encoder_score=score, llm_score="uniform", merge="drop"),
        }
    ratio = 0.5 / span if keep else 1 - 1 / span
    method = Method("mine", encoder_score="uniform", llm_score=score, merge="drop")
    return {"vit_layers": [], "vit_r": 0, "llm_layers": [2], "llm_ratio": ratio, "method": method}


def span_of(spot: Spot, stage: str, inputs: Any, model: Any) -> int:
    """Patches of a tile or slice; tokens of the visual in the prompt."""
    if stage == "vision":
        return spot.segment
    kind = model.config.video_token_id if spot.videos else model.config.image_token_id
    return int((inputs["input_ids"] == kind).sum()) // max(1, len(spot.images))


class TestTheRightPlace:
    @pytest.mark.parametrize("keep", [True, False], ids=["kept", "merged"])
    @pytest.mark.parametrize("stage", ["vision", "language"])
    @pytest.mark.parametrize(("family", "case"), SPOTS)
    def test_of_one_red_patch(self, stock: Any, family: str, case: str, stage: str, keep: bool) -> None:
        model, processor = stock(family)
        spot = family_of(family).spots()[case](stage)
        inputs = ask(processor, spot.images, spot.videos)
        span = span_of(spot, stage, inputs, model)
        maps = merge_maps(model, processor, inputs, **only(family, spot, stage, keep, span))
        assert [(m.stage, m.layer, m.visual) for m in maps] == [
            (stage, 1 if stage == "vision" else 2, visual) for visual in range(len(maps))
        ]
        chosen = maps[spot.visual]
        picture, plain = draw(chosen)[spot.frame], draw(chosen, dim=1.0)[spot.frame]
        canvas = pixels_of(plain)
        bright = (pixels_of(picture) == canvas).all(-1)
        expected = inside(bright.shape, spot.on(picture, spot.box))
        red: Any = (abs(canvas - RED) < 25).all(-1)
        assert red[expected].all()
        if not spot.larger:
            view = inside(bright.shape, (0, spot.frame_left(picture), picture.height, picture.width))
            assert (red & view == expected).all()
        # In the encoder each tile loses or keeps one token, in the prompt the whole image does.
        shown = spot.on(picture, spot.around) if stage == "vision" else (0, 0, *bright.shape)
        where = inside(bright.shape, shown)
        if spot.left is not None:
            where[:, spot.left * spot.scale(picture) :][:, :GAP] = False
        assert ((bright if keep else ~bright) & where == expected).all()

    @pytest.mark.parametrize("family", WITH_VIDEOS)
    def test_of_a_token_that_waits_in_another_image(self, stock: Any, family: str) -> None:
        """Visuals of one prompt that merge in different layers are not mixed up."""
        model, processor = stock(family)
        inputs = ask(processor, (texture(64, 128),), (np.stack([texture(64, 64)] * 4),))
        maps = merge_maps(model, processor, inputs)
        patches = family_of(family).patch_counts(model, inputs)
        for one in maps:
            assert one.modality == ("image", "video")[one.visual]
            assert len(one.keepers) == len(one.units) == patches[one.visual]
            if one.stage == "vision":
                assert one.total == patches[one.visual]
        order = [(m.visual, ("vision", "language").index(m.stage), m.layer) for m in maps]
        assert order == sorted(order) and {m.visual for m in maps} == {0, 1}
        for layer in {m.layer for m in maps if m.stage == "vision"}:
            kept = [m.kept / m.total for m in maps if m.stage == "vision" and m.layer == layer]
            assert all(0 < share < 1 for share in kept)


def inputs_of_kind(processor: Any, family: str, kind: str) -> tuple[Any, list[list[Pixels]]]:
    """Inputs, and for each visual its frames as they went in."""
    if kind == "video":
        video = np.stack([soft(72, 96, seed) for seed in range(4)])
        return ask(processor, (), (video,)), [family_of(family).shown_frames(video)]
    images = (soft(100, 150, 1), soft(90, 60, 2))[: 2 if kind == "two images" else 1]
    return ask(processor, images), [[image] for image in images]


class TestTheCanvas:
    @pytest.mark.parametrize("kind", ["image", "two images", "video"])
    @pytest.mark.parametrize("family", WITH_VIDEOS)
    def test_is_the_input(self, stock: Any, family: str, kind: str) -> None:
        model, processor = stock(family)
        inputs, originals = inputs_of_kind(processor, family, kind)
        maps = run(model, processor, inputs, [1], 0.25, [], 1.0, method="fastv")
        assert len(maps) == len(originals)
        for one, frames in zip(maps, originals, strict=True):
            whole = dataclasses.replace(one, keepers=one.units)
            assert len(one.frames) == len(frames)
            for frame, picture, plain, original in zip(one.frames, draw(whole), draw(one, 1.0), frames, strict=True):
                assert (pixels_of(picture) == pixels_of(plain)).all()
                last = frame[-1].pixels
                scale = picture.height // len(last)
                assert max(picture.size) >= 512 > max(picture.size) - 512
                drawn = pixels_of(picture)[:, -last.shape[1] * scale :][::scale, ::scale]
                assert (drawn == last).all()
                for view in frame:
                    self.check_view(view.pixels, family_of(family).shown(original, len(maps)))

    @staticmethod
    def check_view(view: Pixels, original: Pixels) -> None:
        height, width = view.shape[:2]
        resized = Image.fromarray(original).resize((width, height), Image.Resampling.BICUBIC)
        assert abs(pixels_of(resized) - view).mean() < 3

    @pytest.mark.parametrize("family", WITH_VIDEOS)
    def test_knows_how_images_and_videos_were_normalised(
        self, stock: Any, monkeypatch: pytest.MonkeyPatch, family: str
    ) -> None:
        model, processor = stock(family)
        monkeypatch.setattr(processor.video_processor, "image_mean", [0.2, 0.3, 0.4])
        monkeypatch.setattr(processor.video_processor, "image_std", [0.6, 0.7, 0.8])
        monkeypatch.setattr(processor.image_processor, "do_normalize", False)
        image, video = texture(72, 72), np.stack([texture(72, 72)] * 2)
        inputs = ask(processor, (image,), (video,))
        maps = run(model, processor, inputs, [1], 4, [], 1.0)
        for one in maps:
            view = one.frames[0][0].pixels
            shown = Image.fromarray(image).resize(view.shape[1::-1], Image.Resampling.BICUBIC)
            assert abs(pixels_of(shown) - view).mean() < 1.5

    @pytest.mark.parametrize("kind", ["image", "video"])
    @pytest.mark.parametrize("family", WITH_VIDEOS)
    def test_shows_as_much_as_is_kept(self, stock: Any, family: str, kind: str) -> None:
        model, processor = stock(family)
        image, video = (texture(128, 128),), (np.stack([texture(72, 72, seed) for seed in range(4)]),)
        inputs = ask(processor, image) if kind == "image" else ask(processor, (), video)
        for method in ("fastv", "nearest", "illava"):
            maps = run(model, processor, inputs, [1, 3], 0.25, [], 1.0, method=method)
            assert [m.layer for m in maps] == [1, 3]
            for one in maps:
                bright = gone = 0
                for picture, plain in zip(draw(one), draw(one, 1.0), strict=True):
                    paper = (pixels_of(plain) == 255).all(-1)
                    same = (pixels_of(picture) == pixels_of(plain)).all(-1)
                    bright, gone = bright + int((same & ~paper).sum()), gone + int((~same).sum())
                assert 0 < one.kept < one.total
                assert bright * one.total == one.kept * (bright + gone)


class TestLongPictures:
    """Whatever the model answers about is drawn, so that each patch it looked at can be seen."""

    @pytest.mark.parametrize("size", [(5000, 10), (10, 5000), (1900, 10), (400, 3), (1, 150), (1, 1)], ids=str)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_show_every_patch(self, stock: Any, family: str, size: tuple[int, int]) -> None:
        model, processor = stock(family)
        pixels = soft(size[1], size[0])
        try:
            inputs = ask(processor, (pixels,))
        except ValueError as error:
            pytest.skip(f"the model does not answer about it: {error}")
        ((_, (seen,)),) = visuals_of(model, processor, inputs)
        patches = {label for view in seen for label in view.labels.flat}
        for originals in ((), (Image.fromarray(pixels),)):
            maps = merge_maps(model, processor, inputs, originals, **SOME)
            assert [one.layer for one in maps] == [1, 2]
            for one in maps:
                (frame,), (drawn,), (plain,) = one.frames, draw(one), draw(one, 1.0)
                assert {label for view in frame for label in view.labels.flat} == patches
                assert 512 <= max(drawn.size) <= 20.2 * min(drawn.size), "two views lie side by side"
                gone = {label for label in patches if one.keepers[label] != one.units[label]}
                assert (drawn.tobytes() != plain.tobytes()) == bool(gone)
            assert min(strip(maps).size) > 30

    def test_of_common_forms_are_not_stretched(self) -> None:
        for size in ((640, 480), (1000, 100), (96, 960)):
            picture = Image.fromarray(soft(size[1], size[0]))
            view = View(
                np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC)), np.arange(4096).reshape(64, 64)
            )
            (sharp,) = sharpened((view,), picture)
            height, width = sharp.labels.shape
            assert abs(width / height / (size[0] / size[1]) - 1) < 0.01
            assert compose((sharp,), 1).labels.shape == sharp.labels.shape


def patches_of(one: MergeMap, dim: float, colours: bool) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """For each patch of a one-view map its pixels as drawn and as in the canvas, (n, 3) each."""
    pictures = zip(one.frames, draw(one, dim, colours), strict=True)
    for (view,), picture in pictures:
        scale = picture.height // len(view.labels)
        drawn = pixels_of(picture)
        labels, canvas = (a.repeat(scale, 0).repeat(scale, 1) for a in (view.labels, view.pixels.astype(np.int64)))
        for label in np.unique(labels):
            yield drawn[labels == label], canvas[labels == label]


class TestColours:
    @pytest.mark.parametrize(
        ("family", "stage"),
        [(family, "vision") for family in WITH_VIDEOS]
        + [(family, "language") for family in families(embedded=True, one_to_one=True, with_videos=True)],
    )
    def test_are_those_of_a_survivor(self, stock: Any, family: str, stage: str) -> None:
        model, processor = stock(family)
        inputs = ask(processor, (), (np.stack([texture(72, 72, seed) for seed in range(4)]),))
        layers = ([2], []) if stage == "vision" else ([], [2])
        maps = run(model, processor, inputs, layers[0], 0.4, layers[1], 0.6, method="nearest")
        (one,) = maps
        outlines, tints, untouched = set(), [], 0
        for drawn, canvas in patches_of(one, 0.25, colours=True):
            changed = (drawn != canvas).any(-1)
            if changed.mean() > 0.95:  # tinted: a pixel or two may have the survivor's colour anyway
                tints.append(((drawn - 0.4 * canvas) / 0.6).mean(0))
            elif changed.any():
                (colour,) = {tuple(pixel) for pixel in drawn[changed].tolist()}
                outlines.add(colour)
            else:
                untouched += 1
        assert tints and outlines and untouched
        absorbing = {int(keeper) for keeper in one.keepers[one.keepers != one.units]}
        assert outlines == {colour_of(one.units.tolist().index(keeper)) for keeper in absorbing}
        known = np.array(sorted(outlines))
        nearest = [abs(known - tint).max(1).min() for tint in tints]
        assert max(nearest) < 1
        # And the survivors that took something are outlined, no others.
        assert len({int(abs(known - tint).max(1).argmin()) for tint in tints}) == len(known)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_are_those_of_the_right_survivor(self, stock: Any, family: str) -> None:
        model, processor = stock(family)
        inputs = ask(processor, (texture(96, 96),))
        (one,) = run(model, processor, inputs, [2], 0.4, [], 1.0, method="nearest")
        session = patch(model, [2], 0.4, [], 1.0, method="nearest", track=True)
        try:
            with torch.no_grad():
                model(**inputs)
            (found,) = session.provenance.at("vision", 2).images
        finally:
            unpatch(model)
        group = family_of(family).patches_per_token
        expected = found.seats[found.weights.to_dense().argmax(0)] // group
        assert one.keepers.tolist() == expected.tolist()
        assert one.units.tolist() == [patch // group for patch in range(one.total)]

    def test_are_those_of_the_largest_share(self) -> None:
        weights = torch.tensor([[0.2, 0.5, 0.0, 0.3], [0.8, 0.0, 0.0, 0.3], [0.1, 0.4, 0.0, 0.1]]).to_sparse()
        assert _heaviest(weights.coalesce()).tolist() == [1, 0, -1, 0]

    def test_differ(self) -> None:
        """From those of the neighbours clearly, from those of all others at all."""
        colours = np.array([colour_of(unit) for unit in range(729)])
        assert abs(colours[1:] - colours[:-1]).max(1).min() > 60
        assert len(np.unique(colours, axis=0)) > 715

    @pytest.mark.parametrize("stage", ["vision", "language"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_none_where_patches_are_lost(self, stock: Any, family: str, stage: str) -> None:
        model, processor = stock(family)
        inputs = ask(processor, (texture(128, 64),))
        layers = ([2], []) if stage == "vision" else ([], [2])
        (one,) = run(model, processor, inputs, layers[0], 0.4, layers[1], 0.6, method="fastv")
        assert (one.keepers < 0).any()
        for plain, coloured in zip(draw(one), draw(one, colours=True), strict=True):
            assert (pixels_of(plain) == pixels_of(coloured)).all()

    @pytest.mark.parametrize("family", FAMILIES)
    def test_dim_sets_the_brightness(self, stock: Any, family: str) -> None:
        model, processor = stock(family)
        (one,) = run(model, processor, ask(processor, (texture(72, 72),)), [2], 0.4, [], 1.0)
        grey = [draw(one, dim)[0] for dim in (0.0, 0.5, 1.0)]
        dark, half, full = (pixels_of(picture) for picture in grey)
        assert (abs(half - (dark + full) / 2) <= 0.5).all() and (dark <= half).all() and (half <= full).all()
        lost = (dark != full).any(-1)
        assert len(np.unique(dark[lost], axis=0)) == 1


class TestFiles:
    def test_of_nothing(self, tmp_path: Path) -> None:
        assert save_maps([], tmp_path, "none") == []


class TestTheModel:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_is_as_before(self, stock: Any, family: str) -> None:
        model, processor = stock(family)
        inputs = ask(processor, (texture(72, 72),))
        with torch.inference_mode():
            before = model(**inputs).logits
        assert run(model, processor, inputs, [1], 4, [2], 0.5)
        assert session_of(model) is None
        with torch.inference_mode():
            assert torch.equal(model(**inputs).logits, before)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_that_is_patched_is_refused_and_stays_patched(self, stock: Any, family: str) -> None:
        model, processor = stock(family)
        session = patch(model)
        try:
            with pytest.raises(PatchStateError, match=r"call unpatch\(model\) first"):
                merge_maps(model, processor, ask(processor, (texture(72, 72),)))
            assert session_of(model) is session
        finally:
            unpatch(model)

    @pytest.mark.parametrize("family", families(embedded=True, published=True, with_tiles=True))
    def test_is_unpatched_after_errors(self, stock: Any, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
        model, processor = stock(family)
        inputs = ask(processor, (texture(64, 64),))
        with pytest.raises(MergeConfigError, match="vit_r"):
            merge_maps(model, processor, inputs, vit_r=-1)
        with pytest.raises(MergeConfigError, match="layout 'aligned'"):
            merge_maps(model, processor, inputs, method="illava-reference")
        monkeypatch.setattr(model.lm_head, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, processor, inputs, [1], 4, [2], 0.5)
        assert session_of(model) is None

    @pytest.mark.parametrize("family", FAMILIES)
    def test_takes_one_sample(self, stock: Any, family: str) -> None:
        model, processor = stock(family)
        inputs = ask(processor, (texture(72, 72),))
        inputs["input_ids"] = inputs["input_ids"].repeat(2, 1)
        with pytest.raises(InputError, match="2 samples"):
            merge_maps(model, processor, inputs)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_without_merging_or_pictures_gives_no_maps(self, stock: Any, family: str) -> None:
        model, processor = stock(family)
        assert run(model, processor, ask(processor, (texture(72, 72),)), [], 0, [], 1.0) == []
        assert merge_maps(model, processor, ask(processor)) == []
