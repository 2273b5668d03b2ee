"""Two small trained models inside the package: a stock LLaVA-OneVision and a stock Qwen2-VL.

They know coloured shapes, handwritten digits, counting, left and right, pairs of images and short clips, in the
words of ``questions.vocabulary``: enough to see and to measure what merging does, without a download.
Presets for their depth are a key of their ``config.json``, ``illava_presets``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from illava_hooks.errors import InputError

__all__ = ["ALIASES", "NAMES", "folder", "load", "media", "presets"]

#: The embedded models: the folders beside this file that hold a checkpoint.
NAMES = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/config.json")))
_FIRST = "llava_onevision"

#: The embedded models by their names in commands; the first one is what a command takes by default.
ALIASES: Mapping[str, str] = MappingProxyType(
    {"tiny": _FIRST} | {f"tiny-{name.replace('_', '-')}": name for name in NAMES if name != _FIRST}
)


def folder(name: str) -> Path:
    """The checkpoint's folder, which ``from_pretrained`` of transformers loads.

    Args:
        name: "llava_onevision" or "qwen2_vl", or what the command line calls them, "tiny" or "tiny-qwen2-vl".

    Raises:
        InputError: there is no embedded model of that name.
    """
    name = ALIASES.get(name, name)
    if name not in NAMES:
        raise InputError(f"tiny model is {name!r}; choose one of {list(NAMES)}")
    return Path(__file__).parent / name


def presets(name: str) -> dict[str, Any]:
    """What an embedded model's configuration says of where it merges: settings by modality.

    Raises:
        InputError: there is no embedded model of that name.
    """
    found: dict[str, Any] = json.loads((folder(name) / "config.json").read_text())["illava_presets"]
    return found


def media(name: str) -> Path:
    """A bundled picture: "scene.png", "digits.png", "pair", "pair/first.png", "pair/second.png" or "clip.gif".

    Raises:
        InputError: there is no such picture.
    """
    path = Path(__file__).parent / "media" / name
    if not path.exists():
        raise InputError(f"bundled picture is {name!r}; choose one of scene.png, digits.png, pair, clip.gif")
    return path


def load(name: str) -> tuple[Any, Any]:
    """Loads an embedded model, in float32 and in eval mode, and its processor.

    Args:
        name: as for ``folder``.

    Returns:
        The stock model and the stock processor.

    Raises:
        InputError: there is no embedded model of that name.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = folder(name)
    model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    processor: Any = AutoProcessor.from_pretrained(path)  # type: ignore[no-untyped-call]
    return model.eval(), processor
