"""From what a visitor gives (files, texts) to media and settings, and back to words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from illava_hooks.config import MergeConfig, MergeSchedule
from illava_hooks.demo.chat import Turn
from illava_hooks.engine.finding import find_family
from illava_hooks.errors import IllavaHooksError, InputError
from illava_hooks.tools.loading import parse_fraction, parse_layers, parse_number
from illava_hooks.tools.media import Media, load_media

__all__ = [
    "FIELDS",
    "KEEP",
    "SIDES",
    "check_turns",
    "describe",
    "latest",
    "limits_of",
    "media_of",
    "settings_of",
    "turn_of",
]

MAX_FILES, MAX_QUESTION, MAX_TURNS = 16, 2000, 20

#: The numbers, as ``patch`` calls them.
FIELDS = ("vit_layers", "vit_r", "llm_layers", "llm_ratio", "keep")

#: What the page calls the last one, of which 0 is none.
KEEP = "Visual tokens kept"

#: What the switch says, and the sides that it asks for.
SIDES = {"Side by side": (False, True), "On": (True,), "Off": (False,)}


def media_of(files: Sequence[str] | None, frames: int) -> Media:
    """Reads uploaded files: images, all in one prompt, or one video.

    Raises:
        InputError: there is none, or one cannot be read; the message has the file's name, not its folder.
    """
    if not files:
        raise InputError("there is no picture yet; upload one, or choose an example")
    if len(files) > MAX_FILES:
        raise InputError(f"these are {len(files)} files; give at most {MAX_FILES}")
    found = [_read(Path(file), frames) for file in files]
    if len(found) == 1:
        return found[0]
    videos = [media.names[0] for media in found if media.kind == "video"]
    if videos:
        raise InputError(f"{videos[0]!r} is a video or an animation, which comes alone; remove it or all others")
    names = tuple(name for media in found for name in media.names)
    return Media("image", names, tuple(image for media in found for image in media.images))


def latest(files: Sequence[str], before: int, frames: int) -> list[str]:
    """What is left after an upload: images are added to images, and as a video comes alone, the upload replaces it.

    Args:
        files: all that lies there, in the order of the upload.
        before: how many of them lay there before.
        frames: frames taken of a video.
    """
    new = list(files[before:])
    if not before or not new:
        return list(files)
    try:
        kinds = {_read(Path(file), frames).kind for file in files}
    except InputError:  # told where they are read together
        return list(files)
    return new if "video" in kinds else list(files)


def _read(file: Path, frames: int) -> Media:
    try:
        return load_media(file, frames)
    except InputError as error:
        raise InputError(str(error).replace(f"{file.parent}{os.sep}", "")) from error


def turn_of(text: str | None, default: str, first: bool) -> Turn:
    """The question without space around it; the page has one of its own to begin with.

    Args:
        text: what stands in the field.
        default: the page's own question.
        first: whether it is the first one of a chat.

    Raises:
        InputError: it is too long, or there is none.
    """
    question = (text or "").strip()
    if len(question) > MAX_QUESTION:
        raise InputError(f"the question has {len(question)} characters; give at most {MAX_QUESTION}")
    if not question and not first:
        raise InputError("the question is empty; type one, or press Ask again for the last one")
    return Turn(question or default, own=not question)


def check_turns(turns: Sequence[object]) -> None:
    """Refuses a chat that would outgrow the model.

    Raises:
        InputError: it is too long.
    """
    if len(turns) >= MAX_TURNS:
        raise InputError(f"this chat has {len(turns)} questions, which is the most; start a new one")


def settings_of(method: str, preset: str, numbers: Sequence[str | float | None]) -> dict[str, Any]:
    """Arguments of ``patch``; an empty field leaves its number to the preset, "none" is no layer.

    Args:
        method: a name in ``METHODS``.
        preset: "auto", "image" or "video".
        numbers: what stands in the fields of ``FIELDS``.

    Raises:
        InputError: a field holds no number.
    """
    values: dict[str, Any] = {"method": method, "preset": preset}
    for name, given in zip(FIELDS, numbers, strict=True):
        text = str(given or "").strip()  # the one slider gives a number, and 0 for the preset
        if not text:
            continue
        if name.endswith("layers"):
            values[name] = [] if text.lower() == "none" else parse_layers(text, name)
        elif name == "keep":
            values[name] = _kept(text)
        else:
            values[name] = parse_number(text, name)
    return values


def _kept(text: str) -> float | None:
    found = parse_fraction(text, KEEP)
    if found is not None and not 0 <= found <= 1:
        raise InputError(f"{KEEP!r} is {found:g}; give a fraction up to 1, or 0 for what the preset says")
    return found or None


def limits_of(model: Any) -> dict[str, str]:
    """What a model allows in each of ``FIELDS``, in words."""
    limits = find_family(model).limits(model)
    tile = limits.tokens_per_tile
    return {
        "vit_layers": f"Encoder layers that merge, of 0 to {limits.vit_depth - 1}; or none.",
        "vit_r": f"Removed in each: a count{f' (a tile has {tile})' if tile else ''}, or a fraction.",
        "llm_layers": f"Decoder layers that merge, of 1 to {limits.llm_depth - 1}; or none.",
        "llm_ratio": "Fraction of the tokens kept in each, up to 1.",
        "keep": "The fraction of an image's tokens that is left in the end. 0: as the preset says.",
    }


def describe(model: Any, method: str, preset: str, numbers: Sequence[str | float | None]) -> tuple[str, bool]:
    """What these settings do, or why they cannot be: the words, and whether they can."""
    try:
        values = settings_of(method, preset, numbers)
        vit_layers, vit_r, llm_layers, llm_ratio, keep = (values.get(name) for name in FIELDS)
        limits = find_family(model).limits(model)
        config = MergeConfig.build(limits, vit_layers, vit_r, llm_layers, llm_ratio, method, preset, False, keep)
    except IllavaHooksError as error:
        return f"{error}.", False
    image, video = _words(config.image), _words(config.video)
    return (f"{image}." if image == video else f"Images: {image}. Videos: {video}."), True


def _words(schedule: MergeSchedule) -> str:
    parts = []
    if schedule.keep is not None and schedule.keep_encoder is not None:
        left = {"encoder": (schedule.vit_layers, schedule.keep_encoder, "patches")}
        left |= {"decoder": (schedule.llm_layers, schedule.keep, "tokens")}
        parts = [f"{_layers(s, n, 'leave', 'together ')} {f:.0%} of the {w}" for s, (n, f, w) in left.items() if n]
        return "; ".join(parts)
    if schedule.merges_in_encoder:
        amount = f"{schedule.vit_r:.0%}" if isinstance(schedule.vit_r, float) else str(schedule.vit_r)
        parts.append(f"{_layers('encoder', schedule.vit_layers)} {amount} of the patches")
    if schedule.merges_in_llm:
        parts.append(f"{_layers('decoder', schedule.llm_layers, 'keep')} {schedule.llm_ratio:.0%} of the tokens")
    return "; ".join(parts) or "nothing is removed"


def _layers(stage: str, layers: Sequence[int], verb: str = "remove", how: str = "each ") -> str:
    several = len(layers) > 1
    return f"{stage} layer{'s' * several} {', '.join(map(str, layers))} {how * several}{verb}{'s' * (not several)}"
