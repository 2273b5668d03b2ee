"""What differs between the releases of transformers that are supported."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

__all__ = [
    "CACHE",
    "as_given",
    "cache_of",
    "compose_tables",
    "newlines_behind_videos",
    "pixels_of_videos",
    "takes_ready_features",
]

#: What forwards and mask functions call the cache: ``past_key_values`` up to 5.23, ``cache`` from 5.24 on.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache of a call, or None; the deprecated name reaches hooks before transformers translates it."""
    found = kwargs.get(CACHE)
    return kwargs.get("past_key_values") if found is None else found


def compose_tables(tables: tuple[Tensor, ...], config: Any) -> tuple[Tensor, ...]:
    """RoPE tables ``(B, N, D)``; up to 5.16 Qwen2-VL's attention composes them itself, of ``(3, B, N, D)``."""
    if tables[0].dim() == 3:
        return tables
    sections = [*config.rope_parameters["mrope_section"]] * 2
    return tuple(
        torch.cat([part[index % 3] for index, part in enumerate(torch.split(table, sections, dim=-1))], dim=-1)
        for table in tables
    )


def as_given(table: Tensor, given: Tensor) -> Tensor:
    """A composed table in the form of the one that stock made: composing three equal ones gives the same again."""
    return table if given.dim() == 3 else table.expand(3, *table.shape)


def newlines_behind_videos(base: Any) -> int:
    """Tokens that a LLaVA-OneVision puts behind a video's features in its forward: up to 5.17 the newline."""
    return int(not takes_ready_features(base))


def takes_ready_features(model: Any) -> bool:
    """Whether a model's forward takes the outputs of its feature methods, as from 5.18 on."""
    return "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters


def pixels_of_videos(call: Mapping[str, Any]) -> Tensor:
    """The frames that ``get_video_features`` is given; up to 5.17 LLaVA-OneVision calls them ``pixel_values``."""
    pixels: Tensor = call["pixel_values_videos" if "pixel_values_videos" in call else "pixel_values"]
    return pixels
