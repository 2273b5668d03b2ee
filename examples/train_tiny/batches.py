"""Training batches: pictures, packed questions, and what every patch shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from models import PATCH, QWEN_PATCH, TILE
from numpy.typing import NDArray
from torch import Tensor

from illava_hooks.tiny.questions import QUESTION_KINDS, Question, ask_clip, ask_pair, ask_scene
from illava_hooks.tiny.scenes import COLORS, KINDS, Scene, Split, draw_clip, draw_scene

IGNORE = -100
SIZES = ((64, 64), (64, 128), (128, 64), (128, 128))
#: What a patch is asked in the dense loss, with the number of classes; 0 is "nothing" for class, left and right.
HEADS = {"class": 6, "color": 6, "digit": 10, "left": 6, "right": 6}
#: Kinds of questions by how often they are asked in the second phase.
KINDS_ASKED = (*QUESTION_KINDS, "digit", "relation", "relation", "count")


@dataclass
class Batch:
    """One step's data; all rows have pictures of equal sizes.

    Attributes:
        prompt: ids of the common prefix with expanded placeholders, (prefix,).
        pixels: what the stock feature method takes.
        video: whether the pictures are a video.
        questions: per row.
        targets: per head, (patches,), in the order of the encoder's output; empty where there is no dense loss.
    """

    prompt: Tensor
    pixels: dict[str, Tensor]
    video: bool
    questions: list[list[Question]]
    targets: dict[str, Tensor]
    extra: dict[str, Tensor]


def image_batch(
    processor: Any,
    rng: np.random.Generator,
    rows: int,
    size: tuple[int, int],
    split: Split = "train",
    asked: int = 10,
    digit_share: float | None = None,
    kinds: Sequence[str] = KINDS_ASKED,
) -> Batch:
    """One image a row, ten questions an image."""
    scenes = [draw_scene(rng, *size, split, digit_share=digit_share) for _ in range(rows)]
    questions = []
    for scene in scenes:
        wanted = rng.permutation(np.resize(np.array(kinds), asked)) if asked else ()
        found = [ask_scene(rng, scene, str(kind)) or ask_scene(rng, scene, "existence") for kind in wanted]
        questions.append([question for question in found if question])
    return _batch(processor, [[scene.pixels] for scene in scenes], questions, [[scene] for scene in scenes])


def pair_batch(processor: Any, rng: np.random.Generator, rows: int, split: Split = "train", asked: int = 10) -> Batch:
    """Two images a row."""
    size = SIZES[int(rng.integers(2))] if "qwen" in type(processor).__name__.lower() else (64, 64)
    pairs = [[draw_scene(rng, *size, split), draw_scene(rng, *size, split)] for _ in range(rows)]
    questions = [[ask_pair(rng, *pair) for _ in range(asked)] for pair in pairs]
    return _batch(processor, [[scene.pixels for scene in pair] for pair in pairs], questions, pairs)


def clip_batch(processor: Any, rng: np.random.Generator, rows: int, split: Split = "train", asked: int = 4) -> Batch:
    """One clip of 4, 6 or 8 frames a row."""
    frames = int(rng.choice([4, 6, 8]))
    clips = [draw_clip(rng, 64, 64, frames, split) for _ in range(rows)]
    questions = [[ask_clip(rng, clip) for _ in range(asked)] for clip in clips]
    return _batch(processor, [[clip.frames] for clip in clips], questions, None, video=True)


def picture_batch(processor: Any, pictures: Sequence[Any], questions: list[list[Question]]) -> Batch:
    """Pictures without known contents."""
    return _batch(processor, [[picture] for picture in pictures], questions, None)


def _batch(
    processor: Any,
    pictures: list[list[NDArray[np.uint8]]],
    questions: list[list[Question]],
    scenes: list[list[Scene]] | None,
    video: bool = False,
) -> Batch:
    sign = processor.video_token if video else processor.image_token
    if "qwen" in type(processor).__name__.lower():
        sign = f"<|vision_start|>{sign}<|vision_end|>"
    text = "<|im_start|>user " + sign * len(pictures[0])
    if video:
        pixels = processor.video_processor([row[0] for row in pictures], return_tensors="pt", device="cpu")
        first = processor(text=[text], videos=[pictures[0][0]], return_tensors="pt")
    else:
        many = pictures if len(pictures[0]) > 1 else [row[0] for row in pictures]
        flat = many if "llava" in type(processor).__name__.lower() else [p for row in pictures for p in row]
        pixels = processor.image_processor(flat, return_tensors="pt")
        first = processor(text=[text], images=[pictures[0]], return_tensors="pt")
    targets = {} if scenes is None else _targets(processor, scenes)
    extra = {k: v for k, v in first.items() if k == "mm_token_type_ids" or k.endswith("_grid_thw")}
    return Batch(first["input_ids"][0], dict(pixels), video, questions, targets, extra)


def _targets(processor: Any, scenes: list[list[Scene]]) -> dict[str, Tensor]:
    llava = "llava" in type(processor).__name__.lower()
    views = []
    for row in scenes:
        for scene in row:
            crops = _llava_crops(scene, len(row) > 1) if llava else [_qwen_crop(scene)]
            views += [_labels(scene, crop, PATCH if llava else QWEN_PATCH) for crop in crops]
    if not llava:  # the encoder's order: 2x2 groups
        views = [
            {k: v.reshape(v.shape[0] // 2, 2, v.shape[1] // 2, 2).transpose(0, 2, 1, 3) for k, v in view.items()}
            for view in views
        ]
    return {head: torch.from_numpy(np.concatenate([view[head].reshape(-1) for view in views])) for head in HEADS}


def _resized(owner: NDArray[np.int8], height: int, width: int) -> NDArray[np.int8]:
    rows = ((np.arange(height) + 0.5) * owner.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * owner.shape[1] / width).astype(int)
    return owner[rows][:, columns]


def _llava_crops(scene: Scene, base_only: bool) -> list[NDArray[np.int8]]:
    """The owner map as the image processor cuts the picture: the squeezed base, then the tiles row by row."""
    base = _resized(scene.owner, TILE, TILE)
    if base_only:
        return [base]
    height, width = scene.owner.shape
    places = [(y, x) for y in range(0, height, TILE) for x in range(0, width, TILE)]
    return [base, *(scene.owner[y : y + TILE, x : x + TILE] for y, x in places)]


def _qwen_crop(scene: Scene) -> NDArray[np.int8]:
    height, width = scene.owner.shape
    factor = 2 * QWEN_PATCH
    return _resized(scene.owner, round(height / factor) * factor, round(width / factor) * factor)


def _labels(scene: Scene, owner: NDArray[np.int8], patch: int) -> dict[str, NDArray[np.int64]]:
    """What each patch shows; ``IGNORE`` where that is unclear or does not apply."""
    rows, columns = owner.shape[0] // patch, owner.shape[1] // patch
    ids = np.arange(1, len(scene.things) + 1)[:, None, None]
    cover = (owner[None] == ids).reshape(len(ids), rows, patch, columns, patch).mean((2, 4))
    most, thing = cover.max(0), cover.argmax(0)
    shown = most > 0.15
    seen = cover.sum((1, 2)) > 0.2
    table: dict[str, list[int]] = {head: [] for head in HEADS}
    for item in scene.things:
        table["class"].append(KINDS.index(item.kind) + 1)
        table["color"].append(list(COLORS).index(item.color))
        table["digit"].append(item.digit if item.digit >= 0 else IGNORE)
        for head, step in (("left", -1), ("right", 1)):
            beside = scene.beside(item, step)
            if beside is None:
                table[head].append(0)
            else:
                table[head].append(KINDS.index(beside.kind) + 1 if seen[scene.things.index(beside)] else IGNORE)
    labels = {head: np.where(shown, np.array(values)[thing], IGNORE) for head, values in table.items()}
    labels["class"][most < 0.02] = 0
    return labels
