"""Questions to tune with: a folder of pictures, a file with JSON lines, or drawn scenes; no answers are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from illava_hooks.errors import InputError
from illava_hooks.tools.datasets import clip_items, pair_items, read_items, scene_items
from illava_hooks.tools.evaluate.fingerprint import digest, shown
from illava_hooks.tools.items import Item, make_item
from illava_hooks.tools.loading import QUESTION
from illava_hooks.tools.media import load_media

__all__ = ["SUITES", "Choice", "read_choice"]

#: Questions with a name: of the validation split, since what is chosen on test questions cannot be measured on them.
SUITES: Mapping[str, Callable[[int], list[Item]]] = {
    "scenes": lambda count: scene_items(count, "validation"),
    "pairs": lambda count: pair_items(count, "validation"),
    "clips": lambda count: clip_items(count, "validation"),
}
#: Questions to each picture of a suite, and how many a suite must be asked for to hold as many pictures.
_EACH, _ASKED = 2, 5


class Choice:
    """The questions, in the order of the search, and those behind them that it does not see.

    Attributes:
        items: all of them, without answers; those of one picture stay together.
        seen: how many are searched with, from the first.
        pictures: how many pictures (prompts' worth) that are, and how many it does not see.
    """

    def __init__(self, items: Sequence[Item], pictures: int | None, seed: int, each: int | None = None) -> None:
        """Shuffles pictures, and holds a quarter of them out.

        Args:
            items: what is asked.
            pictures: how many of them at most, from the first; None: all.
            seed: of the order.
            each: questions to a picture at most, other kinds than to the picture before; None: all.

        Raises:
            InputError: there are fewer than two different pictures.
        """
        groups: dict[str, list[Item]] = {}
        for item in items:
            groups.setdefault(digest(shown(item)), []).append(replace(item, answer=None, others=()))
        names = list(groups)[:pictures]
        if each is not None:
            for place, name in enumerate(names):
                asked = groups[name]
                groups[name] = [asked[(place + number) % len(asked)] for number in range(min(each, len(asked)))]
        if len(names) < 2:
            raise InputError(
                f"items show {len(names)} picture{'s' * (len(names) != 1)}, and tuning needs 2 or more: what is "
                "chosen on some is measured on others; give more"
            )
        order = np.random.default_rng([seed, len(names)]).permutation(len(names))
        held = max(1, len(names) // 4)
        parts = [[groups[names[index]] for index in part] for part in (order[held:], order[:held])]
        searched = [item for group in parts[0] for item in group]
        self.items = [*searched, *(item for group in parts[1] for item in group)]
        self.seen = len(searched)
        self.pictures = len(parts[0]), len(parts[1])


def read_choice(
    items: str | Path | Iterable[Item | Mapping[str, Any]],
    question: str | Sequence[str] | None,
    pictures: int | None,
    seed: int,
    tell: Callable[[str], None],
    default: str = QUESTION,
) -> Choice:
    """Reads what the user gave.

    Args:
        items: a folder of images and videos, a file with JSON lines, a key of ``SUITES``, or items.
        question: one or more, to every picture of a folder.
        pictures: how many at most; None: 200 of a folder or a suite, all of the others.
        seed: of what is taken of a folder that has more, and of the order.
        tell: is told what was left out.
        default: what is asked about a folder when nothing is asked.

    Raises:
        InputError: there is nothing to read, or an argument fits nothing.
    """
    if pictures is not None and pictures < 2:
        raise InputError(f"pictures is {pictures}; give 2 or more")
    asked = [question] if isinstance(question, str) else list(question or [])
    if any(not text.strip() for text in asked):
        raise InputError("question is empty; write one, or leave it out")
    if isinstance(items, str | Path):
        path = Path(items)
        if not str(items).strip():
            raise InputError(
                f"items is {str(items)!r}; give a folder, a file with JSON lines, or one of {list(SUITES)}"
            )
        if path.is_dir():
            found = _folder(path, asked or [default], pictures or 200, seed, tell)
            if not asked:
                tell(f"no question was given, so each picture is asked {default!r}; your own tune better")
            return Choice(found, None, seed)
        if asked:
            raise InputError(
                f"question is given and items is {str(items)!r}, which has its own; leave one of them out"
            )
        if str(items) in SUITES:
            count = 200 if pictures is None else pictures
            return Choice(SUITES[str(items)](count * _ASKED), count, seed, _EACH)
        if not path.exists():
            raise InputError(
                f"items is {str(items)!r}; give a folder of images or videos, a file with JSON lines, or one of "
                f"{list(SUITES)}"
            )
        return Choice(read_items(path), pictures, seed)
    if asked:
        raise InputError("question is given and items have their own; leave one of them out")
    given = [one if isinstance(one, Item) else make_item(one, f"item {n}") for n, one in enumerate(items)]
    return Choice(given, pictures, seed)


def _folder(folder: Path, questions: Sequence[str], most: int, seed: int, tell: Callable[[str], None]) -> list[Item]:
    """Every image or video of a folder for itself; what cannot be read is left out and told."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    if len(files) > most:
        tell(f"{folder} has {len(files)} files, of which {most} are taken by chance; see pictures")
        chosen = np.random.default_rng([seed, len(files)]).permutation(len(files))[:most]
        files = [files[index] for index in sorted(chosen)]
    items: list[Item] = []
    broken: list[str] = []
    for file in files:
        try:
            media = load_media(file)
        except InputError as error:
            broken.append(str(error))
            continue
        video = media.kind == "video"
        pictures = (media.frames,) if video else tuple(np.array(image) for image in media.images)
        items += [Item(media.kind, pictures, video, question) for question in questions]
    if broken:
        tell(f"{len(broken)} of {len(files)} files are left out; the first: {broken[0]}")
    if not items:
        raise InputError(f"items is {str(folder)!r}, in which no image and no video can be read; give another folder")
    return items
