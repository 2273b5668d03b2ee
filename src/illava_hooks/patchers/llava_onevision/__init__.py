"""LLaVA-OneVision: SigLIP tiles, anyres packing, pooled video frames, any decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from illava_hooks.config import MergeConfig, MergeSchedule, Modality, ModelLimits
from illava_hooks.engine.compat import newlines_behind_videos
from illava_hooks.engine.encoder_layers import TowerHook, change_layers
from illava_hooks.engine.family import Family, ModelParts, changed_layers
from illava_hooks.engine.report import EncoderShape
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import Picture, Workload
from illava_hooks.patchers._towers import (
    MergingSiglipEncoderLayer,
    check_feature_layer,
    check_strategy,
    num_used,
    picked,
    tokens_per_tile,
)
from illava_hooks.patchers.llava_onevision import tools
from illava_hooks.patchers.llava_onevision.features import (
    TRAITS,
    FeatureMethods,
)
from illava_hooks.patchers.llava_onevision.packing import compact_grid, compact_pool, kept_tokens, require_square

__all__ = ["FAMILY", "LlavaOnevision", "MergingSiglipEncoderLayer", "compact_grid", "compact_pool"]


class LlavaOnevision(Family):
    """LLaVA-OneVision's family: patches merge inside of their tile or frame."""

    name = "llava_onevision"
    title = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    presets = MappingProxyType(
        {
            "image": MergeSchedule((5, 6, 7, 8), 92, (8,), 0.70),
            "video": MergeSchedule((3, 4, 5, 6), 92, (2,), 0.70),
        }
    )
    published_llm_score = "last_query_attention"
    encoder_layer_types = (SiglipEncoderLayer,)
    other_tower = "vision_tower has {kind} layers; only SigLIP towers can be patched; use one"
    shapes = tools.SHAPES
    lmms_eval = tools.LMMS_EVAL
    vlmevalkit = tools.VLMEVALKIT

    def tower(self, base: Any) -> Any:
        """The SigLIP tower."""
        return base.vision_tower

    def layers_of(self, tower: Any) -> Any:
        """The layers of the SigLIP tower."""
        return tower.encoder.layers

    def limits(self, model: Any) -> ModelLimits:
        """Depths and tokens per tile; layers behind the chosen feature layer are of no use."""
        config = model.config
        depth, chosen = config.vision_config.num_hidden_layers, config.vision_feature_layer
        used = max(num_used(layer, depth) for layer in picked(chosen))
        llm_depth = config.text_config.num_hidden_layers
        return ModelLimits(self.name, used, llm_depth, tokens_per_tile(config), self.presets_of(model))

    def check(self, model: Any, parts: ModelParts, config: MergeConfig) -> None:
        """Also refuses feature choices that cut across merges, and survivors that form no grid where they must."""
        super().check(model, parts, config)
        stock = model.config
        depth = stock.vision_config.num_hidden_layers
        if config.vit_layers:
            check_feature_layer(stock.vision_feature_layer, depth, config.vit_layers)
            check_strategy(stock, stock.vision_feature_select_strategy)
        if config.method.layout == "compact":
            for schedule in (config.image, config.video):
                removed = sum(schedule.encoder_removed(tokens_per_tile(stock)))
                given = "vit_r" if schedule.keep is None else "keep"
                require_square(tokens_per_tile(stock) - removed, given)

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """Swaps merging layers' classes and wraps the four methods of the vision stage."""
        changed = changed_layers(session.config, len(parts.encoder_layers))
        change_layers(parts.encoder_layers, changed, {SiglipEncoderLayer: MergingSiglipEncoderLayer}, session)
        for tower in parts.towers:
            session.hooks.around_forward(tower, TowerHook(session))
        methods = FeatureMethods(parts.base, session)
        session.hooks.wrap(parts.base, "get_image_features", methods.image_features)
        session.hooks.wrap(parts.base, "get_video_features", methods.video_features)
        session.hooks.wrap(parts.base, "pack_image_features", methods.pack)
        session.hooks.wrap(parts.base, "apply_pooling", methods.pool)

    def kept_tokens(self, base: Any, config: MergeConfig, modality: Modality, shape: Sequence[int]) -> int:
        """Of an image's (tiles, height, width), or of a video's (frames,); newlines included."""
        return kept_tokens(base, config, modality, shape, TRAITS)

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

    def projector(self, base: Any) -> nn.Module:
        """The MLP between tower and decoder."""
        projector: nn.Module = base.multi_modal_projector
        return projector

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Picture]:
        """Base views with the mosaics of their tiles; frames."""
        return tools.pictures(model.config, inputs)

    def workload(self, model: Any, load: Workload, generator: torch.Generator) -> dict[str, Tensor]:
        """Tiles or frames."""
        return tools.workload(model.config, load, generator)

    def published_config(self, text: dict[str, Any], placeholders: Mapping[Modality, int], narrow: bool) -> Any:
        """SigLIP and a Qwen2."""
        return tools.published_config(text, placeholders, narrow)


FAMILY = LlavaOnevision()
