"""Scenes with known contents: coloured shapes and handwritten digits on a soft, noisy background.

A scene is a grid of cells, most of them empty, so that most patches are redundant as in a photo. In a *small*
scene a cell is 16 pixels and a thing covers one or two patches; in a *large* one a cell is 32 pixels. Everything
follows from the random generator that is handed in, so equal seeds give equal scenes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from illava_hooks.tiny.painting import coverage, noisy, paint, soft_background

__all__ = ["COLORS", "DIRECTIONS", "KINDS", "SHAPES", "Clip", "Scene", "Split", "Thing", "draw_clip", "draw_scene"]

Split = Literal["train", "validation", "test"]
Pixels = NDArray[np.uint8]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (30, 165, 60),
    "blue": (40, 80, 225),
    "yellow": (240, 215, 40),
    "purple": (155, 50, 190),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star")
KINDS = (*SHAPES, "digit")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

SMALL_CELL, LARGE_CELL = 16, 32
_SPLITS: dict[str, tuple[int, ...]] = {"test": (0, 5), "validation": (1,), "train": (2, 3, 4, 6, 7, 8, 9)}


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene.

    Attributes:
        kind: one of ``KINDS``.
        color: a key of ``COLORS``.
        digit: 0 to 9 for a digit, else -1.
        row: of its cell.
        column: of its cell.
    """

    kind: str
    color: str
    digit: int
    row: int
    column: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        things: the objects.
        pixels: RGB, (height, width, 3).
        owner: (height, width): 1 + the index of the thing that a pixel shows, 0 for background.
    """

    things: tuple[Thing, ...]
    pixels: Pixels
    owner: NDArray[np.int8]

    @property
    def image(self) -> Image.Image:
        """The picture."""
        return Image.fromarray(self.pixels)

    def beside(self, thing: Thing, step: int) -> Thing | None:
        """The thing in the next cell of the same row: ``step`` -1 is left, 1 right."""
        place = (thing.row, thing.column + step)
        return next((other for other in self.things if (other.row, other.column) == place), None)


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames in which one thing moves and the others stand still.

    Attributes:
        frames: RGB, (frames, height, width, 3).
        things: the objects; the first one moves.
        direction: a key of ``DIRECTIONS``.
    """

    frames: Pixels
    things: tuple[Thing, ...]
    direction: str


@cache
def digit_images(split: Split) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Handwritten digits of a split: strokes (n, 8, 8) in [0, 1] and classes (n,), each class in every split.

    The digits are those of scikit-learn's ``load_digits``, 1,797 of "Optical Recognition of Handwritten Digits"
    (Alpaydin and Kaynak, UCI, doi 10.24432/C50P49, CC BY 4.0), in the order in which they stand there.
    """
    # A row of the picture for each: 64 strokes from 0 to 16, and the class.
    with Image.open(Path(__file__).with_name("digits.png")) as picture:
        rows = np.asarray(picture)
    chosen = rows[np.isin(np.arange(len(rows)) % 10, _SPLITS[split])]
    return (chosen[:, :64].reshape(-1, 8, 8) / 16).astype(np.float32), chosen[:, 64].astype(np.int64)


def draw_scene(
    rng: np.random.Generator,
    height: int,
    width: int,
    split: Split = "train",
    cell: int | None = None,
    digit_share: float | None = None,
) -> Scene:
    """Draws one scene.

    Args:
        rng: where all choices come from.
        height: in pixels, a multiple of 32.
        width: in pixels, a multiple of 32.
        split: whose digits are drawn.
        cell: 16 for small things, 32 for large ones; by default one of the two.
        digit_share: the fraction of digits among the things; by default uneven at random, like all kinds.
    """
    cell = cell or int(rng.choice([SMALL_CELL, LARGE_CELL]))
    rows, columns = height // cell, width // cell
    if cell == SMALL_CELL:
        count = int(rng.integers(5, 10)) if rows * columns > 16 else int(rng.integers(4, 7))
    else:
        count = int(rng.integers(2, min(5, rows * columns // 2 + 2)))
    shares = rng.dirichlet(np.full(len(KINDS), 0.8))
    if digit_share is not None:
        shares = np.array([(1 - digit_share) / len(SHAPES)] * len(SHAPES) + [digit_share])
    things = [_thing(rng, shares, split, place) for place in _places(rng, rows, columns, count)]
    canvas, owner = soft_background(rng, height, width), np.zeros((height, width), np.int8)
    for index, (thing, strokes) in enumerate(things):
        size = int(rng.integers(13, 17)) if cell == SMALL_CELL else int(rng.integers(18, 29))
        free = cell - size
        x = thing.column * cell + int(rng.integers(0, free + 1))
        y = thing.row * cell + int(rng.integers(0, free + 1))
        alpha = coverage(rng, thing.kind, strokes, size)
        paint(rng, canvas, alpha, COLORS[thing.color], x, y)
        owner[y : y + size, x : x + size][alpha > 0.4] = index + 1
    return Scene(tuple(thing for thing, _ in things), noisy(rng, canvas), owner)


def draw_clip(rng: np.random.Generator, height: int, width: int, frames: int, split: Split = "train") -> Clip:
    """Draws a clip of 64 pixels or more a side in which the first thing moves straight on.

    Args:
        rng: where all choices come from.
        height: in pixels.
        width: in pixels.
        frames: how many.
        split: whose digits are drawn.
    """
    direction = str(rng.choice(list(DIRECTIONS)))
    dx, dy = DIRECTIONS[direction]
    lanes, cell = (height if dx else width) // SMALL_CELL, SMALL_CELL
    lane = int(rng.integers(0, lanes))
    shares = np.full(len(KINDS), 1 / len(KINDS))
    places = _places(rng, height // cell, width // cell, int(rng.integers(3, 6)))
    others = [place for place in places if (place[0] if dx else place[1]) != lane]
    things = [_thing(rng, shares, split, place) for place in [(lane, lane), *others]]
    still, size = soft_background(rng, height, width), 15
    for thing, strokes in things[1:]:
        paint(
            rng,
            still,
            coverage(rng, thing.kind, strokes, size),
            COLORS[thing.color],
            thing.column * cell,
            thing.row * cell,
        )
    mover, strokes = things[0]
    alpha = coverage(rng, mover.kind, strokes, size)
    room = (width if dx else height) - size
    step = min(rng.uniform(5, 9), room / max(1, frames - 1))
    start = rng.uniform(0, room - step * (frames - 1))
    pictures = []
    for index in range(frames):
        along = round(start + step * index)
        along = along if dx + dy > 0 else room - along
        canvas = still.copy()
        paint(rng, canvas, alpha, COLORS[mover.color], along if dx else lane * cell, lane * cell if dx else along)
        pictures.append(noisy(rng, canvas))
    return Clip(np.stack(pictures), tuple(thing for thing, _ in things), direction)


def _places(rng: np.random.Generator, rows: int, columns: int, count: int) -> list[tuple[int, int]]:
    """Free cells; every second one beside a taken one, so that things have neighbours to ask about."""
    places: list[tuple[int, int]] = []
    while len(places) < min(count, rows * columns):
        place = (int(rng.integers(rows)), int(rng.integers(columns)))
        if places and rng.random() < 0.5:
            row, column = places[int(rng.integers(len(places)))]
            place = (row, column + int(rng.choice([-1, 1])))
        if 0 <= place[1] < columns and place not in places:
            places.append(place)
    return places


def _thing(
    rng: np.random.Generator, shares: NDArray[np.float64], split: Split, place: tuple[int, int]
) -> tuple[Thing, NDArray[np.float32] | None]:
    kind, color = KINDS[int(rng.choice(len(KINDS), p=shares))], str(rng.choice(list(COLORS)))
    if kind != "digit":
        return Thing(kind, color, -1, *place), None
    images, classes = digit_images(split)
    chosen = int(rng.integers(len(classes)))
    return Thing(kind, color, int(classes[chosen]), *place), images[chosen]
