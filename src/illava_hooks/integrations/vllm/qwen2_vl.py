"""Qwen2-VL on vLLM's own class."""

from __future__ import annotations

from vllm.model_executor.models.qwen2_vl import (
    Qwen2VisionBlock,
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from illava_hooks.integrations.vllm.blocks import MergingBlock
from illava_hooks.integrations.vllm.packed_model import PackedModel, PackedProcessor
from illava_hooks.integrations.vllm.processing import MergingInfo, SpacedDummies

__all__ = ["MergingQwen2VL"]


class Info(MergingInfo, Qwen2VLProcessingInfo):
    """Knows the settings."""


class Dummies(SpacedDummies, Qwen2VLDummyInputsBuilder):
    """Items stand apart."""


class Processor(PackedProcessor, Qwen2VLMultiModalProcessor):
    """Gives an item as many placeholders as it has survivors."""


class Block(MergingBlock, Qwen2VisionBlock):
    """A vision block that merges between attention and MLP."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Dummies)
class MergingQwen2VL(PackedModel, Qwen2VLForConditionalGeneration):
    """vLLM's model, whose vision encoder merges where its configuration has settings."""

    block = Block
