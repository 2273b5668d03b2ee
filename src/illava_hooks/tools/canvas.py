"""What the encoder looked at, as pictures in which every pixel knows its source patch.

Shapes: ``H`` x ``W`` pixels of a view, ``P`` source patches.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from illava_hooks.config import Modality
from illava_hooks.engine.finding import find_family
from illava_hooks.engine.modules import unwrapped
from illava_hooks.errors import InputError

__all__ = [
    "Frame",
    "Ints",
    "Pixels",
    "View",
    "colour_of",
    "compose",
    "paint",
    "sharpened",
    "tabulate",
    "tagged",
    "visuals_of",
]

Pixels = NDArray[np.uint8]
Ints = NDArray[np.int64]

GAP, MARGIN, PAPER = 8, 6, 255  # between views of one image, between pictures, and their colour
DARK = 40  # merged-away patches fade into this grey
TINT = 0.6  # share of the survivor's colour in what it absorbed
LETTERS = 18  # pixels of captions
LEAST, MOST = 512, 1280  # pixels of the longer side of a picture that is drawn
#: How many times as long as thick a picture is drawn at most.
LONGEST = 10
#: How far, on average, a view may be from the original as the encoder would see it: of 255 steps of brightness.
SAME_PICTURE = 8.0


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A picture and whose pixels these are.

    Attributes:
        pixels: RGB, ``(H, W, 3)``.
        labels: ``(H, W)``, the source patch in encoder order; -1 between views.
    """

    pixels: Pixels
    labels: Ints


#: One image or frame: its view, or the base view and the mosaic of its tiles.
Frame = tuple[View, ...]


def visuals_of(model: Any, processor: Any, inputs: Mapping[str, Any]) -> list[tuple[Modality, tuple[Frame, ...]]]:
    """The frames of each image and video of one sample, images first.

    Args:
        model: a stock model of a supported family.
        processor: the processor that made the inputs; what it normalised with is taken back.
        inputs: its outputs.

    Raises:
        UnsupportedModelError: the model's family is not known.
        InputError: its family cannot be drawn.
    """
    model = unwrapped(model)
    family = find_family(model)
    pictures = family.pictures(model, inputs)
    if pictures is None:
        raise InputError(f"model is a {family.title or family.name}, which cannot be drawn; give another model")
    tools = {one.modality: getattr(processor, f"{one.modality}_processor") for one in pictures}
    colours = {modality: _colours(tool) for modality, tool in tools.items()}
    # Of a picture that is very long, tiles can be cut so far that no pixel is left of them: nobody looked at that.
    return [
        (
            one.modality,
            tuple(
                tuple(_view(view, *colours[one.modality]) for view in frame if view.numel()) for frame in one.frames
            ),
        )
        for one in pictures
    ]


def compose(frame: Frame, scale: int) -> View:
    """All views of a frame side by side, the last one magnified ``scale`` times and the others as high as it.

    Only copies pixels, never mixes them: the border of a patch stays where it is. What is longer than can be seen is
    drawn thicker than it is.
    """
    frame = tuple(map(_thickened, frame))
    height = scale * frame[-1].labels.shape[0]
    pixels, labels = [], []
    for number, view in enumerate(frame):
        if number:
            pixels.append(np.full((height, GAP, 3), PAPER, np.uint8))
            labels.append(np.full((height, GAP), -1))
        rows, columns = view.labels.shape
        width = round(columns * height / rows)
        row, column = np.arange(height) * rows // height, np.arange(width) * columns // width
        pixels.append(view.pixels[row][:, column])
        labels.append(view.labels[row][:, column])
    return View(np.concatenate(pixels, 1), np.concatenate(labels, 1))


def sharpened(frame: Frame, original: Image.Image) -> Frame:
    """The views with the pixels of the original picture, where they show all of it and nothing else.

    What the encoder looks at is small and often stretched. A view that was cropped or padded is told by its pixels:
    then the frame is returned as it is.

    Args:
        frame: what the encoder looked at.
        original: the picture before the processor resized it.
    """
    for view in frame:
        seen = original.resize(view.labels.shape[::-1], Image.Resampling.BICUBIC)
        if abs(np.asarray(seen, np.float64) - view.pixels).mean() > SAME_PICTURE:
            return frame
    side = max(original.size)
    scale = min(1.0, MOST / side) if side >= LEAST else math.ceil(LEAST / side)
    least = math.ceil(scale * side / LONGEST)  # of patches that lie in one row of pixels only the first could be seen
    width, height = (max(least, round(scale * length)) for length in original.size)
    sharp = original.resize((width, height), Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
    pixels, views = np.asarray(sharp, np.uint8), []
    for view in frame:
        rows, columns = view.labels.shape
        row, column = np.arange(height) * rows // height, np.arange(width) * columns // width
        views.append(View(pixels, view.labels[row][:, column]))
    return tuple(views)


def paint(view: View, units: Ints, keepers: Ints, dim: float, colours: bool, width: int) -> Image.Image:
    """Dims or tints the patches that were merged away.

    Args:
        view: the picture.
        units: ``(P,)`` what each patch is part of, -1 for nothing.
        keepers: ``(P,)`` the surviving unit that stands for it, -1 for none.
        dim: how much is left of a lost patch.
        colours: whether to show who took up what, each survivor in the colour of its first patch.
        width: pixels of a survivor's outline.
    """
    absorbing = np.unique(keepers[(keepers != units) & (keepers >= 0)])
    # What stands between views has label -1 and reads the last entry: kept by nobody, but not gone either.
    unit, keeper = (np.append(table, -1)[view.labels] for table in (units, keepers))
    gone = (view.labels >= 0) & ((unit != keeper) | (unit < 0))
    out = view.pixels.astype(np.float64)
    if colours:
        table = np.zeros((max(units, default=0) + 1, 3))
        table[units[::-1]] = [colour_of(patch) for patch in reversed(range(len(units)))]  # the first patch stays
        tinted, outlined = gone & (keeper >= 0), _border(unit, width) & np.isin(unit, absorbing) & ~gone
        out[tinted] += TINT * (table[keeper[tinted]] - out[tinted])
        out[outlined] = table[unit[outlined]]
        gone &= ~tinted
    out[gone] = dim * out[gone] + (1 - dim) * DARK
    return Image.fromarray(out.round().clip(0, 255).astype(np.uint8))


def colour_of(patch: int) -> tuple[int, int, int]:
    """The colour of the survivor whose first patch this is; neighbours differ by a golden section of the circle."""
    hue, saturation = patch * 0.6180339887 % 1, 0.65 + 0.35 * (patch * 0.7548776662 % 1)
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, 1.0))
    return red, green, blue


def tagged(picture: Image.Image, names: Sequence[str]) -> Image.Image:
    """A picture of views side by side, as ``compose`` makes it of one original, each with its name in its corner."""
    picture, font = picture.copy(), ImageFont.load_default(LETTERS)
    pen, width = ImageDraw.Draw(picture), (picture.width - GAP * (len(names) - 1)) / len(names)
    for number, name in enumerate(names):
        at = (round(number * (width + GAP)) + MARGIN, MARGIN)
        left, top, right, bottom = pen.textbbox(at, name, font=font)
        pen.rectangle((left - MARGIN, top - MARGIN, right + MARGIN, bottom + MARGIN), fill=(PAPER,) * 3)
        pen.text(at, name, fill=0, font=font)
    return picture


def tabulate(pictures: Sequence[Image.Image], columns: int, captions: Sequence[str] = ()) -> Image.Image:
    """Pictures of one height in rows, each above its caption."""
    font = ImageFont.load_default(LETTERS)
    boxes = [font.getbbox(caption) for caption in captions]
    text = math.ceil(max(box[3] for box in boxes)) + MARGIN if boxes else 0
    width = math.ceil(max([picture.width for picture in pictures] + [box[2] for box in boxes])) + MARGIN
    height, rows = pictures[0].height + text + MARGIN, math.ceil(len(pictures) / columns)
    table = Image.new("RGB", (width * columns - MARGIN, height * rows - MARGIN), (PAPER,) * 3)
    pen = ImageDraw.Draw(table)
    for number, picture in enumerate(pictures):
        x, y = number % columns * width, number // columns * height
        table.paste(picture, (x, y))
        if captions:
            pen.text((x, y + picture.height + MARGIN // 2), captions[number], fill=0, font=font)
    return table


def _thickened(view: View) -> View:
    """A view with its rows or columns repeated until it is at most ``LONGEST`` times as long as thick."""
    shape = view.labels.shape
    down, across = (math.ceil(max(shape) / (LONGEST * length)) for length in shape)
    return View(view.pixels.repeat(down, 0).repeat(across, 1), view.labels.repeat(down, 0).repeat(across, 1))


def _border(unit: Ints, width: int) -> NDArray[np.bool_]:
    """``(H, W)``: pixels with another unit at most ``width`` pixels up, down, left or right."""
    border, far = np.zeros(unit.shape, bool), np.pad(unit, width, constant_values=-2)
    height, across = unit.shape
    for step in range(1, width + 1):
        for row, column in ((-step, 0), (step, 0), (0, -step), (0, step)):
            y, x = width + row, width + column
            border |= far[y : y + height, x : x + across] != unit
    return border


def _colours(tool: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation that an image or video processor normalised with, ``(3, 1, 1)`` each."""
    mean, std = (tool.image_mean, tool.image_std) if tool.do_normalize else ([0.0] * 3, [1.0] * 3)
    return torch.tensor(mean).double().view(3, 1, 1), torch.tensor(std).double().view(3, 1, 1)


def _view(stack: Tensor, mean: Tensor, std: Tensor) -> View:
    """A view from ``(4, H, W)``: three normalised channels and the patch numbers."""
    pixels = ((stack[:3] * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return View(pixels.permute(1, 2, 0).contiguous().numpy(), stack[3].round().long().numpy())
