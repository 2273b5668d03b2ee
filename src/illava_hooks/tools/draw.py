"""Pictures of a merge: what is left of an image after each merging layer, and who took up the rest.

Where tokens lie is never computed here. A second forward with the library's own provenance, one that merges nothing
before the language model, tells which patches each token of the prompt shows.

Shapes: ``P`` source patches of one image or video, ``K`` survivors, ``n`` tokens in the prompt.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from illava_hooks.api import patch, session_of, unpatch
from illava_hooks.config import MergeConfig
from illava_hooks.errors import InputError, MergeConfigError, PatchStateError
from illava_hooks.runtime.provenance import Provenance, TokenProvenance
from illava_hooks.schedules import Modality
from illava_hooks.tools.canvas import PAPER, Frame, Ints, compose, paint, visuals_of

__all__ = ["MergeMap", "draw", "merge_maps", "save_maps"]

#: A forward whose language model starts with all tokens.
WHOLE: dict[str, Any] = {"vit_layers": [], "vit_r": 0, "llm_layers": [1], "llm_ratio": 0.5, "method": "fastv"}

LEAST_PIXELS = 512  # of a picture's longer side
SHEET_COLUMNS, MARGIN, FRAME_MS = 8, 6, 400


@dataclass(frozen=True, slots=True, eq=False)
class MergeMap:
    """One image or video after one merging layer.

    Attributes:
        stage: the vision encoder or the language model.
        layer: the merging layer.
        visual: which image or video of the prompt; images first, then videos.
        modality: ``"image"`` or ``"video"``.
        kept: tokens left: patches in the encoder, tokens of the prompt (newlines too) in the language model.
        total: tokens before the first merge.
        frames: what the encoder looked at.
        units: ``(P,)``, what each patch is part of: a patch or 2x2 group in the encoder, a token of the prompt in
            the language model; -1 where the prompt does not show it.
        keepers: ``(P,)``, the surviving unit that stands for each patch: its own if it is kept, -1 if it is lost.
    """

    stage: Literal["vision", "language"]
    layer: int
    visual: int
    modality: Modality
    kept: int
    total: int
    frames: tuple[Frame, ...]
    units: Ints
    keepers: Ints

    @property
    def caption(self) -> str:
        """In a few words."""
        return f"{self.stage} {self.layer}: {self.kept} of {self.total}"


def merge_maps(model: Any, processor: Any, inputs: Mapping[str, Any], **settings: Any) -> list[MergeMap]:
    """Runs a model on one prompt with and without merging and maps what happened.

    Args:
        model: an unpatched model; it is unpatched again afterwards.
        processor: the processor that made the inputs.
        inputs: a batch of one sample.
        **settings: arguments of ``patch``.

    Returns:
        One map per image or video, stage and merging layer, in this order; none where nothing merges.

    Raises:
        PatchStateError: the model is patched.
        InputError: the batch has several samples.
        MergeConfigError: a setting is outside of its range, or survivors do not stay where they are.
    """
    if session_of(model) is not None:
        raise PatchStateError(f"model {type(model).__name__} is patched; call unpatch(model) first")
    if len(inputs["input_ids"]) != 1:
        raise InputError(f"inputs has {len(inputs['input_ids'])} samples; give a batch of one")
    visuals = visuals_of(model, processor, inputs)
    modalities = [modality for modality, _ in visuals]
    config, provenance = _forward(model, inputs, modalities, settings)
    if not provenance.merges:
        return []
    whole = _forward(model, inputs, modalities, WHOLE)[1].at("language", 0).images
    # Qwen2-VL's 2x2 groups merge as one.
    group = getattr(model.config.vision_config, "spatial_merge_size", 1) ** 2
    maps = []
    for visual, (modality, frames) in enumerate(visuals):
        cells, schedule = whole[visual].weights, config.schedule(modality)
        patches = np.arange(cells.shape[1])
        for layer in schedule.vit_layers if schedule.merges_in_encoder else ():
            # Provenance lists only the images and videos that merge in this layer.
            place = sum(_merges(config, other, layer) for other in modalities[:visual])
            found = provenance.at("vision", layer).images[place]
            units, keepers = patches // group, _keepers(patches // group, found, group)
            size = len(found.seats), len(patches)
            maps.append(MergeMap("vision", layer, visual, modality, *size, frames, units, keepers))
        for layer in schedule.llm_layers if schedule.merges_in_llm else ():
            found = provenance.at("language", layer).images[visual]
            units, size = _heaviest(cells), (len(found.seats), cells.shape[0])
            keepers = _keepers(units, found, 1)
            maps.append(MergeMap("language", layer, visual, modality, *size, frames, units, keepers))
    return maps


def draw(map: MergeMap, dim: float = 0.25, colours: bool = False) -> list[Image.Image]:
    """Draws one map: one picture per frame, an image has one.

    Args:
        map: what to draw.
        dim: how much of a merged-away patch is left, in [0, 1].
        colours: tint each merged-away patch in the colour of the survivor that took up most of it, and outline
            that survivor in it; patches that are lost stay dimmed.

    Raises:
        MergeConfigError: ``dim`` is outside of its range.
    """
    if not 0 <= dim <= 1:
        raise MergeConfigError(f"dim is {dim!r}; it must be in [0, 1], the brightness left of merged-away patches")
    return [_picture(map, frame, _scale(frame), dim, colours) for frame in map.frames]


def save_maps(maps: Sequence[MergeMap], folder: Path, stem: str, colours: bool = False) -> list[Path]:
    """Writes for each image and video one file per map, and all layers side by side; videos move, too.

    A map of a video is a contact sheet of its frames; the strip shows its first frame, the animation all frames
    after the last merge. Images and videos are numbered from 1 where there are several.

    Args:
        maps: as ``merge_maps`` returns them.
        folder: where to; it is made if need be.
        stem: how the names start.
        colours: as for ``draw``.

    Returns:
        The files, each of them complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    visuals = sorted({map.visual for map in maps})
    paths = []
    for visual in visuals:
        mine = [map for map in maps if map.visual == visual]
        start = f"{stem}-{visual + 1}" if len(visuals) > 1 else stem
        drawn = [draw(map, colours=colours) for map in mine]
        for map, pictures in zip(mine, drawn, strict=True):
            picture = pictures[0] if map.modality == "image" else _sheet(map, colours)
            name = f"{start}-{map.stage}-layer{map.layer:02d}-{map.kept}of{map.total}.png"
            paths.append(_save([picture], folder / name))
        first = mine[0].frames[0]
        untouched = Image.fromarray(compose(first, _scale(first)).pixels)
        captions = ["input", *(map.caption for map in mine)]
        strip = _strip(captions, [untouched, *(pictures[0] for pictures in drawn)])
        paths.append(_save([strip], folder / f"{start}-strip.png"))
        if mine[-1].modality == "video":
            paths.append(_save(drawn[-1], folder / f"{start}-animated.gif"))
    return paths


def _forward(
    model: Any, inputs: Mapping[str, Any], modalities: Sequence[Modality], settings: Mapping[str, Any]
) -> tuple[MergeConfig, Provenance]:
    """The configuration and the provenance of one patched forward; empty where nothing merges."""
    try:
        session = patch(model, **{**settings, "track": True})
        config = session.config
        if config.method.layout == "compact" or config.method.is_published:
            raise MergeConfigError(
                f"method is {config.method.name!r}, which moves survivors to the front as published, so they have no "
                "place in the picture; use a method with layout 'aligned' and no published score"
            )
        if all(config.schedule(modality).is_identity for modality in modalities):
            return config, Provenance()
        with torch.inference_mode():
            model(**inputs, logits_to_keep=1)
        return config, session.provenance
    finally:
        unpatch(model)


def _merges(config: MergeConfig, modality: Modality, layer: int) -> bool:
    schedule = config.schedule(modality)
    return schedule.merges_in_encoder and layer in schedule.vit_layers


def _keepers(units: Ints, found: TokenProvenance, group: int) -> Ints:
    """``(P,)``: the surviving unit of each patch, -1 where there is none."""
    survivors = found.seats.numpy() // group
    taker = _heaviest(found.weights)
    return np.where(np.isin(units, survivors), units, np.where(taker >= 0, survivors[taker], -1))


def _heaviest(weights: Tensor) -> Ints:
    """``(P,)``: the row of a sparse ``(K, P)`` that weighs most in each column, the first on a tie, -1 for none."""
    rows, columns = weights.indices().numpy()
    order = np.lexsort((-rows, weights.values().numpy()))
    best = np.full(weights.shape[1], -1)
    best[columns[order]] = rows[order]  # the last one written stays
    return best


def _scale(frame: Frame, side_by_side: int = 1) -> int:
    """The factor that makes so many pictures of a frame large enough."""
    height, width = frame[-1].labels.shape
    width += height if len(frame) > 1 else 0  # the base view is square
    return math.ceil(LEAST_PIXELS / max(height, width * side_by_side))


def _picture(map: MergeMap, frame: Frame, scale: int, dim: float, colours: bool) -> Image.Image:
    return paint(compose(frame, scale), map.units, map.keepers, dim, colours, min(2, scale))


def _sheet(map: MergeMap, colours: bool) -> Image.Image:
    """All frames of a video in rows."""
    columns = min(SHEET_COLUMNS, len(map.frames))
    scale = _scale(map.frames[0], columns)
    pictures = [_picture(map, frame, scale, 0.25, colours) for frame in map.frames]
    width, height = (side + MARGIN for side in pictures[0].size)
    sheet = Image.new("RGB", (width * columns - MARGIN, height * -(-len(pictures) // columns) - MARGIN), (PAPER,) * 3)
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * width, number // columns * height))
    return sheet


def _strip(captions: Sequence[str], pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side, each above its caption."""
    font = ImageFont.load_default()
    boxes = [font.getbbox(caption) for caption in captions]
    widths = [max(picture.width, math.ceil(box[2])) for picture, box in zip(pictures, boxes, strict=True)]
    high, text = max(picture.height for picture in pictures), math.ceil(max(box[3] for box in boxes))
    size = (sum(widths) + MARGIN * (len(widths) - 1), high + text + 2 * MARGIN)
    strip, x = Image.new("RGB", size, (PAPER,) * 3), 0
    pen = ImageDraw.Draw(strip)
    for caption, picture, width in zip(captions, pictures, widths, strict=True):
        strip.paste(picture, (x, 0))
        pen.text((x, high + MARGIN), caption, fill=(0, 0, 0), font=font)
        x += width + MARGIN
    return strip


def _save(pictures: Sequence[Image.Image], path: Path) -> Path:
    """Writes one picture, or several as an animation; the name appears with the complete file only."""
    kind = path.suffix[1:].upper()
    moving = {"save_all": True, "append_images": list(pictures[1:]), "duration": FRAME_MS, "loop": 0}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        pictures[0].save(part, format=kind, **(moving if kind == "GIF" else {}))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
