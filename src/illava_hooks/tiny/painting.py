"""How scenes are painted: background, noise, and how much of each pixel a thing covers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = ["coverage", "noisy", "paint", "soft_background"]


def soft_background(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """A soft texture: a few grey-ish blobs, blurred."""
    base = rng.uniform(50, 150) + rng.normal(0, 8, 3)
    blobs = np.clip(base + rng.normal(0, 10, (4, 4, 3)), 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC), np.float32)


def noisy(rng: np.random.Generator, canvas: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A finished canvas with the noise of a camera."""
    noise = rng.normal(0, 6, canvas.shape[:2])[..., None]
    return np.clip(canvas + noise, 0, 255).astype(np.uint8)


def paint(
    rng: np.random.Generator,
    canvas: NDArray[np.float32],
    alpha: NDArray[np.float32],
    color: tuple[int, int, int],
    x: int,
    y: int,
) -> None:
    """Paints a thing of about a colour, its upper left corner at (x, y)."""
    size = len(alpha)
    ink = np.array(color, np.float32) + rng.normal(0, 8, 3).astype(np.float32)
    part = canvas[y : y + size, x : x + size]
    part += (ink - part) * alpha[..., None]


def coverage(
    rng: np.random.Generator, kind: str, strokes: NDArray[np.float32] | None, size: int
) -> NDArray[np.float32]:
    """How much of each pixel a thing covers, (size, size) in [0, 1]."""
    if strokes is not None:
        ink = Image.fromarray((np.clip(strokes * 1.3, 0, 1) * 255).astype(np.uint8))
        return _unit(ink.resize((size, size), Image.Resampling.BICUBIC))
    scale = 4
    mask = Image.new("L", (size * scale, size * scale))
    pen, middle, turn = ImageDraw.Draw(mask), size * scale / 2, float(rng.uniform(-0.2, 0.2))
    if kind == "circle":
        pen.ellipse((scale, scale, (size - 1) * scale, (size - 1) * scale), fill=255)
    else:
        pen.polygon([(middle + x * middle, middle + y * middle) for x, y in _corners(kind, turn)], fill=255)
    return _unit(mask.resize((size, size), Image.Resampling.BOX))


def _unit(picture: Image.Image) -> NDArray[np.float32]:
    return np.asarray(picture).astype(np.float32) / np.float32(255)


def _corners(kind: str, turn: float) -> Sequence[tuple[float, float]]:
    """Corners of a shape in the unit disc; the square's stick out a little."""
    radii = {"square": [1.1] * 4, "triangle": [1.05] * 3, "star": [1.05, 0.45] * 5}[kind]
    first = math.pi / 4 if kind == "square" else -math.pi / 2
    angles = [first + turn + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
