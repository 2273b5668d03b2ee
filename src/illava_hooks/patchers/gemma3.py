"""Gemma 3, in its vision encoder only: SigLIP tiles of 64 x 64 patches that are pooled 4 x 4.

Four fifths of a small Gemma's prefill are spent in the tower. The patches of one pooled token are kept or merged as
one, so a survivor is pooled as in stock; behind the tower each token shows its survivor, and the language model sees
as many tokens as ever. It is left alone: five of its six layers slide over a window that counts columns, and pictures
attend in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from illava_hooks.config import MergeConfig, MergeSchedule, Modality, ModelLimits
from illava_hooks.engine.encoder_layers import TowerHook, change_layers
from illava_hooks.engine.family import Family, ModelParts, Stage, changed_layers
from illava_hooks.engine.report import EncoderShape
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import LmmsEval, Picture
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.errors import UnsupportedModelError
from illava_hooks.patchers._blocks import BlockFeatures, ExpandTower, tile_pictures
from illava_hooks.patchers._towers import MergingSiglipEncoderLayer

__all__ = ["FAMILY", "Gemma3"]


class Gemma3(Family):
    """Gemma 3's family: blocks of patches that are pooled together merge inside of their tile."""

    name = "gemma3"
    title = "Gemma 3"
    model_types = ("gemma3",)
    modalities: tuple[Modality, ...] = ("image",)
    stages: frozenset[Stage] = frozenset({"vision"})
    # LLaVA-OneVision's layers and the amount of Qwen2-VL; not yet measured on trained weights.
    presets: Mapping[Modality, MergeSchedule] = MappingProxyType({"image": MergeSchedule((5, 6, 7, 8), 0.16, (), 1.0)})
    encoder_layer_types = (SiglipEncoderLayer,)
    other_tower = "vision_tower has {kind} layers; only SigLIP towers can be patched; use one"
    lmms_eval = LmmsEval("simple.gemma3.Gemma3")
    vlmevalkit = ("Gemma3-4B", "Gemma3-12B", "Gemma3-27B")

    def tower(self, base: Any) -> Any:
        """The SigLIP tower."""
        return base.vision_tower

    def layers_of(self, tower: Any) -> Sequence[nn.Module]:
        """The layers of the SigLIP tower."""
        layers: Sequence[nn.Module] = tower.encoder.layers
        return layers

    def limits(self, model: Any) -> ModelLimits:
        """Depths, and patches of a tile."""
        vision, text = model.config.vision_config, self.text_config(model)
        side = grid_side(model.config)
        return ModelLimits(
            self.name, vision.num_hidden_layers, text.num_hidden_layers, side**2, self.presets_of(model)
        )

    def check(self, model: Any, parts: ModelParts, config: MergeConfig) -> None:
        """Also refuses grids that pooling cuts.

        Raises:
            UnsupportedModelError: with the numbers.
        """
        super().check(model, parts, config)
        side, tokens = grid_side(model.config), model.config.mm_tokens_per_image
        if side % round(tokens**0.5) or round(tokens**0.5) ** 2 != tokens:
            raise UnsupportedModelError(
                f"{tokens} tokens of an image are no pooled blocks of its {side} x {side} patches; use a model whose "
                "mm_tokens_per_image is a square that divides them"
            )

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """Swaps merging layers' classes, wraps the feature method, hooks the tower."""
        changed = changed_layers(session.config, len(parts.encoder_layers))
        change_layers(parts.encoder_layers, changed, {SiglipEncoderLayer: MergingSiglipEncoderLayer}, session)
        session.hooks.wrap(parts.base, "get_image_features", BlockFeatures(parts.base, session, rows_of).features)
        for tower in parts.towers:
            session.hooks.around_forward(tower, TowerHook(session), ExpandTower())

    def encoder_shape(self, model: Any) -> EncoderShape:
        """Sizes of the SigLIP tower; the projection of a pooled token."""
        vision, text = model.config.vision_config, self.text_config(model)
        return EncoderShape(
            vision.num_hidden_layers,
            vision.hidden_size,
            vision.intermediate_size,
            block_traits(model.config).patches_per_unit,
            2 * vision.hidden_size * text.hidden_size,
            projects_survivors=False,
        )

    def kept_tokens(self, base: Any, config: MergeConfig, modality: Modality, shape: Sequence[int]) -> int:
        """As many as without merging: the language model is left alone."""
        return int(base.config.mm_tokens_per_image)

    def projector(self, base: Any) -> nn.Module:
        """Pooling and projection."""
        projector: nn.Module = base.multi_modal_projector
        return projector

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Picture]:
        """Each tile, as the encoder sees it."""
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return []
        return tile_pictures(pixels.detach().double().cpu(), model.config.vision_config.patch_size)


def grid_side(config: Any) -> int:
    """Patches along a side of a tile."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def rows_of(base: Any) -> tuple[EncoderTraits, int]:
    """What a tile is, and its patches."""
    return block_traits(base.config), grid_side(base.config) ** 2


def block_traits(config: Any) -> EncoderTraits:
    """Blocks of patches that are pooled into one token."""
    side, blocks = grid_side(config), round(config.mm_tokens_per_image**0.5)
    size = side // blocks
    order = torch.arange(side * side).view(blocks, size, blocks, size).transpose(1, 2).flatten()
    return EncoderTraits(size * size, granularity=size * size, order=order, regroups=True)


FAMILY = Gemma3()
