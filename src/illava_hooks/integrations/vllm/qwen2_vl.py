"""Qwen2-VL on vLLM's own class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from torch import Tensor
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VisionBlock,
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from illava_hooks.config import Modality
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.integrations.vllm.blocks import MergingBlock, TowerMerging
from illava_hooks.integrations.vllm.counts import KeptCounts
from illava_hooks.integrations.vllm.cpu import let_positions_follow
from illava_hooks.integrations.vllm.positions import Item, place, prompt_positions
from illava_hooks.integrations.vllm.processing import MergingInfo, MergingProcessor, strength_of
from illava_hooks.integrations.vllm.settings import settings_of

__all__ = ["MergingQwen2VL"]


class Info(MergingInfo, Qwen2VLProcessingInfo):
    """Knows the settings."""


class Processor(MergingProcessor, Qwen2VLMultiModalProcessor):
    """Gives an item as many placeholders as it has survivors."""

    def shape_of(self, modality: Modality, item: Any) -> Sequence[int]:
        """The grid of patches."""
        grid: list[int] = item[f"{modality}_grid_thw"].data.tolist()
        return grid

    def items_in(self, modality: Modality, inputs: Mapping[str, Any]) -> int:
        """As many as there are grids."""
        grids = inputs.get(f"{modality}_grid_thw")
        return 0 if grids is None else len(grids)


class Block(MergingBlock, Qwen2VisionBlock):
    """A vision block that merges between attention and MLP."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=Qwen2VLDummyInputsBuilder)
class MergingQwen2VL(Qwen2VLForConditionalGeneration):
    """vLLM's model, whose vision encoder merges where its configuration has settings."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        """As stock; with settings the tower's blocks merge."""
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.merging = settings_of(self.config)
        if self.merging is None:
            return
        self.kept_tokens = KeptCounts(self.merging, self.config)
        group = self.visual.spatial_merge_size**2
        sharded = self.visual.blocks[0].attn.tp_size > 1
        self.tower_merging = TowerMerging(self.visual, Block, EncoderTraits(group, granularity=group), sharded)
        let_positions_follow(self, vllm_config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """As stock; the strengths that items carry are taken out first."""
        if self.merging is None:
            return super().embed_multimodal(**kwargs)
        self.strengths = {modality: strength_of(modality, kwargs) for modality in get_args(Modality)}
        return super().embed_multimodal(**kwargs)

    def _process_image_input(self, image_input: Any) -> Any:
        return self._process("image", image_input, super()._process_image_input)

    def _process_video_input(self, video_input: Any) -> Any:
        return self._process("video", video_input, super()._process_video_input)

    def _process(self, modality: Modality, given: Any, stock: Callable[[Any], Any]) -> Any:
        """Calls stock while the tower merges; what it returns of each item is cut to the survivors."""
        if self.merging is None:
            return stock(given)
        strength = self.strengths[modality]
        with self.tower_merging.calling(modality, self.merging.at(strength)):
            items = stock(given)
        grids = given[f"{modality}_grid_thw"].tolist()
        kept = (self.kept_tokens(modality, grid, strength) for grid in grids)
        return tuple(item[:count] for item, count in zip(items, kept, strict=True))

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Of survivors provisional; of text exact."""
        if self.merging is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[no-any-return]
        items, group = [], self.config.vision_config.spatial_merge_size
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            time, height, width = feature.data[f"{feature.modality}_grid_thw"].data.tolist()
            extent = max(time, height // group, width // group)
            items.append(Item(feature.mm_position.offset, feature.mm_position.length, extent))
        return prompt_positions(len(input_tokens), items)

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Any, mrope_positions: Tensor, num_computed_tokens: int
    ) -> Any:
        """What vLLM asks with the embeddings of each chunk."""
        visual = [self.config.image_token_id, self.config.video_token_id]
        return place(input_ids, visual, multimodal_embeddings, mrope_positions, num_computed_tokens)

    def get_encoder_cudagraph_config(self) -> Any:
        """No captured graphs while the encoder's lengths change inside of it."""
        config = super().get_encoder_cudagraph_config()
        if self.merging is not None:
            config.modalities = []
        return config
