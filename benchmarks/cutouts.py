"""Scenes of small cut-outs in photos: what the benchmarks on real towers and language models look at.

The cut-outs are those of Debian's ``tuxpaint-stamps-default`` (GPL), photos those of scikit-image and scikit-learn.
Nothing of them is part of this repository; docs/RESULTS.md has the commands that fetch them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]

#: Stamps that are no things, or drawn.
NO_THINGS = ("symbols", "cartoon", "people", "town", "space")
#: The quarters of a scene: halves of its side to the right and down.
QUARTERS = ((0, 0), (1, 0), (0, 1), (1, 1))


def read_cut_outs(stamps: Path) -> dict[str, Image.Image]:
    """Things with their alpha, by their file's name without its ending, in the order of paths."""
    names = {file: str(file.relative_to(stamps).with_suffix("")) for file in sorted(stamps.rglob("*.png"))}
    things = {name: _cut(file) for file, name in names.items() if not any(word in name for word in NO_THINGS)}
    return {name: cut for name, cut in things.items() if cut is not None}


def _cut(file: Path) -> Image.Image | None:
    """A cut-out with its alpha; None where it fills its frame, is nearly empty or tiny."""
    with Image.open(file) as opened:
        picture = opened.convert("RGBA")
    alpha = np.asarray(picture)[..., 3]
    if min(picture.size) < 60 or (alpha < 20).mean() < 0.15 or (alpha > 200).mean() < 0.2:
        return None
    return picture.crop(picture.getbbox())


def read_photos() -> Iterator[Image.Image]:
    """The photos that come with scikit-image and scikit-learn."""
    import skimage.data
    import sklearn.datasets

    names = ("rocket.jpg", "coffee.png", "chelsea.png", "motorcycle_left.png", "hubble_deep_field.jpg", "gravel.png")
    more = ("grass.png", "brick.png", "astronaut.png")
    folder, other = Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"
    for file in (*(folder / name for name in (*names, *more)), other / "china.jpg", other / "flower.jpg"):
        if file.exists():
            with Image.open(file) as opened:
                yield opened.convert("RGB")


class Painter:
    """Paints scenes, always the same ones from the same random numbers."""

    def __init__(
        self, objects: Sequence[Image.Image], photos: Sequence[Image.Image], side: int, size: int, rng: random.Random
    ) -> None:
        """Keeps what scenes are made of.

        Args:
            objects: cut-outs.
            photos: what is behind them.
            side: of a scene, in pixels.
            size: of an object, in pixels of its longer side.
            rng: makes all choices.
        """
        self.objects, self.photos, self.side, self.size, self.rng = objects, photos, side, size, rng

    def scene(self, objects: Sequence[int]) -> tuple[Image.Image, list[Box]]:
        """A piece of a photo with objects in different quarters, and their boxes (left, top, width, height)."""
        photo, half = self.rng.choice(self.photos), self.side // 2
        side = self.rng.randint(min(photo.size) * 2 // 3, min(photo.size))
        left, top = self.rng.randint(0, photo.width - side), self.rng.randint(0, photo.height - side)
        piece = photo.crop((left, top, left + side, top + side))
        picture = piece.resize((self.side, self.side), Image.Resampling.BICUBIC)
        quarters = [(half * right, half * down) for right, down in QUARTERS]
        self.rng.shuffle(quarters)
        boxes = []
        for number, (left, top) in zip(objects, quarters, strict=False):
            cut = self.objects[number]
            factor = self.size / max(cut.size)
            cut = cut.resize((max(8, int(cut.width * factor)), max(8, int(cut.height * factor))))
            at = left + self.rng.randint(0, half - self.size), top + self.rng.randint(0, half - self.size)
            picture.paste(cut, at, cut)
            boxes.append((*at, *cut.size))
        return picture, boxes
