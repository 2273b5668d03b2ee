"""What ``session.show`` returns: pictures of the merging, for a session, from whatever a user has at hand."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from illava_hooks import tiny
from illava_hooks.api import session_of
from illava_hooks.engine.finding import find_family
from illava_hooks.engine.install import taken_off
from illava_hooks.engine.session import MergeSession
from illava_hooks.errors import InputError, MergeConfigError, PatchStateError
from illava_hooks.tools.draw import MergeMap, animation, merge_maps, strip
from illava_hooks.tools.loading import EMBEDDED, build_inputs, default_question
from illava_hooks.tools.media import Media, load_media, to_rgb

__all__ = ["Pictures", "media_of", "show"]


class Pictures(list[Image.Image]):
    """A list of pictures that notebooks show as pictures, moving ones too."""

    def _repr_html_(self) -> str:
        tags = []
        for number, picture in enumerate(self, 1):
            kind = picture.format or "PNG"
            file = io.BytesIO()
            picture.save(file, kind, **({"save_all": True, "loop": 0} if kind == "GIF" else {}))
            data = base64.b64encode(file.getvalue()).decode()
            tags.append(
                f'<img alt="merging of picture {number}" style="max-width: 100%" '
                f'src="data:image/{kind.lower()};base64,{data}">'
            )
        return "".join(tags)


def show(session: MergeSession, pictures: Any, question: str | None = None, processor: Any = None) -> Pictures:
    """Implements ``MergeSession.show``; arguments, result and errors stand there."""
    model = session.root
    if session_of(model) is not session:
        raise PatchStateError(
            f"this session of {type(model).__name__} is over; call patch(model, ...) again and use what it returns"
        )
    media, source = media_of(pictures), str(model.config._name_or_path)
    tool = _processor(source) if processor is None else processor
    names = {str(tiny.folder(name)): alias for alias, name in EMBEDDED.items()}
    asked = question or default_question(names.get(source, source), media)
    inputs = build_inputs(tool, media, asked, model.device, model.dtype)
    with taken_off(session, find_family(model)):
        maps = merge_maps(model, tool, inputs, media.images, config=session.config)
    if not maps:
        raise MergeConfigError(
            f"nothing merges in a {media.kind} with {session!r}; give settings that remove something"
        )
    return Pictures(_drawn(maps))


def media_of(pictures: Any) -> Media:
    """Pictures, frames or a path as the tools take them.

    Raises:
        InputError: it is nothing of the kind, or cannot be read.
    """
    if isinstance(pictures, str | Path):
        return load_media(pictures)
    if isinstance(pictures, np.ndarray) and pictures.ndim == 4 and pictures.shape[-1] == 3:
        frames = tuple(Image.fromarray(frame.astype(np.uint8)) for frame in pictures)
        return Media("video", ("video",), frames, tuple(map(float, range(len(frames)))))
    if isinstance(pictures, np.ndarray) and pictures.ndim == 3 and pictures.shape[-1] == 3:
        pictures = Image.fromarray(pictures.astype(np.uint8))
    given = list(pictures) if isinstance(pictures, Sequence) else [pictures]
    if not given or not all(isinstance(one, Image.Image) for one in given):
        held = f" of {type(given[0]).__name__}" if given and isinstance(pictures, Sequence) else ""
        raise InputError(
            f"pictures is a {type(pictures).__name__}{held}; give a PIL picture or an array (H, W, 3), a list of "
            "pictures, frames (F, H, W, 3), or the path of an image, a folder or a video"
        )
    return Media("image", tuple(f"image {number}" for number in range(1, len(given) + 1)), tuple(map(to_rgb, given)))


def _processor(source: str) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever trips transformers' readers
        raise InputError(f"processor is None, and there is none at {source!r}; give processor=") from error


def _drawn(maps: Sequence[MergeMap]) -> list[Image.Image]:
    """A strip for each image, an animation for each video."""
    found: list[Image.Image] = []
    for visual in sorted({one.visual for one in maps}):
        mine = [one for one in maps if one.visual == visual]
        if mine[0].modality == "video":
            file = io.BytesIO()
            animation(mine, file)
            found.append(Image.open(file))
        else:
            found.append(strip(mine, colours=True))
    return found
