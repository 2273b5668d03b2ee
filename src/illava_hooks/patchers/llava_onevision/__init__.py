"""LLaVA-OneVision: SigLIP tiles, anyres packing, pooled video frames, a Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from illava_hooks.config import MergeConfig, ModelLimits
from illava_hooks.errors import UnsupportedModelError
from illava_hooks.patchers.base import ModelParts, changed_layers
from illava_hooks.patchers.llava_onevision.features import (
    FeatureMethods,
    check_feature_choice,
    num_used,
    tokens_per_tile,
)
from illava_hooks.patchers.llava_onevision.layers import MergingSiglipEncoderLayer
from illava_hooks.patchers.llava_onevision.layout import compact_grid, compact_pool, require_square
from illava_hooks.runtime.releases import newlines_behind_videos
from illava_hooks.runtime.report import EncoderShape
from illava_hooks.runtime.session import MergeSession
from illava_hooks.schedules import Modality

__all__ = ["FAMILY", "LlavaOnevision", "compact_grid", "compact_pool"]


class LlavaOnevision:
    """The family."""

    name = "llava_onevision"
    published_llm_score = "last_query_attention"

    def encoder_layers(self, base: Any) -> Any:
        """The layers of the vision tower."""
        return base.vision_tower.encoder.layers

    def limits(self, model: Any) -> ModelLimits:
        """Depths and tokens per tile."""
        config = model.config
        depth = config.vision_config.num_hidden_layers
        chosen = config.vision_feature_layer
        used = max(num_used(layer, depth) for layer in ([chosen] if isinstance(chosen, int) else chosen))
        return ModelLimits(self.name, used, config.text_config.num_hidden_layers, tokens_per_tile(config))

    def check(self, model: Any, parts: ModelParts, config: MergeConfig) -> None:
        """Refuses other vision towers, and feature choices that cut across merges."""
        for layer in (
            parts.encoder_layers[index] for index in {0, *changed_layers(config, len(parts.encoder_layers))}
        ):
            if not isinstance(layer, SiglipEncoderLayer):
                raise UnsupportedModelError(
                    f"vision_tower has {type(layer).__name__} layers; only SigLIP towers can be patched; use one"
                )
        stock = model.config
        depth = stock.vision_config.num_hidden_layers
        if config.vit_layers:
            check_feature_choice(
                stock.vision_feature_layer, stock.vision_feature_select_strategy, depth, config.vit_layers
            )
        if config.method.layout == "compact":
            for schedule in (config.image, config.video):
                removed = sum(schedule.encoder_removed(tokens_per_tile(stock)))
                require_square(tokens_per_tile(stock) - removed)

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """Swaps merging layers' classes and wraps the four methods of the vision stage."""
        for layer in changed_layers(session.config, len(parts.encoder_layers)):
            session.hooks.swap_class(parts.encoder_layers[layer], MergingSiglipEncoderLayer)
        methods = FeatureMethods(parts.base, session)
        session.hooks.wrap(parts.base, "get_image_features", methods.image_features)
        session.hooks.wrap(parts.base, "get_video_features", methods.video_features)
        session.hooks.wrap(parts.base, "pack_image_features", methods.pack)
        session.hooks.wrap(parts.base, "apply_pooling", methods.pool)

    def encoder_shape(self, model: Any) -> EncoderShape:
        """Sizes of the SigLIP tower and the projector."""
        vision, text = model.config.vision_config, model.config.text_config
        projector = 2 * text.hidden_size * (vision.hidden_size + text.hidden_size)
        used = self.limits(model).vit_depth
        # Stock runs the whole tower, also layers behind the chosen feature layer.
        depth = max(used, vision.num_hidden_layers)
        return EncoderShape(depth, vision.hidden_size, vision.intermediate_size, 1, projector)

    def tokens_behind(self, base: Any) -> Mapping[Modality, int]:
        """The newline behind a video, in releases that do not count it to the features."""
        return {"video": newlines_behind_videos(base)}

    def text_positions(self, position_ids: Tensor) -> Tensor:
        """``(B, N)`` as they are."""
        return position_ids


FAMILY = LlavaOnevision()
