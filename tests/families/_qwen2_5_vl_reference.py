"""The encoder stage of the slow reference: slices through blocks whose windows come from coordinates.

A slice is a row of groups in the order of windows, since that order decides ties and who is even. Masks are dense: in
a block with windows a patch sees those whose coordinates lie in its own window, in the others its whole slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from families._qwen2_vl_reference import _patch_places as patch_places
from families.qwen2_5_vl import row_of_windows
from reference import ReferenceSettings, Segment, Visual, attention_logits

__all__ = ["block", "same_window", "visuals"]


def visuals(model: Any, inputs: dict[str, Tensor], settings: ReferenceSettings) -> Iterator[Visual]:
    for kind, pixel_name, grid_name in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        start = 0
        for grid in inputs.get(grid_name, torch.empty(0, 3)).tolist():
            count = grid[0] * grid[1] * grid[2]
            yield _visual(model.model.visual, kind, inputs[pixel_name][start : start + count], grid, settings)
            start += count


def _visual(visual: Any, kind: str, pixels: Tensor, grid: list[int], settings: ReferenceSettings) -> Visual:
    hidden, unit = visual.patch_embed(pixels), visual.spatial_merge_size**2
    slices, height, width = grid
    side = visual.window_size // visual.patch_size  # of a window, in patches
    order = row_of_windows(height, width, side // visual.spatial_merge_size)
    rows = [group * unit + lane for group in order for lane in range(unit)]
    places = patch_places([1, height, width], visual.spatial_merge_size)
    place_of = {group: index for index, group in enumerate(order)}
    segments, values, holder = [], [], []
    kept: list[bool] = []
    for part in range(slices):
        mine = hidden[part * height * width : (part + 1) * height * width]
        segment = _segment(visual, mine[rows], places[rows], side, settings)
        start = len(kept)
        spread = segment.expanded()
        for group in range(len(order)):
            place = place_of[group]
            values.append(spread[place])
            kept.append(place in segment.seats)
            holder.append(start + order[segment.holder[place]])
        segments.append(segment)
    return Visual(kind, torch.stack(values), kept, holder, segments)


def same_window(places: Tensor, side: int) -> Tensor:
    """``(N, N)`` bool: whether two patches at ``places`` ``(N, 2)`` lie in one window of ``side`` patches."""
    windows = places // side
    return (windows[:, None] == windows[None]).all(-1)


def block(
    layer: Any, hidden: Tensor, angles: tuple[Tensor, Tensor], seen: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of a block.

    Args:
        layer: The block.
        hidden: ``(N, C)``.
        angles: Cosines and sines of the patches.
        seen: ``(N, N)`` bool, who sees whom.
        bias: ``(N,)``, what is added to the logits of each key.

    Returns:
        The residual stream behind the attention, queries and keys ``(H, N, D)``.
    """
    attention = layer.attn
    query, key, value = (
        part.view(len(hidden), attention.num_heads, -1) for part in attention.qkv(layer.norm1(hidden)).chunk(3, dim=-1)
    )
    query, key = apply_rotary_pos_emb_vision(query, key, *angles)
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    logits = attention_logits(query, key, causal=False).masked_fill(~seen, -torch.inf)
    logits = logits if bias is None else logits + bias
    mixed = logits.softmax(-1).to(value.dtype) @ value
    return hidden + attention.proj(mixed.transpose(0, 1).flatten(1)), query, key


def _segment(visual: Any, hidden: Tensor, places: Tensor, side: int, settings: ReferenceSettings) -> Segment:
    """One temporal slice through the blocks and the patch merger."""
    unit = visual.spatial_merge_size**2
    segment = Segment.full(len(hidden) // unit, unit)
    for index, layer in enumerate(visual.blocks):
        angles = patch_angles(visual, hidden, places)
        windowed = index not in visual.fullatt_block_indexes
        everything = torch.ones(len(hidden), len(hidden), dtype=torch.bool)
        hidden, query, key = block(layer, hidden, angles, same_window(places, side) if windowed else everything)
        if index in settings.vit_layers:
            survivors_before = segment.seats
            hidden = segment.merge(settings, hidden, query, key)
            rows = [survivors_before.index(seat) * unit + offset for seat in segment.seats for offset in range(unit)]
            places = places[rows]
        hidden = hidden + layer.mlp(layer.norm2(hidden))
    segment.values = visual.merger(hidden)
    return segment


def patch_angles(visual: Any, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of patches at ``places`` ``(N, 2)``; old releases give the angles themselves."""
    if "x" in signature(visual.rotary_pos_emb.forward).parameters:
        cos, sin = visual.rotary_pos_emb(hidden, places)
        return cos, sin
    angles = visual.rotary_pos_emb(places)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()
