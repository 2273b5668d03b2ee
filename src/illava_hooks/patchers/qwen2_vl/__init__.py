"""Qwen2-VL: one packed row of patches, 2x2 patch merger, M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionBlock

from illava_hooks.config import MergeConfig, ModelLimits
from illava_hooks.errors import UnsupportedModelError
from illava_hooks.patchers.base import ModelParts, changed_layers
from illava_hooks.patchers.qwen2_vl.features import ExpandTower, FeatureMethods
from illava_hooks.patchers.qwen2_vl.layers import MergingQwen2VLVisionBlock
from illava_hooks.runtime.report import EncoderShape
from illava_hooks.runtime.session import MergeSession
from illava_hooks.schedules import Modality

__all__ = ["FAMILY", "Qwen2VL"]


class Qwen2VL:
    """The family."""

    name = "qwen2_vl"
    published_llm_score = "query_lse"

    def encoder_layers(self, base: Any) -> Any:
        """The layers of the vision tower."""
        return base.visual.blocks

    def limits(self, model: Any) -> ModelLimits:
        """Depths; images have no fixed number of tokens."""
        return ModelLimits(
            self.name, model.config.vision_config.depth, model.config.text_config.num_hidden_layers, None
        )

    def check(self, model: Any, parts: ModelParts, config: MergeConfig) -> None:
        """Refuses towers with other blocks."""
        for block in (
            parts.encoder_layers[index] for index in {0, *changed_layers(config, len(parts.encoder_layers))}
        ):
            if not isinstance(block, Qwen2VLVisionBlock):
                raise UnsupportedModelError(f"visual has {type(block).__name__} blocks; use a stock Qwen2-VL model")

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """Swaps merging blocks' classes, wraps the feature methods, hooks the tower."""
        for layer in changed_layers(session.config, len(parts.encoder_layers)):
            session.hooks.swap_class(parts.encoder_layers[layer], MergingQwen2VLVisionBlock)
        base: Any = parts.base
        methods = FeatureMethods(base, session)
        session.hooks.wrap(base, "get_image_features", methods.image_features)
        session.hooks.wrap(base, "get_video_features", methods.video_features)
        session.hooks.after(base.visual, ExpandTower())

    def encoder_shape(self, model: Any) -> EncoderShape:
        """Sizes of the vision tower and the patch merger."""
        vision = model.config.vision_config
        size = vision.spatial_merge_size**2
        wide = vision.embed_dim * size
        return EncoderShape(
            vision.depth,
            vision.embed_dim,
            int(vision.embed_dim * vision.mlp_ratio),
            size,
            2 * wide * (wide + vision.hidden_size),
        )

    def tokens_behind(self, base: Any) -> Mapping[Modality, int]:
        """None."""
        return {}

    def text_positions(self, position_ids: Tensor) -> Tensor:
        """``(3, B, N)``: the fourth row in front, if any, only tells packed sequences apart."""
        return position_ids[1:] if position_ids.dim() == 3 and position_ids.shape[0] == 4 else position_ids


FAMILY = Qwen2VL()
