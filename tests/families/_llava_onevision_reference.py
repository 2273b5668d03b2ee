"""The encoder stage of the slow reference: tiles through SigLIP, the packing by the stock code on numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from reference import ReferenceSettings, Segment, Visual, attend, choose_by_mass, heads_of, nearest_index

NEWLINE = -1


def visuals(model: Any, inputs: dict[str, Tensor], settings: ReferenceSettings) -> Iterator[Visual]:
    if "pixel_values" in inputs:
        numbers = inputs.get("batch_num_images")
        alone = [True] * len(inputs["image_sizes"]) if numbers is None else [n == 1 for n in numbers for _ in range(n)]
        for pixels, size, tiled in zip(inputs["pixel_values"], inputs["image_sizes"], alone, strict=True):
            yield _image(model, pixels, size, tiled, settings)
    for pixels in inputs.get("pixel_values_videos", ()):
        yield _video(model, pixels, settings)


def _segment(model: Any, pixels: Tensor, settings: ReferenceSettings, visible: list[bool] | None = None) -> Segment:
    """One tile or frame (3, height, width) through the tower and the projector."""
    tower = model.model.vision_tower
    hidden = tower.embeddings(pixels[None])[0]
    segment = Segment.full(len(hidden), unit=1, visible=visible)
    num_layers = model.config.vision_feature_layer % (len(tower.encoder.layers) + 1)
    for index, layer in enumerate(tower.encoder.layers[:num_layers]):
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        query, key, value = (
            heads_of(projection(normed), attention.head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        hidden = hidden + attention.out_proj(attend(query, key, value, causal=False))
        if index in settings.vit_layers:
            hidden = segment.merge(settings, hidden, query, key)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    segment.values = model.model.multi_modal_projector(hidden)
    return segment


def _image(model: Any, pixels: Tensor, size: Tensor, tiled: bool, settings: ReferenceSettings) -> Visual:
    config = model.config
    num_tiles = 1
    if tiled:
        num_tiles = image_size_to_num_patches(
            size.tolist(), config.image_grid_pinpoints, config.vision_config.image_size
        )
    tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    places = _packed_places(model, num_tiles, tokens, size)
    inside = set(places)
    segments = [
        _segment(model, pixels[t], settings, [t * tokens + u in inside for u in range(tokens)])
        for t in range(num_tiles)
    ]
    visual = placed_visual(places, segments, tokens, model.model.image_newline)
    full = _pack(model, torch.stack([s.expanded() for s in segments]), size, model.model.image_newline)
    if len(full) == len(places):
        return visual
    return _shrunk_visual(model, visual, full, segments, size)


def _pack(model: Any, tiles: Tensor, size: Tensor, newline: Tensor, aspect_ratio: str | None = None) -> Tensor:
    """The stock packing of one image: (tiles, tokens, C) to (length, C)."""
    packed, _ = model.model.pack_image_features(
        [tiles],
        size[None],
        image_newline=newline,
        vision_aspect_ratio=aspect_ratio or model.config.vision_aspect_ratio,
    )
    return packed[0]


def _packed_places(model: Any, num_tiles: int, tokens: int, size: Tensor) -> list[int]:
    """Which tile token (tile * tokens + unit) stands at each packed position, big images not shrunk."""
    numbers = torch.arange(num_tiles * tokens, dtype=torch.float64).view(num_tiles, tokens, 1)
    newline = torch.tensor([float(NEWLINE)], dtype=torch.float64)
    packed = _pack(model, numbers, size, newline, aspect_ratio="anyres_max_1000000")
    return [int(number) for number in packed[:, 0].tolist()]


def placed_visual(places: list[int], segments: list[Segment], tokens: int, newline: Tensor) -> Visual:
    """An image whose packed positions are single tile tokens or newlines."""
    position_of = {place: position for position, place in enumerate(places)}
    expanded = [segment.expanded() for segment in segments]
    values, kept, holder = [], [], []
    for position, place in enumerate(places):
        if place == NEWLINE:
            values.append(newline)
            kept.append(True)
            holder.append(position)
            continue
        tile, unit = divmod(place, tokens)
        values.append(expanded[tile][unit])
        kept.append(unit in segments[tile].seats)
        holder.append(position_of.get(tile * tokens + segments[tile].holder[unit]))
    remaining = [position for position in range(len(places)) if kept[position]]
    holder = [nearest_index(p, remaining) if held is None else held for p, held in enumerate(holder)]
    return Visual("image", torch.stack(values), kept, holder, segments)


def _shrunk_visual(model: Any, placed: Visual, full: Tensor, segments: list[Segment], size: Tensor) -> Visual:
    """An image whose grid is interpolated down: the base tile stays as placed, the grid is chosen by mass.

    `full` is the stock packing of the expanded features.
    """
    newline = torch.tensor([float(NEWLINE)])
    masses = _pack(model, torch.stack([s.mass() for s in segments])[..., None], size, newline)[:, 0].tolist()
    base = len(segments[0].holder)
    newlines = [p for p in range(base, len(full)) if masses[p] == NEWLINE]
    columns = newlines[0] - base
    grid = [p for p in range(base, len(full)) if masses[p] != NEWLINE]
    survivors = sum(len(s.seats) for s in segments[1:])
    originals = sum(len(s.holder) for s in segments[1:])
    num_kept = -(-len(grid) * survivors // originals)
    values, chosen, held = choose_by_mass(full[grid], [masses[p] for p in grid], columns, num_kept)
    out = full.clone()
    out[:base] = placed.values[:base]
    out[grid] = values
    kept = placed.kept[:base] + [True] * (len(full) - base)
    holder = placed.holder[:base] + list(range(base, len(full)))
    for index, position in enumerate(grid):
        kept[position] = index in chosen
        holder[position] = grid[held[index]]
    return Visual("image", out, kept, holder, segments)


def _video(model: Any, pixels: Tensor, settings: ReferenceSettings) -> Visual:
    segments = [_segment(model, frame, settings) for frame in pixels]
    values, holder = [], []
    kept: list[bool] = []
    for segment in segments:
        pooled = model.model.apply_pooling(segment.expanded()[None])[0]
        masses = model.model.apply_pooling(segment.mass()[None, :, None])[0, :, 0].tolist()
        num_kept = -(-len(pooled) * len(segment.seats) // len(segment.holder))
        frame, chosen, held = choose_by_mass(pooled, masses, math.isqrt(len(pooled)), num_kept)
        holder += [len(kept) + index for index in held]
        kept += [index in chosen for index in range(len(pooled))]
        values += list(frame)
    newline = len(kept)
    return Visual(
        "video",
        torch.stack([*values, model.model.image_newline]),
        [*kept, True],
        [*holder, newline],
        segments,
    )
