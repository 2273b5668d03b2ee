"""The encoder stage of the slow reference: slices through the blocks and the patch merger."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from reference import ReferenceSettings, Segment, Visual, attend


def visuals(model: Any, inputs: dict[str, Tensor], settings: ReferenceSettings) -> Iterator[Visual]:
    for kind, pixel_name, grid_name in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        start = 0
        for grid in inputs.get(grid_name, ()):
            count = int(grid.prod())
            yield _visual(model, kind, inputs[pixel_name][start : start + count], grid, settings)
            start += count


def _visual(model: Any, kind: str, pixels: Tensor, grid: Tensor, settings: ReferenceSettings) -> Visual:
    visual = model.model.visual
    hidden = visual.patch_embed(pixels)
    angles = _patch_angles(visual, hidden, _patch_places(grid.tolist(), visual.spatial_merge_size))
    slices, length = int(grid[0]), int(grid[1] * grid[2])
    segments = []
    for part in range(slices):
        rows = slice(part * length, (part + 1) * length)
        segments.append(_segment(visual, hidden[rows], tuple(table[rows] for table in angles), settings))
    holder = []
    kept: list[bool] = []
    for segment in segments:
        start = len(kept)
        holder += [start + seat for seat in segment.holder]
        kept += [unit in segment.seats for unit in range(len(segment.holder))]
    return Visual(kind, torch.cat([segment.expanded() for segment in segments]), kept, holder, segments)


def _patch_places(grid: list[int], merge_size: int) -> Tensor:
    """Row and column of each patch, (patches, 2): groups row by row, patches row by row inside a group."""
    slices, rows, columns = grid
    places = [
        [group_row + row, group_column + column]
        for group_row in range(0, rows, merge_size)
        for group_column in range(0, columns, merge_size)
        for row in range(merge_size)
        for column in range(merge_size)
    ]
    return torch.tensor(places * slices)


def _segment(visual: Any, hidden: Tensor, angles: tuple[Tensor, ...], settings: ReferenceSettings) -> Segment:
    """One temporal slice through the blocks and the patch merger."""
    unit = visual.spatial_merge_size**2
    segment = Segment.full(len(hidden) // unit, unit)
    cos, sin = angles
    for index, block in enumerate(visual.blocks):
        attention = block.attn
        query, key, value = (
            part.view(len(hidden), attention.num_heads, -1)
            for part in attention.qkv(block.norm1(hidden)).chunk(3, dim=-1)
        )
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        hidden = hidden + attention.proj(attend(query, key, value, causal=False))
        if index in settings.vit_layers:
            survivors_before = segment.seats
            hidden = segment.merge(settings, hidden, query, key)
            rows = [survivors_before.index(seat) * unit + offset for seat in segment.seats for offset in range(unit)]
            cos, sin = cos[rows], sin[rows]
        hidden = hidden + block.mlp(block.norm2(hidden))
    segment.values = visual.merger(hidden)
    return segment


def _patch_angles(visual: Any, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the patches; old releases give the angles themselves."""
    if "x" in signature(visual.rotary_pos_emb.forward).parameters:
        cos, sin = visual.rotary_pos_emb(hidden, places)
        return cos, sin
    angles = visual.rotary_pos_emb(places).repeat(1, 2)
    return angles.cos(), angles.sin()
