"""Places of groups of 2 x 2 patches of 6 pixels: the models of `examples/train_tiny`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from drawing import RED, Spot, painted, texture


def group(row: int, column: int, images: int, frames: int, height: int = 72, width: int = 96) -> Spot:
    """A group of 12 pixels in the last image, or in the second slice of two frames of a video."""
    box = (row * 12, column * 12, row * 12 + 12, column * 12 + 12)
    place, around, patches = row * (width // 12) + column, (0, 0, height, width), height * width // 36
    if frames:
        video = np.stack([texture(height, width, seed) for seed in range(frames)])
        video[2:4, box[0] : box[2], box[1] : box[3]] = RED
        return Spot((), (video,), place, height * width // 144 + place, box, around, frame=1, segment=patches)
    pictures = [texture(height, width, seed) for seed in range(images)]
    pictures[-1] = painted(pictures[-1], box)
    return Spot(tuple(pictures), (), place, place, box, around, visual=images - 1, segment=patches)


SPOTS: dict[str, Callable[[str], Spot]] = {
    "72x96": lambda _: group(4, 5, 1, 0),
    "132x60": lambda _: group(9, 1, 1, 0, 132, 60),
    "two images": lambda _: group(2, 7, 2, 0),
    "video": lambda _: group(1, 6, 0, 4),
}
