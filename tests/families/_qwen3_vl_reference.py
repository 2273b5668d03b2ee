"""The encoder stage of the slow reference: slices through the blocks, the patch merger and those of DeepStack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

from reference import ReferenceSettings, Segment, Visual, attend


def visuals(model: Any, inputs: dict[str, Tensor], settings: ReferenceSettings) -> Iterator[Visual]:
    for kind, pixel_name, grid_name in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        start = 0
        for grid in inputs.get(grid_name, ()):
            count = int(grid.prod())
            yield _visual(model.model.visual, kind, inputs[pixel_name][start : start + count], grid, settings)
            start += count


def _visual(visual: Any, kind: str, pixels: Tensor, grid: Tensor, settings: ReferenceSettings) -> Visual:
    hidden, (cos, sin) = _entering(visual, pixels, grid)
    length = int(grid[1] * grid[2])
    parts = [table.split(length) for table in (hidden, cos, sin)]
    segments = [_segment(visual, part, c, s, settings) for part, c, s in zip(*parts, strict=True)]
    holder = []
    kept: list[bool] = []
    for segment in segments:
        start = len(kept)
        holder += [start + seat for seat in segment.holder]
        kept += [unit in segment.seats for unit in range(len(segment.holder))]
    values = torch.cat([segment.expanded() for segment in segments])
    added = [
        torch.cat([segment.expanded(segment.beside[number]) for segment in segments])
        for number in range(len(segments[0].beside))
    ]
    return Visual(kind, values, kept, holder, segments, added)


def _entering(visual: Any, pixels: Tensor, grid: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What the stock tower gives its first block: patches with learned positions, and rotary tables."""
    found = []
    handle = visual.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: found.append((args[0], kwargs["position_embeddings"])), with_kwargs=True
    )
    visual(pixels, grid_thw=grid[None])
    handle.remove()
    return found[0]


def _segment(visual: Any, hidden: Tensor, cos: Tensor, sin: Tensor, settings: ReferenceSettings) -> Segment:
    """One temporal slice through the blocks, the patch merger and those of DeepStack."""
    unit = visual.spatial_merge_size**2
    segment = Segment.full(len(hidden) // unit, unit)
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
        stacked = list(getattr(visual, "deepstack_visual_indexes", ()))  # Qwen3.5 has no DeepStack
        if index in stacked:
            merger = visual.deepstack_merger_list[stacked.index(index)]
            segment.beside.append([merger(group)[0] for group in hidden.split(unit)])
    segment.values = visual.merger(hidden)
    return segment
