"""Places of patches of 8 pixels in tiles of 64: the models of `examples/train_tiny`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from drawing import Pixels, Spot, painted, texture


def tiles(height: int, width: int, row: int, column: int) -> Spot:
    """A patch of 8 pixels in the mosaic of tiles of 64 pixels; the base view has 64 tokens, a row one newline."""
    tile_row, tile_column = row // 8 * 64, column // 8 * 64
    box = (row * 8, column * 8, row * 8 + 8, column * 8 + 8)
    token = 64 + row * (width // 8 + 1) + column
    around = (tile_row, tile_column, tile_row + 64, tile_column + 64)
    place = row % 8 * 8 + column % 8
    return Spot((painted(texture(height, width), box),), (), place, token, box, around, height)


def in_the_middle() -> Spot:
    """100 x 70 becomes 128 x 90 in the middle of 128 x 128; stock keeps 12 columns of patches from the third on.

    The red patch is number (6, 5) of the mosaic: from (48, 40) on, and from (48, 21) on without padding. It is
    painted larger than it is, so that resizing leaves all of it red.
    """
    image = painted(texture(100, 70), (34, 13, 47, 26))
    return Spot(
        (image,), (), 6 * 8 + 5, 64 + 6 * 13 + 3, (48, 21, 56, 29), (0, 0, 64, 45), 128, larger=True, height=128
    )


def second(stage: str) -> Spot:
    del stage
    images = (texture(64, 128), painted(texture(64, 64, 1), (16, 48, 24, 56)))
    return Spot(images, (), 2 * 8 + 6, 2 * 8 + 6, (16, 48, 24, 56), (0, 0, 64, 64), None, 1)


def video(stage: str) -> Spot:
    """Frame 2 of 4; pooling makes one token of 2 x 2 patches, 16 of a frame."""
    frames = np.stack([texture(64, 64, seed) for seed in range(4)])
    box = (32, 16, 40, 24) if stage == "vision" else (32, 16, 48, 32)
    frames[2] = painted(frames[2], box)
    return Spot((), (frames,), 4 * 8 + 2, 2 * 16 + 2 * 4 + 1, box, (0, 0, 64, 64), frame=2)


def squared(picture: Pixels) -> Pixels:
    """A picture in the middle of a grey square."""
    side = max(picture.shape[:2])
    top, left = (side - picture.shape[0]) // 2, (side - picture.shape[1]) // 2
    square = np.full((side, side, 3), 127, np.uint8)
    square[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return square


SPOTS: dict[str, Callable[[str], Spot]] = {
    "64x64": lambda _: tiles(64, 64, 7, 0),
    "64x128": lambda _: tiles(64, 128, 3, 13),
    "128x64": lambda _: tiles(128, 64, 14, 2),
    "128x128": lambda _: tiles(128, 128, 9, 4),
    "padded": lambda _: in_the_middle(),
    "two images": second,
    "video": video,
}
