"""How LLaVA-OneVision packs tiles and pools frames, also of the published layout, in which tiles become smaller.

Shapes: ``T`` tiles or frames of ``N`` tokens with ``K`` survivors, ``P`` packed tokens of one image, ``C`` width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from illava_hooks.config import MergeConfig, Modality
from illava_hooks.engine.counts import encoder_counts
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.records import VisualRecord
from illava_hooks.engine.regions import in_region
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.errors import MergeConfigError
from illava_hooks.patchers._tiles import Geometry, Tiles, geometry_of, kept_of_image, tile_record

__all__ = ["compact_grid", "compact_pool", "image_geometry", "kept_tokens", "place_published", "require_square"]


def image_geometry(base: Any, num_tiles: int, num_tokens: int, image_size: Sequence[int], aspect: str) -> Geometry:
    """Runs the stock method over a tensor of indices, on the CPU.

    Args:
        base: the ``LlavaOnevisionModel``.
        num_tiles: tiles of the image, the base tile included.
        num_tokens: ``N``.
        image_size: height and width in pixels.
        aspect: ``vision_aspect_ratio``.
    """
    stock = type(base).pack_image_features

    def pack(values: Tensor, newline: Tensor, aspect: str = aspect) -> Tensor:
        packed: Tensor = stock(base, [values], [list(image_size)], newline, aspect)[0][0]
        return packed

    # Without its limit of tiles the stock method never interpolates.
    return geometry_of(num_tiles, num_tokens, pack, partial(pack, aspect="anyres_max_1000000"))


def kept_tokens(
    base: Any, config: MergeConfig, modality: Modality, shape: Sequence[int], traits: EncoderTraits
) -> int:
    """Tokens that enter the language model, newlines included.

    Args:
        base: the ``LlavaOnevisionModel``.
        config: the settings.
        modality: of the visual.
        shape: (tiles, height, width) of an image, (frames,) of a video.
        traits: of the tower.

    Raises:
        MergeConfigError: shapes do not tell, since survivors may be cropped away.
    """
    vision = base.config.vision_config
    num_tokens = int((vision.image_size // vision.patch_size) ** 2)
    units = encoder_counts(config, modality, traits, num_tokens).units
    if modality == "video":
        return int(shape[0]) * _kept_of_frame(base, config, num_tokens, units[-1]) + 1
    tiles, *size = map(int, shape)
    geometry = image_geometry(base, tiles, num_tokens, size, base.config.vision_aspect_ratio)
    if config.method.layout == "compact":
        (small,) = compact_grid(base, [torch.zeros(tiles, units[-1], 1)], [size], torch.zeros(1))
        return min(len(small), len(geometry.source))
    return kept_of_image(config, geometry, units, size)


def _kept_of_frame(base: Any, config: MergeConfig, num_tokens: int, num_kept: int) -> int:
    pooled = int(type(base).apply_pooling(base, torch.zeros(1, num_tokens, 1)).shape[1])
    if config.method.layout == "compact":
        return min(pooled, compact_pool(base, torch.zeros(1, num_kept, 1)).shape[1])
    return math.ceil(pooled * num_kept / num_tokens)


def require_square(num_tokens: int, given: str = "vit_r") -> int:
    """The side of the square grid that ``num_tokens`` survivors of a tile form.

    Args:
        num_tokens: survivors of a tile.
        given: the setting that left so many, for the message.

    Raises:
        MergeConfigError: they form none.
    """
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise MergeConfigError(
            f"layout 'compact' needs a square number of tokens per tile, {given} leaves {num_tokens}; use layout "
            f"'aligned' or settings that leave {side * side}"
        )
    return side


def _smaller(base: Any, num_tokens: int) -> Any:
    """A stand-in for the model whose tiles are square grids of ``num_tokens``."""
    side = require_square(num_tokens)
    image_size = base.config.vision_config.image_size
    # The stock methods divide: only a fraction gives `side` exactly.
    vision = SimpleNamespace(image_size=image_size, patch_size=Fraction(image_size, side))
    return SimpleNamespace(
        config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=base.config.image_grid_pinpoints)
    )


def compact_grid(
    base: Any, kept: Sequence[Tensor], image_sizes: Any, image_newline: Tensor | None, aspect: str | None = None
) -> list[Tensor]:
    """Packs survivors as the published code does: each tile a smaller square grid.

    Args:
        base: the ``LlavaOnevisionModel``.
        kept: per image ``(T, K, C)``, ``K`` a square number.
        image_sizes: per image height and width in pixels.
        image_newline: ``(C,)`` or None.
        aspect: ``vision_aspect_ratio``; None: the model's.

    Returns:
        Per image ``(P', C)``.
    """
    stand_in = _smaller(base, kept[0].shape[1])
    aspect = aspect or base.config.vision_aspect_ratio
    packed, _ = type(base).pack_image_features(stand_in, list(kept), image_sizes, image_newline, aspect)
    return list(packed)


def compact_pool(base: Any, kept: Tensor) -> Tensor:
    """Pools the survivors of video frames as the published code does: ``(T, K, C)`` to ``(T, K', C)``."""
    pooled: Tensor = type(base).apply_pooling(_smaller(base, kept.shape[1]), kept)
    return pooled


@in_region("illava::packing")
def place_published(run: EncoderRun, tiles: Tiles, small: Tensor, num_tokens: int) -> tuple[Tensor, VisualRecord]:
    """The published layout: the packed survivors ``(P', C)`` at the front of ``num_tokens`` places."""
    place = torch.arange(num_tokens, device=small.device)
    shown = place.clamp_max(len(small) - 1)
    return small[shown], tile_record(run, tiles, place < len(small), shown, None)
