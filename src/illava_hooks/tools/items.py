"""One question about the pictures of one prompt, and how it is read from what a user writes."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from illava_hooks.errors import InputError
from illava_hooks.tools.media import load_media

__all__ = ["Item", "make_item"]


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """One question about one prompt's pictures.

    Attributes:
        kind: what is asked for, such as "color".
        pictures: RGB arrays (H, W, 3) of the prompt's images, or one array (F, H, W, 3) of a video's frames.
        video: whether it is a video.
        question: the text.
        answer: what is right; None where nobody knows.
        others: what is right as well.
    """

    kind: str
    pictures: tuple[NDArray[np.uint8], ...]
    video: bool
    question: str
    answer: str | None = None
    others: tuple[str, ...] = ()

    @property
    def accepted(self) -> tuple[str, ...]:
        """All that is right; empty where nothing is known."""
        return self.others if self.answer is None else (self.answer, *self.others)


def make_item(row: object, where: str, folder: Path = Path(), kind: str = "", num_frames: int = 32) -> Item:
    """An item from the fields that ``read_items`` describes.

    Args:
        row: a mapping; fields of other names are left alone. In a program pictures may also be Pillow images or
            arrays, uint8 ``(H, W, 3)``, and a video one of ``(F, H, W, 3)``.
        where: what the message calls it, such as "mine.jsonl, line 3".
        folder: what relative paths count from.
        kind: of an item that names none.
        num_frames: frames taken of a video.

    Raises:
        InputError: a field is missing or holds what it cannot; the message names place, field and cure.
    """
    if not isinstance(row, Mapping):
        raise _no_item(where, f"it is {_short(row)}")
    given = [field for field in ("image", "video") if row.get(field) is not None]
    if len(given) != 1:
        raise _no_item(where, f"it has {'image and' if given else 'neither image nor'} video")
    field, question = given[0], row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise _no_item(where, f"question is {_short(question)}")
    answers = _answers(row.get("answer"), where)
    sources = row[field] if isinstance(row[field], list | tuple) else [row[field]]
    known = all(isinstance(source, str | Path | Image.Image | np.ndarray) for source in sources)
    if not sources or not known or "" in [source for source in sources if isinstance(source, str)]:
        raise _no_item(where, f"{field} is {_short(row[field])}")
    if field == "video" and len(sources) > 1:
        raise _no_item(where, f"video is a list of {len(sources)}, and a prompt takes one", "give one path")
    pictures = [picture for source in sources for picture in _pictures(source, field, where, folder, num_frames)]
    name = str(row.get("kind", kind))
    return Item(name, tuple(pictures), field == "video", question, answers[0] if answers else None, answers[1:])


def _pictures(source: Any, field: str, where: str, folder: Path, num_frames: int) -> list[NDArray[np.uint8]]:
    """The images that a source holds, or a video's frames as one array."""
    if isinstance(source, Image.Image):
        source = np.array(source.convert("RGB"))
    if isinstance(source, np.ndarray):
        dims = 4 if field == "video" else 3
        if source.dtype != np.uint8 or source.ndim != dims or source.shape[-1] != 3:
            raise _no_item(
                where,
                f"{field} is an array of {source.dtype} {source.shape}",
                f"give uint8 ({'F, ' * (dims == 4)}H, W, 3)",
            )
        return [source]
    try:
        media = load_media(folder / source, num_frames)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if media.kind != field:
        held = "a video" if media.kind == "video" else "no video"
        raise _no_item(where, f"{field} is {source!r}, which is {held}", f'write it as "{media.kind}"')
    # Copies, since torch warns of memory that is read-only.
    return [media.frames] if field == "video" else [np.array(image) for image in media.images]


def _answers(given: Any, where: str) -> tuple[str, ...]:
    """All answers that are right; none where the field is missing, null or NaN, as pandas writes what is missing."""
    if given is None:
        return ()
    listed = given if isinstance(given, list | tuple) else [given]
    simple = all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in listed)
    if not listed or not simple or not all(str(one).strip() for one in listed):
        raise _no_item(
            where,
            f"answer is {_short(given)}",
            "write a text, a number, a list of all that are right, or leave it out",
        )
    return tuple(str(one) for one in listed if not (isinstance(one, float) and math.isnan(one)))


def _no_item(where: str, why: str, cure: str = "write image or video, question and answer as JSON") -> InputError:
    return InputError(f"{where} is no item ({why}); {cure}")


def _short(value: object) -> str:
    return reprlib.repr(value)
