"""Qwen3-VL on vLLM's own class: DeepStack, and frames that stand apart in the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen3_vl import (
    Qwen3_VisionBlock,
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from illava_hooks.config import Modality
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.integrations.vllm.blocks import MergingBlock, TowerMerging
from illava_hooks.integrations.vllm.packed_model import PackedModel, PackedProcessor
from illava_hooks.integrations.vllm.processing import MergingInfo, SpacedDummies
from illava_hooks.merge.plan import apply_merge

__all__ = ["MergingQwen3VL"]


class Info(MergingInfo, Qwen3VLProcessingInfo):
    """Knows the settings."""


class Dummies(SpacedDummies, Qwen3VLDummyInputsBuilder):
    """Items stand apart."""


class Processor(PackedProcessor, Qwen3VLMultiModalProcessor):
    """Gives an item as many placeholders as it has survivors."""

    def spans_of(self, modality: Modality, item: Any) -> int:
        """A time stands in front of each slice of a video."""
        return int(self.shape_of(modality, item)[0])


class Block(MergingBlock, Qwen3_VisionBlock):
    """A vision block that merges between attention and MLP."""


class StackedTower(TowerMerging):
    """Makes a tower merge whose blocks in the middle give features of their own beside the last ones."""

    apart = True

    def mergers(self) -> Iterator[Any]:
        """Also those of DeepStack."""
        yield from super().mergers()
        yield from self.tower.deepstack_merger_list

    def survivors_of(self, run: EncoderRun, out: Tensor) -> Tensor:
        """Features of an earlier block go through the merges behind it."""
        stages = [run.merges_before(index + 1) for index in sorted(self.tower.deepstack_visual_indexes)]
        parts = []
        for stage, features in zip([len(run.plans), *stages], out.chunk(len(stages) + 1, 1), strict=True):
            tokens = features[run.states[stage].origins[0].to(out.device)][None]
            for plan in run.plans[stage:]:
                tokens = apply_merge(tokens, plan)
            parts.append(tokens[0])
        return torch.cat(parts, 1)


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummies)
class MergingQwen3VL(PackedModel, Qwen3VLForConditionalGeneration):
    """vLLM's model, whose vision encoder merges where its configuration has settings."""

    block = Block
    tower_merging = StackedTower

    def extent(self, feature: Any, time: int, height: int, width: int) -> int:
        """Each slice of a video is a picture of its own."""
        return max(height, width)
