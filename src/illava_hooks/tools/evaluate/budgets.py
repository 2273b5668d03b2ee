"""Settings that keep a given fraction of the visual tokens, and the controls that every method must beat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from illava_hooks.config import MergeSchedule
from illava_hooks.errors import InputError
from illava_hooks.tools.items import Item

__all__ = ["CONTROLS", "KEEP", "STAGES", "budget_settings", "downsampled"]

STAGES = ("encoder", "language", "both")
#: Instead of a stage: one number, ``patch(model, keep=...)``.
KEEP = "keep"
#: Methods that look at nothing; "downsample" shows the model smaller pictures instead of merging.
CONTROLS = ("random", "uniform", "downsample")


def budget_settings(schedule: MergeSchedule, stage: str, kept: float) -> dict[str, Any]:
    """Arguments of ``patch`` that keep a fraction of the visual tokens behind the last merging layer.

    Args:
        schedule: whose layers merge.
        stage: one of ``STAGES``, of which "both" gives each stage the square root, or all to the one that merges at
            all; or ``KEEP``.
        kept: the fraction, in (0, 1].

    Raises:
        InputError: stage or fraction is out of range.
    """
    if stage not in (*STAGES, KEEP):
        raise InputError(f"stage is {stage!r}; choose one of {[*STAGES, KEEP]}")
    if not 0 < kept <= 1:
        raise InputError(f"{KEEP if stage == KEEP else 'kept'} is {kept}; give a fraction in (0, 1]")
    if stage == KEEP:
        return {"keep": kept}
    layers = {"encoder": schedule.vit_layers, "language": schedule.llm_layers}
    merging = [name for name in layers if layers[name] and stage in (name, "both")]
    if not merging:
        raise InputError(f"stage is {stage!r}, in which the preset of this model merges nowhere; choose another")
    share = kept ** (1 / len(merging))
    encoder = "encoder" in merging and kept < 1
    language = "language" in merging and kept < 1
    return {
        "vit_layers": list(schedule.vit_layers) if encoder else [],
        "vit_r": 1 - share ** (1 / len(schedule.vit_layers)) if encoder else 0,
        "llm_layers": list(schedule.llm_layers) if language else [],
        "llm_ratio": share ** (1 / len(schedule.llm_layers)) if language else 1.0,
    }


def downsampled(items: Sequence[Item], kept: float) -> list[Item]:
    """The items with pictures of ``kept`` times the area.

    The processor decides how many tokens they give: about that fraction for Qwen2-VL, whole tiles for LLaVA-OneVision.
    """
    factor = math.sqrt(kept)
    smaller = []
    for item in items:
        pictures = tuple(_resize(picture, factor) for picture in item.pictures)
        smaller.append(replace(item, pictures=pictures))
    return smaller


def _resize(picture: Any, factor: float) -> Any:
    frames = picture if picture.ndim == 4 else picture[None]
    size = max(1, round(frames.shape[2] * factor)), max(1, round(frames.shape[1] * factor))
    small = np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])
    return small if picture.ndim == 4 else small[0]
