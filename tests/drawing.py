"""Pictures of the merging: what goes in, the models that see it, and one token whose place is known by arithmetic."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from illava_hooks.tools.canvas import GAP
from illava_hooks.tools.draw import MergeMap, merge_maps

RED = (230, 10, 10)
Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # top, left, bottom, right


@cache
def stock(family: str) -> tuple[Any, Any]:
    """An untrained model as the recipe of the embedded ones builds it, and its processor."""
    with pytest.MonkeyPatch.context() as path:
        path.syspath_prepend(str(Path(__file__).parents[1] / "examples" / "train_tiny"))
        recipe: Any = importlib.import_module("models")
    return recipe.build_model(family, 0).eval(), recipe.build_processor(family)


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
    settings: dict[str, Any] = {
        "vit_layers": vit_layers,
        "vit_r": vit_r,
        "llm_layers": llm_layers,
        "llm_ratio": llm_ratio,
    }
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
        place: the encoder's position in its tile, slice or frame, in groups of patches that stay together.
        token: the place in the span of the prompt.
        box: in canvas pixels of the view that shows it.
        around: the tile that holds it.
        left: width of the base view before magnification, None where there is none.
        visual: which image or video.
        frame: which of its frames.
        segment: patches of its tile, slice or frame.
        larger: whether it is painted larger than it is.
        height: of the canvas before magnification, where pictures do not go in as they are.
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
    segment: int = 64
    larger: bool = False
    height: int | None = None

    def on(self, picture: Image.Image, box: Box) -> Box:
        """A box of the canvas in the drawn picture."""
        first = self.frame_left(picture)
        scale = self.scale(picture)
        return box[0] * scale, first + box[1] * scale, box[2] * scale, first + box[3] * scale

    def scale(self, picture: Image.Image) -> int:
        """How much a picture is magnified."""
        view = self.videos[0][0] if self.videos else self.images[-1]
        return picture.height // (self.height or len(view))

    def frame_left(self, picture: Image.Image) -> int:
        """Where the view that shows the token starts."""
        return 0 if self.left is None else self.left * self.scale(picture) + GAP


def painted(picture: Pixels, box: Box) -> Pixels:
    out = picture.copy()
    out[box[0] : box[2], box[1] : box[3]] = RED
    return out
