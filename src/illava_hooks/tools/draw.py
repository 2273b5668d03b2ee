"""Pictures of a merge: what is left of an image after each merging layer, and who took up the rest.

Where tokens lie is never computed here. A second forward with the library's own provenance, one that merges nothing
before the language model, tells which patches each token of the prompt shows.

Shapes: ``P`` source patches of one image or video, ``K`` survivors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from illava_hooks.api import patch, session_of, unpatch
from illava_hooks.config import MergeConfig, Modality
from illava_hooks.engine.finding import find_family
from illava_hooks.engine.install import install
from illava_hooks.engine.modules import unwrapped
from illava_hooks.engine.provenance import Provenance, TokenProvenance
from illava_hooks.engine.session import MergeSession
from illava_hooks.errors import InputError, MergeConfigError, PatchStateError
from illava_hooks.tools.canvas import Frame, Ints, compose, paint, sharpened, tabulate, tagged, visuals_of

__all__ = ["MergeMap", "animation", "draw", "map_captions", "merge_maps", "save_maps", "strip"]

#: A forward whose language model starts with all tokens.
WHOLE: dict[str, Any] = {"vit_layers": [], "vit_r": 0, "llm_layers": [1], "llm_ratio": 0.5, "method": "fastv"}
LEAST_PIXELS = 512  # of a picture's longer side
SHEET_COLUMNS, FRAME_MS = 8, 400
#: Widths in pixels: of a strip, which then goes on in the next row, of a picture in it, and of one in a contact sheet.
STRIP_WIDTH, CELL_WIDTH, SHEET_CELL = 1600, 780, 320


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


def merge_maps(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    originals: Sequence[Image.Image] = (),
    *,
    config: MergeConfig | None = None,
    **settings: Any,
) -> list[MergeMap]:
    """Runs a model on one prompt with and without merging and maps what happened.

    Args:
        model: an unpatched model; it is unpatched again afterwards.
        processor: the processor that made the inputs.
        inputs: a batch of one sample.
        originals: the images, or the frames of the one video, as they were before the processor resized them: they
            are drawn instead of what the encoder looked at.
        config: the settings of a session, in place of arguments.
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
    visuals = [
        (modality, _sharpened(frames, originals[number:] if modality == "image" else originals))
        for number, (modality, frames) in enumerate(visuals_of(model, processor, inputs))
    ]
    modalities = [modality for modality, _ in visuals]
    begin = partial(patch, **settings) if config is None else partial(_begin, config=config)
    config, provenance = _forward(model, inputs, modalities, partial(begin, model))
    if not provenance.merges:
        return []
    whole = _forward(model, inputs, modalities, partial(patch, model, **WHOLE))[1].at("language", 0).images
    group = find_family(unwrapped(model)).encoder_shape(unwrapped(model)).patches_per_unit
    schedules, maps = [config.schedule(modality) for modality in modalities], []
    encoder = [schedule.vit_layers if schedule.merges_in_encoder else () for schedule in schedules]
    for visual, (modality, frames) in enumerate(visuals):
        cells, schedule = whole[visual].weights, schedules[visual]
        patches = np.arange(cells.shape[1])
        for layer in encoder[visual]:
            found, units = provenance.at("vision", layer).images[visual], patches // group
            drawn = (frames, units, _keepers(units, found, group))
            maps.append(MergeMap("vision", layer, visual, modality, len(found.seats), len(patches), *drawn))
        for layer in schedule.llm_layers if schedule.merges_in_llm else ():
            found, units = provenance.at("language", layer).images[visual], _heaviest(cells)
            drawn = (frames, units, _keepers(units, found, 1))
            maps.append(MergeMap("language", layer, visual, modality, len(found.seats), cells.shape[0], *drawn))
    return maps


def draw(map: MergeMap, dim: float = 0.25, colours: bool = False, columns: int = 1) -> list[Image.Image]:
    """Draws one map: one picture per frame, an image has one.

    Args:
        map: what to draw.
        dim: how much of a merged-away patch is left, in [0, 1].
        colours: tint each merged-away patch in the colour of the survivor that took up most of it, and outline
            that survivor in it; patches that are lost stay dimmed.
        columns: how many pictures are to stand side by side; the more, the smaller they can be.
    """
    scale, table = _scale(map, columns), (map.units, map.keepers)
    # As thin as can be seen: two pixels of the least picture, more of a large one.
    width = max(min(2, scale), scale * map.frames[0][-1].labels.shape[0] // 400)
    return [paint(compose(frame, scale), *table, dim, colours, width) for frame in map.frames]


def strip(maps: Sequence[MergeMap], colours: bool = False) -> Image.Image:
    """One image, or the first frame of a video: the input, then what is left after each layer, in rows.

    Args:
        maps: of one image or video.
        colours: as for ``draw``.
    """
    first = maps[0].frames[0]
    untouched = Image.fromarray(compose(first, _scale(maps[0])).pixels)
    named = len(first) == 2
    pictures = [_within(one, CELL_WIDTH) for one in (untouched, *(draw(map, colours=colours)[0] for map in maps))]
    if named:
        pictures[0] = tagged(pictures[0], ("overview", "tiles"))
    captions = ["input: the same picture as overview and as tiles" if named else "input", *map_captions(maps)]
    columns = max(1, min(len(pictures), STRIP_WIDTH // max(picture.width for picture in pictures)))
    return tabulate(pictures, columns, captions)


def map_captions(maps: Sequence[MergeMap]) -> list[str]:
    """What each map shows, in words."""
    words = {"vision": ("encoder", "patches"), "language": ("decoder", "tokens")}
    return [
        f"{words[map.stage][0]} layer {map.layer}: {map.kept} of {map.total} {words[map.stage][1]} left"
        for map in maps
    ]


def animation(maps: Sequence[MergeMap], file: IO[bytes]) -> None:
    """Writes all frames of a video after its last merge, with colours, as a moving GIF."""
    first, *rest = [_within(picture, CELL_WIDTH) for picture in draw(maps[-1], colours=True)]
    first.save(file, "GIF", save_all=True, append_images=rest, duration=FRAME_MS, loop=0)
    file.seek(0)


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
            columns = min(SHEET_COLUMNS, len(map.frames))
            sheet = pictures if columns == 1 else [_sheet(map, columns, colours)]
            name = f"{start}-{map.stage}-layer{map.layer:02d}-{map.kept}of{map.total}.png"
            paths.append(_save(sheet, folder / name))
        paths.append(_save([strip(mine, colours)], folder / f"{start}-strip.png"))
        if mine[-1].modality == "video":
            paths.append(_save(drawn[-1], folder / f"{start}-animated.gif"))
    return paths


def _forward(
    model: Any, inputs: Mapping[str, Any], modalities: Sequence[Modality], begin: Callable[..., MergeSession]
) -> tuple[MergeConfig, Provenance]:
    """The configuration and the provenance of one forward that ``begin`` patches; empty where nothing merges."""
    try:
        session = begin(track=True)
        config = session.config
        if config.method.layout == "compact" or config.method.is_published:
            raise MergeConfigError(
                f"method is {config.method.name!r}, whose survivors move to the front; use one with layout 'aligned'"
            )
        if all(config.schedule(modality).is_identity for modality in modalities):
            return config, Provenance()
        with torch.inference_mode():
            model(**inputs, logits_to_keep=1)
            return config, session.provenance
    finally:
        unpatch(model)


def _begin(model: Any, config: MergeConfig, track: bool) -> MergeSession:
    """Patches with settings that have been checked."""
    family = find_family(model)
    return install(family, family.locate(model), replace(config, track=track), model)


def _sharpened(frames: tuple[Frame, ...], originals: Sequence[Image.Image]) -> tuple[Frame, ...]:
    """Frames with the pixels of their originals; an encoder that takes two frames at once shows every other one."""
    if not originals:
        return frames
    given = originals if len(frames) > 1 else originals[:1]
    return tuple(sharpened(frame, given[index * len(given) // len(frames)]) for index, frame in enumerate(frames))


def _within(picture: Image.Image, width: int) -> Image.Image:
    """A picture that is too wide made smaller."""
    if picture.width <= width:
        return picture
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)


def _sheet(map: MergeMap, columns: int, colours: bool) -> Image.Image:
    """All frames of a video in rows."""
    return tabulate([_within(one, SHEET_CELL) for one in draw(map, colours=colours, columns=columns)], columns)


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


def _scale(map: MergeMap, columns: int = 1) -> int:
    height = map.frames[0][-1].labels.shape[0]
    width = sum(round(view.labels.shape[1] * height / view.labels.shape[0]) for view in map.frames[0])
    return int(-(-LEAST_PIXELS // max(height, width * columns)))


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
