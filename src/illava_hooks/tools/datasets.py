"""Questions about pictures: held-out scenes of the embedded models, easy-VQA, and items of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from illava_hooks.errors import InputError
from illava_hooks.tiny.questions import QUESTION_KINDS, ask_clip, ask_pair, ask_scene
from illava_hooks.tiny.scenes import SMALL_CELL, Split, draw_clip, draw_scene
from illava_hooks.tools.items import Item, make_item

__all__ = ["SUITES", "Item", "clip_items", "easy_vqa_items", "load_items", "pair_items", "read_items", "scene_items"]

SIZES = ((64, 64), (64, 128), (128, 64), (128, 128))
_SEEDS = {"train": 0, "validation": 10_000, "test": 20_000}


def scene_items(count: int, split: Split = "test", cell: int | None = None) -> list[Item]:
    """Questions about single images, of every kind as many (or one more of the first kinds), sizes in turn.

    Args:
        count: of all questions.
        split: whose seeds and digits.
        cell: 16 for small things only, 32 for large ones only.
    """
    each, rest = divmod(count, len(QUESTION_KINDS))
    wanted = {kind: each + (number < rest) for number, kind in enumerate(QUESTION_KINDS)}
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
                pictures[image] = np.array(file.convert("RGB"))  # a copy: torch warns of memory that is read-only
        items.append(Item("easy-VQA", (pictures[image],), False, text, answer))
    return items


def read_items(file: Path, num_frames: int = 32) -> list[Item]:
    """Items of your own.

    Args:
        file: JSON lines with ``image`` (a path, a list of paths or a folder) or ``video`` (a path), ``question`` and,
            if you like, ``answer`` (or a list of all that are right) and ``kind``; paths are relative to the file,
            and may be absolute or lead out of its folder. Empty lines do not count.
        num_frames: frames taken of a video.

    Raises:
        InputError: the file, a line of it or a picture cannot be read.
    """
    if file.is_dir():
        raise InputError(
            f"items {str(file)!r} is a folder; give a file with JSON lines (tune takes a folder of pictures: what it "
            "compares needs no question of yours)"
        )
    try:
        data = file.read_bytes()
        text = data.decode(json.detect_encoding(data))  # UTF-8 or UTF-16, with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"items {str(file)!r} cannot be read ({error}); give a file with JSON lines") from error
    items = []
    # At line feeds only: JSON may hold the other line ends, such as U+2028, inside of a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where} is no item ({error}); write image or video, question and answer as JSON, one object a line"
            ) from error
        items.append(make_item(row, where, file.parent, file.stem, num_frames))
    if not items:
        raise InputError(f"items {str(file)!r} is empty; write one JSON object a line")
    return items


#: Suites with a name.
SUITES: dict[str, Callable[[int], list[Item]]] = {
    "scenes": scene_items,
    "small-scenes": lambda count: scene_items(count, cell=SMALL_CELL),
    "pairs": pair_items,
    "clips": clip_items,
    "easy-vqa": easy_vqa_items,
}


def load_items(name: str, count: int | None = None) -> list[Item]:
    """A suite by name, or the first items of a file with JSON lines.

    Args:
        name: a key of ``SUITES`` or a file.
        count: how many at most; None: 2,000 of a suite, all of a file.

    Raises:
        InputError: there is no such suite and no such file.
    """
    if count is not None and count < 1:
        raise InputError(f"questions is {count}; give 1 or more")
    if name in SUITES:
        return SUITES[name](2000 if count is None else count)
    if not Path(name).exists():
        raise InputError(f"items is {name!r}; choose one of {list(SUITES)} or give a file with JSON lines")
    return read_items(Path(name))[:count]


def _generators(split: Split, stream: int) -> Iterator[tuple[int, np.random.Generator]]:
    """Random generators that no other split and no other stream has."""
    index = 0
    while True:
        yield index, np.random.default_rng([_SEEDS[split] + 7, stream, index])
        index += 1


def _only(numbered: Iterator[tuple[int, np.random.Generator]]) -> Iterator[np.random.Generator]:
    return (rng for _, rng in numbered)
