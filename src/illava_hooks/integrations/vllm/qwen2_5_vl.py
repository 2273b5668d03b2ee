"""Qwen2.5-VL on vLLM's own class: most blocks attend within windows, and positions of videos follow the clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VisionBlock,
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from illava_hooks.config import Modality
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.integrations.vllm.blocks import MergingBlock, TowerMerging
from illava_hooks.integrations.vllm.packed_model import PackedModel, PackedProcessor
from illava_hooks.integrations.vllm.positions import in_seconds
from illava_hooks.integrations.vllm.processing import MergingInfo, SpacedDummies
from illava_hooks.patchers._windows import window_borders

__all__ = ["MergingQwen25VL"]


class Info(MergingInfo, Qwen2_5_VLProcessingInfo):
    """Knows the settings."""


class Dummies(SpacedDummies, Qwen2_5_VLDummyInputsBuilder):
    """Items stand apart."""


class Processor(PackedProcessor, Qwen2_5_VLMultiModalProcessor):
    """Gives an item as many placeholders as it has survivors."""


class Block(MergingBlock, Qwen2_5_VisionBlock):
    """A vision block that merges between attention and MLP."""


class WindowedTower(TowerMerging):
    """Makes a tower merge whose row lies in the order of windows; behind the patch merger it is a picture again."""

    def lay_out(self, grids: Sequence[Sequence[int]]) -> EncoderTraits:
        """With the windows that the tower itself finds."""
        unit, orders, ends, first = self.traits.patches_per_unit, list[Tensor](), [torch.tensor([0])], 0
        for grid in grids:
            index, borders = self.tower.get_window_index_thw(*grid)
            orders.append(index + first)
            ends.append(borders + first * unit)
            first += len(index)
        order = (torch.cat(orders)[:, None] * unit + torch.arange(unit)).flatten()
        windows = torch.unique_consecutive(torch.cat(ends))
        device = self.tower.device
        return replace(self.traits, order=order.to(device), windows=windows.to(device))

    def borders(self, index: int, given: Tensor, run: EncoderRun, merges: int) -> Tensor:
        """Of windows, but for the blocks that see everything; windows that are left empty are left out."""
        if index in self.tower.fullatt_block_indexes:
            return super().borders(index, given, run, merges)
        state = run.states[merges]
        if state.windows is None:
            state.windows = torch.unique_consecutive(window_borders(run, merges))
        return state.windows.to(given)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummies)
class MergingQwen25VL(PackedModel, Qwen2_5_VLForConditionalGeneration):
    """vLLM's model, whose vision encoder merges where its configuration has settings."""

    block = Block
    tower_merging = WindowedTower

    def in_time(self, modality: Modality, given: Any, items: list[Tensor]) -> list[Tensor]:
        """Slices of a video stand as far apart as its seconds say."""
        if modality == "image":
            return items
        told, grids = given.get("second_per_grid_ts"), given["video_grid_thw"].tolist()
        intervals = [self._interval(seconds) for seconds in ([None] * len(items) if told is None else told)]
        extents = [_extent(*self.merging_tower.sides(grid), one) for grid, one in zip(grids, intervals, strict=True)]
        return [in_seconds(*one) for one in zip(items, intervals, extents, strict=True)]

    def extent(self, feature: Any, time: int, height: int, width: int) -> int:
        """As stock: also behind the last slice."""
        if feature.modality == "image":
            return max(height, width)
        told = feature.data.get("second_per_grid_ts")
        return _extent(time, height, width, self._interval(None if told is None else told.data))

    def _interval(self, seconds: Any) -> float:
        """Positions from one slice to the next."""
        rate: float = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        return (1.0 if seconds is None else float(seconds)) * rate


def _extent(time: int, height: int, width: int, interval: float) -> int:
    """By how much the text moves on behind a video of so many tokens."""
    return max(int((time - 1) * interval) + 1, height, width)
