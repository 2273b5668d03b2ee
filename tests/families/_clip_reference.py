"""The encoder stage of the slow reference behind CLIP: a class token in front that attends, and never merges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from families._llava_onevision_reference import NEWLINE, placed_visual
from families.llava_next import num_tiles
from reference import ReferenceSettings, Segment, Visual, attend, choose_by_mass, heads_of


def images(model: Any, inputs: dict[str, Tensor], settings: ReferenceSettings) -> Iterator[Visual]:
    """Each image is one tile, whose patches are its tokens."""
    for pixels in inputs.get("pixel_values", ()):
        part = segment(model, pixels, settings)
        kept = [unit in part.seats for unit in range(len(part.holder))]
        yield Visual("image", part.expanded(), kept, list(part.holder), [part])


def tiled_images(model: Any, inputs: dict[str, Tensor], settings: ReferenceSettings) -> Iterator[Visual]:
    """Each image is a base tile and those of its grid, packed with newlines."""
    for pixels, size in zip(inputs.get("pixel_values", ()), inputs.get("image_sizes", ()), strict=True):
        tiles, tokens = num_tiles(model.config, size.tolist()), tokens_per_tile(model)
        places = packed_places(model, tiles, size)
        inside = set(places)
        segments = [
            segment(model, pixels[t], settings, [t * tokens + u in inside for u in range(tokens)])
            for t in range(tiles)
        ]
        yield placed_visual(places, segments, tokens, model.model.image_newline)


def tokens_per_tile(model: Any) -> int:
    vision = model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def packed_places(model: Any, tiles: int, size: Tensor) -> list[int]:
    """Which tile token (tile * tokens + unit) stands at each packed position, by the stock packing on numbers."""
    tokens = tokens_per_tile(model)
    numbers = torch.arange(tiles * tokens, dtype=torch.float64).view(tiles, tokens, 1)
    newline = torch.tensor([float(NEWLINE)], dtype=torch.float64)
    packed, _ = model.model.pack_image_features([numbers], size[None], "default", newline)
    return [int(number) for number in packed[0][:, 0].tolist()]


def segment(
    model: Any,
    pixels: Tensor,
    settings: ReferenceSettings,
    visible: list[bool] | None = None,
    project: bool = True,
) -> Segment:
    """One tile or frame (3, height, width) up to the chosen layer, and through the projector where that is next."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    hidden = tower.pre_layrnorm(tower.embeddings(pixels[None]))[0]
    part = Segment.full(len(hidden) - 1, unit=1, visible=visible, prefix=1)
    num_layers = model.config.vision_feature_layer % (len(tower.encoder.layers) + 1)
    for index, layer in enumerate(tower.encoder.layers[:num_layers]):
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        query, key, value = (
            heads_of(projection(normed), attention.head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        hidden = hidden + attention.out_proj(attend(query, key, value, causal=False))
        if index in settings.vit_layers:
            hidden = part.merge(settings, hidden, query, key)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    part.values = model.model.multi_modal_projector(hidden[1:]) if project else hidden[1:]
    return part


def pooled_videos(model: Any, inputs: dict[str, Tensor], settings: ReferenceSettings) -> Iterator[Visual]:
    """Frames are pooled as they come out of the tower, and then projected; there is no newline."""
    for pixels in inputs.get("pixel_values_videos", ()):
        segments = [segment(model, frame, settings, project=False) for frame in pixels]
        values, holder = [], []
        kept: list[bool] = []
        for part in segments:
            pooled = model.model.vision_resampler(part.expanded()[None])[0]
            masses = model.model.vision_resampler(part.mass()[None, :, None])[0, :, 0].tolist()
            num_kept = -(-len(pooled) * len(part.seats) // len(part.holder))
            frame, chosen, held = choose_by_mass(pooled, masses, math.isqrt(len(pooled)), num_kept)
            holder += [len(kept) + index for index in held]
            kept += [index in chosen for index in range(len(pooled))]
            values += list(model.model.multi_modal_projector(torch.stack(list(frame))))
        yield Visual("video", torch.stack(values), kept, holder, segments)
