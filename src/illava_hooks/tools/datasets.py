"""Questions with known answers: held-out scenes of the embedded models, and easy-VQA."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from illava_hooks.errors import InputError
from illava_hooks.tiny.questions import QUESTION_KINDS, ask_clip, ask_pair, ask_scene
from illava_hooks.tiny.scenes import Split, draw_clip, draw_scene

__all__ = ["Item", "clip_items", "easy_vqa_items", "pair_items", "scene_items"]

SIZES = ((64, 64), (64, 128), (128, 64), (128, 128))
_SEEDS = {"train": 0, "validation": 10_000, "test": 20_000}


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One question about one prompt's pictures.

    Attributes:
        kind: what is asked for, such as "color".
        pictures: RGB arrays (H, W, 3) of the prompt's images, or one array (F, H, W, 3) of a video's frames.
        video: whether it is a video.
        question: the text.
        answer: one word.
    """

    kind: str
    pictures: tuple[NDArray[np.uint8], ...]
    video: bool
    question: str
    answer: str


def scene_items(count: int, split: Split = "test", cell: int | None = None) -> list[Item]:
    """Questions about single images, the same number of every kind, sizes in turn.

    Args:
        count: of all questions.
        split: whose seeds and digits.
        cell: 16 for small things only, 32 for large ones only.
    """
    wanted = {kind: count // len(QUESTION_KINDS) for kind in QUESTION_KINDS}
    items: list[Item] = []
    for index, rng in _generators(split, 1):
        if not any(wanted.values()):
            break
        scene = draw_scene(rng, *SIZES[index % len(SIZES)], split, cell)
        for kind in QUESTION_KINDS:
            question = ask_scene(rng, scene, kind) if wanted[kind] else None
            if question is not None:
                wanted[kind] -= 1
                items.append(Item(kind, (scene.pixels,), False, question.text, question.answer))
    return items


def pair_items(count: int, split: Split = "test") -> list[Item]:
    """Questions about two images in one prompt."""
    items = []
    for _, rng in zip(range(count), _only(_generators(split, 2)), strict=False):
        pair = draw_scene(rng, 64, 64, split), draw_scene(rng, 64, 64, split)
        question = ask_pair(rng, *pair)
        items.append(Item(question.kind, (pair[0].pixels, pair[1].pixels), False, question.text, question.answer))
    return items


def clip_items(count: int, split: Split = "test") -> list[Item]:
    """Questions about clips of 4, 6 and 8 frames: which way something moves."""
    items: list[Item] = []
    for index, rng in _generators(split, 3):
        if len(items) == count:
            break
        clip = draw_clip(rng, 64, 64, 4 + 2 * (index % 3), split)
        question = ask_clip(rng, clip)
        if question.kind == "motion":
            items.append(Item("motion", (clip.frames,), True, question.text, question.answer))
    return items


def easy_vqa_items(count: int | None = None) -> list[Item]:
    """The test split of easy-VQA (Victor Zhou, MIT), from the package ``easy-vqa``.

    Raises:
        InputError: the package is not installed.
    """
    try:
        import easy_vqa  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise InputError("easy-VQA is not installed; pip install easy-vqa") from error
    folder = Path(easy_vqa.__file__).parent / "data" / "test"
    questions = json.loads((folder / "questions.json").read_text())
    pictures: dict[int, NDArray[np.uint8]] = {}
    items = []
    for text, answer, image in questions[:count]:
        if image not in pictures:
            with Image.open(folder / "images" / f"{image}.png") as file:
                pictures[image] = np.asarray(file.convert("RGB"))
        items.append(Item("easy-VQA", (pictures[image],), False, text, answer))
    return items


def _generators(split: Split, stream: int) -> Iterator[tuple[int, np.random.Generator]]:
    """Random generators that no other split and no other stream has."""
    index = 0
    while True:
        yield index, np.random.default_rng([_SEEDS[split] + 7, stream, index])
        index += 1


def _only(numbered: Iterator[tuple[int, np.random.Generator]]) -> Iterator[np.random.Generator]:
    return (rng for _, rng in numbered)
