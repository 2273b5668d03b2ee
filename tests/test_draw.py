"""Pictures of the merging: every patch where it is, every file complete.

One red patch is painted at a known place; a method that keeps only it, or merges only it, must show it bright, or
dark, exactly there. The places come from arithmetic on the sizes, not from the code under test.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from illava_hooks import MergeConfigError, Method, PatchStateError, patch, session_of, unpatch
from illava_hooks.errors import InputError
from illava_hooks.merge.scores import ScoreInputs
from illava_hooks.tools.canvas import GAP, colour_of
from illava_hooks.tools.draw import MergeMap, _heaviest, draw, merge_maps, save_maps

FAMILIES = ("llava_onevision", "qwen2_vl")
RED = (230, 10, 10)
Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # top, left, bottom, right


@pytest.fixture(scope="module")
def tiny() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as path:
        path.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "train_tiny"))
        yield importlib.import_module("models")


@pytest.fixture(scope="module")
def stock(tiny: ModuleType) -> Callable[[str], tuple[Any, Any]]:
    made = {family: (tiny.build_model(family, 0).eval(), tiny.build_processor(family)) for family in FAMILIES}
    return made.__getitem__


def texture(height: int, width: int, seed: int = 0) -> Pixels:
    """Random pixels, none of which dimming leaves alone."""
    return np.random.default_rng(seed).integers(90, 160, (height, width, 3), dtype=np.uint8)


def soft(height: int, width: int, seed: int = 0) -> Pixels:
    """Something that survives resizing."""
    blobs = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return np.array(blobs.resize((width, height), Image.Resampling.BICUBIC))


def ask(processor: Any, images: tuple[Pixels, ...] = (), videos: tuple[Pixels, ...] = ()) -> Any:
    content = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos) + [{"type": "text", "text": "how"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    visuals: dict[str, Any] = {"images": [list(images)]} if images else {}
    if videos:
        visuals["videos"] = list(videos)
    return processor(text=[text], return_tensors="pt", **visuals)


def run(
    model: Any,
    processor: Any,
    inputs: Any,
    vit_layers: list[int],
    vit_r: float,
    llm_layers: list[int],
    llm_ratio: float,
    method: str = "illava",
) -> list[MergeMap]:
    """All settings in the order of ``patch``."""
    settings = {"vit_layers": vit_layers, "vit_r": vit_r, "llm_layers": llm_layers, "llm_ratio": llm_ratio}
    return merge_maps(model, processor, inputs, **settings, method=method)


def pixels_of(picture: Image.Image) -> NDArray[np.int64]:
    return np.asarray(picture).astype(np.int64)


def inside(shape: tuple[int, ...], box: Box) -> NDArray[np.bool_]:
    mask = np.zeros(shape[:2], bool)
    mask[box[0] : box[2], box[1] : box[3]] = True
    return mask


@dataclass(frozen=True)
class Spot:
    """One token's place, known by arithmetic.

    Attributes:
        images: what goes in, with red where the token is.
        videos: the same.
        place: the encoder's position in its tile, slice or frame (Qwen2-VL: the group's).
        token: the place in the span of the prompt.
        box: in canvas pixels of the view that shows it.
        around: the tile that holds it.
        left: width of the base view before magnification, None where there is none.
        visual: which image or video.
        frame: which of its frames.
    """

    images: tuple[Pixels, ...]
    videos: tuple[Pixels, ...]
    place: int
    token: int
    box: Box
    around: Box
    left: int | None = None
    visual: int = 0
    frame: int = 0

    def on(self, picture: Image.Image, box: Box) -> Box:
        """A box of the canvas in the drawn picture."""
        first = self.frame_left(picture)
        scale = self.scale(picture)
        return box[0] * scale, first + box[1] * scale, box[2] * scale, first + box[3] * scale

    def scale(self, picture: Image.Image) -> int:
        view = self.videos[0][0] if self.videos else self.images[-1]
        # 100 x 70 becomes 128 high; all other pictures go in as they are.
        return picture.height // (128 if len(view) == 100 else len(view))

    def frame_left(self, picture: Image.Image) -> int:
        return 0 if self.left is None else self.left * self.scale(picture) + GAP


def painted(picture: Pixels, box: Box) -> Pixels:
    out = picture.copy()
    out[box[0] : box[2], box[1] : box[3]] = RED
    return out


def llava_tiles(height: int, width: int, row: int, column: int) -> Spot:
    """A patch of 8 pixels in the mosaic of tiles of 64 pixels; the base view has 64 tokens, a row one newline."""
    tile_row, tile_column = row // 8 * 64, column // 8 * 64
    box = (row * 8, column * 8, row * 8 + 8, column * 8 + 8)
    token = 64 + row * (width // 8 + 1) + column
    around = (tile_row, tile_column, tile_row + 64, tile_column + 64)
    place = row % 8 * 8 + column % 8
    return Spot((painted(texture(height, width), box),), (), place, token, box, around, height)


def llava_padded() -> Spot:
    """100 x 70 becomes 128 x 90 in the middle of 128 x 128; stock keeps 12 columns of patches from the third on.

    The red patch is number (6, 5) of the mosaic: from (48, 40) on, and from (48, 21) on without padding. It is
    painted larger than it is, so that resizing leaves all of it red.
    """
    image = painted(texture(100, 70), (34, 13, 47, 26))
    return Spot((image,), (), 6 * 8 + 5, 64 + 6 * 13 + 3, (48, 21, 56, 29), (0, 0, 64, 45), 128)


def llava_second(stage: str) -> Spot:
    del stage
    images = (texture(64, 128), painted(texture(64, 64, 1), (16, 48, 24, 56)))
    return Spot(images, (), 2 * 8 + 6, 2 * 8 + 6, (16, 48, 24, 56), (0, 0, 64, 64), None, 1)


def llava_video(stage: str) -> Spot:
    """Frame 2 of 4; pooling makes one token of 2 x 2 patches, 16 of a frame."""
    frames = np.stack([texture(64, 64, seed) for seed in range(4)])
    box = (32, 16, 40, 24) if stage == "vision" else (32, 16, 48, 32)
    frames[2] = painted(frames[2], box)
    return Spot((), (frames,), 4 * 8 + 2, 2 * 16 + 2 * 4 + 1, box, (0, 0, 64, 64), frame=2)


def qwen(row: int, column: int, images: int, frames: int, height: int = 72, width: int = 96) -> Spot:
    """A group of 12 pixels in the last image, or in the second slice of two frames of a video."""
    box = (row * 12, column * 12, row * 12 + 12, column * 12 + 12)
    place, around = row * (width // 12) + column, (0, 0, height, width)
    if frames:
        video = np.stack([texture(height, width, seed) for seed in range(frames)])
        video[2:4, box[0] : box[2], box[1] : box[3]] = RED
        return Spot((), (video,), place, height * width // 144 + place, box, around, frame=1)
    pictures = [texture(height, width, seed) for seed in range(images)]
    pictures[-1] = painted(pictures[-1], box)
    return Spot(tuple(pictures), (), place, place, box, around, visual=images - 1)


SPOTS: dict[tuple[str, str], Callable[[str], Spot]] = {
    ("llava_onevision", "64x64"): lambda _: llava_tiles(64, 64, 7, 0),
    ("llava_onevision", "64x128"): lambda _: llava_tiles(64, 128, 3, 13),
    ("llava_onevision", "128x64"): lambda _: llava_tiles(128, 64, 14, 2),
    ("llava_onevision", "128x128"): lambda _: llava_tiles(128, 128, 9, 4),
    ("llava_onevision", "padded"): lambda _: llava_padded(),
    ("llava_onevision", "two images"): llava_second,
    ("llava_onevision", "video"): llava_video,
    ("qwen2_vl", "72x96"): lambda _: qwen(4, 5, 1, 0),
    ("qwen2_vl", "132x60"): lambda _: qwen(9, 1, 1, 0, 132, 60),
    ("qwen2_vl", "two images"): lambda _: qwen(2, 7, 2, 0),
    ("qwen2_vl", "video"): lambda _: qwen(1, 6, 0, 4),
}


def only(family: str, spot: Spot, stage: str, keep: bool, span: int) -> dict[str, Any]:
    """Settings that keep only the spot's token of each tile or span, or that remove only it."""

    def score(inputs: ScoreInputs) -> torch.Tensor:
        group = 4 if family == "qwen2_vl" and stage == "vision" else 1
        place = spot.place if stage == "vision" else spot.token
        hit = (inputs.positions // group == place).float()
        return hit if keep else -hit

    if stage == "vision":
        count = {"llava_onevision": 1, "qwen2_vl": 4}[family]
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


def span_of(family: str, spot: Spot, stage: str, inputs: Any, model: Any) -> int:
    """Patches of a tile or slice; tokens of the visual in the prompt."""
    if stage == "vision":
        return 64 if family == "llava_onevision" else (spot.around[2] // 6) * (spot.around[3] // 6)
    kind = model.config.video_token_id if spot.videos else model.config.image_token_id
    return int((inputs["input_ids"] == kind).sum()) // max(1, len(spot.images))


class TestTheRightPlace:
    @pytest.mark.parametrize("keep", [True, False], ids=["kept", "merged"])
    @pytest.mark.parametrize("stage", ["vision", "language"])
    @pytest.mark.parametrize(("family", "case"), SPOTS)
    def test_of_one_red_patch(self, stock: Any, family: str, case: str, stage: str, keep: bool) -> None:
        model, processor = stock(family)
        spot = SPOTS[family, case](stage)
        inputs = ask(processor, spot.images, spot.videos)
        span = span_of(family, spot, stage, inputs, model)
        maps = merge_maps(model, processor, inputs, **only(family, spot, stage, keep, span))
        assert [(m.stage, m.layer, m.visual) for m in maps] == [
            (stage, 1 if stage == "vision" else 2, visual) for visual in range(len(maps))
        ]
        chosen = maps[spot.visual]
        picture, plain = draw(chosen)[spot.frame], draw(chosen, dim=1.0)[spot.frame]
        canvas = pixels_of(plain)
        bright = (pixels_of(picture) == canvas).all(-1)
        expected = inside(bright.shape, spot.on(picture, spot.box))
        red = (abs(canvas - RED) < 25).all(-1)
        assert red[expected].all()
        if case != "padded":
            view = inside(bright.shape, (0, spot.frame_left(picture), picture.height, picture.width))
            assert (red & view == expected).all()
        # In the encoder each tile loses or keeps one token, in the prompt the whole image does.
        shown = spot.on(picture, spot.around) if stage == "vision" else (0, 0, *bright.shape)
        where = inside(bright.shape, shown)
        if spot.left is not None:
            where[:, spot.left * spot.scale(picture) :][:, :GAP] = False
        assert ((bright if keep else ~bright) & where == expected).all()

    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_a_token_that_waits_in_another_image(self, stock: Any, family: str) -> None:
        """Visuals of one prompt that merge in different layers are not mixed up."""
        model, processor = stock(family)
        inputs = ask(processor, (texture(64, 128),), (np.stack([texture(64, 64)] * 4),))
        maps = merge_maps(model, processor, inputs)
        patches = {0: len(inputs.get("pixel_values", [])), 1: len(inputs.get("pixel_values_videos", []))}
        if family == "llava_onevision":
            patches = {0: 3 * 64, 1: 4 * 64}
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
        return ask(processor, (), (video,)), [list(video if family == "llava_onevision" else video[::2])]
    images = (soft(100, 150, 1), soft(90, 60, 2))[: 2 if kind == "two images" else 1]
    return ask(processor, images), [[image] for image in images]


class TestTheCanvas:
    @pytest.mark.parametrize("kind", ["image", "two images", "video"])
    @pytest.mark.parametrize("family", FAMILIES)
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
                    self.check_view(view.pixels, original, family, kind)

    @staticmethod
    def check_view(view: Pixels, original: Pixels, family: str, kind: str) -> None:
        height, width = view.shape[:2]
        if family == "llava_onevision" and kind == "two images":  # stock pads these to a square
            side = max(original.shape[:2])
            top, left = (side - original.shape[0]) // 2, (side - original.shape[1]) // 2
            square = np.full((side, side, 3), 127, np.uint8)
            square[top : top + original.shape[0], left : left + original.shape[1]] = original
            original = square
        resized = Image.fromarray(original).resize((width, height), Image.Resampling.BICUBIC)
        assert abs(pixels_of(resized) - view).mean() < 3

    @pytest.mark.parametrize("family", FAMILIES)
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

    def test_has_no_padding(self, stock: Any) -> None:
        model, processor = stock("llava_onevision")
        inputs = ask(processor, (soft(100, 70) // 2 + 100,))
        (one,) = run(model, processor, inputs, [1], 8, [], 1.0)
        base, mosaic = one.frames[0]
        assert base.labels.shape == (64, 64) and mosaic.labels.shape == (128, 90)
        assert mosaic.pixels.min() > 60

    @pytest.mark.parametrize("kind", ["image", "video"])
    @pytest.mark.parametrize("family", FAMILIES)
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
        ("family", "stage"), [("llava_onevision", "vision"), ("qwen2_vl", "vision"), ("qwen2_vl", "language")]
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
        assert outlines == {colour_of(int(keeper)) for keeper in one.keepers[one.keepers != one.units]}
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
        group = 4 if family == "qwen2_vl" else 1
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

    def test_dim_sets_the_brightness(self, stock: Any) -> None:
        model, processor = stock("qwen2_vl")
        (one,) = run(model, processor, ask(processor, (texture(72, 72),)), [2], 0.4, [], 1.0)
        grey = [draw(one, dim)[0] for dim in (0.0, 0.5, 1.0)]
        dark, half, full = (pixels_of(picture) for picture in grey)
        assert (abs(half - (dark + full) / 2) <= 0.5).all() and (dark <= half).all() and (half <= full).all()
        lost = (dark != full).any(-1)
        assert len(np.unique(dark[lost], axis=0)) == 1


@pytest.fixture(scope="module")
def video_maps(stock: Any) -> list[MergeMap]:
    model, processor = stock("llava_onevision")
    inputs = ask(processor, (texture(64, 128),), (np.stack([texture(64, 64, seed) for seed in range(10)]),))
    return run(model, processor, inputs, [1, 2], 8, [3], 0.5)


class TestFiles:
    def test_of_one_image(self, stock: Any, tmp_path: Path) -> None:
        model, processor = stock("qwen2_vl")
        maps = run(model, processor, ask(processor, (texture(72, 72),)), [2, 5], 0.25, [3], 0.5)
        paths = save_maps(maps, tmp_path / "new" / "folder", "photo")
        names = [
            "photo-vision-layer02-108of144.png",
            "photo-vision-layer05-84of144.png",
            "photo-language-layer03-11of36.png",
            "photo-strip.png",
        ]
        assert [path.name for path in paths] == names
        assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(names)
        pictures = []
        for path in paths:
            with Image.open(path) as picture:
                pictures.append(picture.convert("RGB"))
        for one, picture in zip(maps, pictures, strict=False):
            assert (pixels_of(picture) == pixels_of(draw(one)[0])).all()
        side, strip = pictures[0].width, pixels_of(pictures[-1])
        assert strip.shape[1] >= 4 * side and strip.shape[0] > side
        step = (strip.shape[1] - side) // 3
        panels = [draw(maps[0], 1.0)[0], *pictures[:3]]
        for number, panel in enumerate(panels):
            assert (strip[:side, number * step : number * step + side] == pixels_of(panel)).all()
            caption = strip[side:, number * step : number * step + side]
            assert caption.min() < 100, "no caption"

    def test_of_an_image_and_a_video(self, video_maps: list[MergeMap], tmp_path: Path) -> None:
        paths = save_maps(video_maps, tmp_path, "both", colours=True)
        assert [path.name for path in paths] == [
            "both-1-vision-layer01-168of192.png",
            "both-1-vision-layer02-144of192.png",
            f"both-1-language-layer03-{video_maps[2].kept}of{video_maps[2].total}.png",
            "both-1-strip.png",
            "both-2-vision-layer01-560of640.png",
            "both-2-vision-layer02-480of640.png",
            f"both-2-language-layer03-{video_maps[5].kept}of161.png",
            "both-2-strip.png",
            "both-2-animated.gif",
        ]
        with Image.open(paths[4]) as sheet:
            assert sheet.height * 3 < sheet.width  # 8 + 2 frames in two rows
        with Image.open(paths[-1]) as moving:
            assert moving.format == "GIF" and moving.n_frames == 10
            for index in range(10):
                moving.seek(index)
                assert moving.info["duration"] == 400

    def test_of_nothing(self, tmp_path: Path) -> None:
        assert save_maps([], tmp_path, "none") == []

    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
    def test_are_complete_or_not_there(
        self, video_maps: list[MergeMap], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
    ) -> None:
        save, calls = Image.Image.save, []

        def failing(image: Image.Image, path: Path, **options: Any) -> None:
            calls.append(path)
            assert path.parent == tmp_path and path.suffix not in (".png", ".gif")
            save(image, path, **options)
            if len(calls) == 3:
                path.write_bytes(path.read_bytes()[:100])
                raise error("the disk is full")

        monkeypatch.setattr(Image.Image, "save", failing)
        with pytest.raises(error, match="disk"):
            save_maps(video_maps, tmp_path, "both")
        left = sorted(path.name for path in tmp_path.iterdir())
        assert left == ["both-1-vision-layer01-168of192.png", "both-1-vision-layer02-144of192.png"]
        for name in left:
            with Image.open(tmp_path / name) as picture:
                picture.load()


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

    def test_that_is_patched_is_refused_and_stays_patched(self, stock: Any) -> None:
        model, processor = stock("qwen2_vl")
        session = patch(model)
        try:
            with pytest.raises(PatchStateError, match=r"call unpatch\(model\) first"):
                merge_maps(model, processor, ask(processor, (texture(72, 72),)))
            assert session_of(model) is session
        finally:
            unpatch(model)

    def test_is_unpatched_after_errors(self, stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        model, processor = stock("llava_onevision")
        inputs = ask(processor, (texture(64, 64),))
        with pytest.raises(MergeConfigError, match="vit_r"):
            merge_maps(model, processor, inputs, vit_r=-1)
        with pytest.raises(MergeConfigError, match="layout 'aligned'"):
            merge_maps(model, processor, inputs, method="illava-reference")
        monkeypatch.setattr(model.lm_head, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, processor, inputs, [1], 4, [2], 0.5)
        assert session_of(model) is None

    def test_takes_one_sample(self, stock: Any) -> None:
        model, processor = stock("qwen2_vl")
        inputs = ask(processor, (texture(72, 72),))
        inputs["input_ids"] = inputs["input_ids"].repeat(2, 1)
        with pytest.raises(InputError, match="2 samples"):
            merge_maps(model, processor, inputs)

    def test_without_merging_or_pictures_gives_no_maps(self, stock: Any) -> None:
        model, processor = stock("qwen2_vl")
        assert run(model, processor, ask(processor, (texture(72, 72),)), [], 0, [], 1.0) == []
        assert merge_maps(model, processor, ask(processor)) == []
