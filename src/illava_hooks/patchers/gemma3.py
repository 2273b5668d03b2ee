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
from torch import Tensor, nn
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from illava_hooks.config import MergeConfig, MergeSchedule, Modality, ModelLimits
from illava_hooks.engine.encoder_layers import TowerHook, change_layers
from illava_hooks.engine.family import Family, ModelParts, Stage, changed_layers
from illava_hooks.engine.report import EncoderShape
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import LmmsEval, Picture, PublishedShape, Workload
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.errors import InputError, UnsupportedModelError
from illava_hooks.patchers._blocks import BlockFeatures, ExpandTower, tile_pictures
from illava_hooks.patchers._towers import MergingSiglipEncoderLayer

__all__ = ["FAMILY", "Gemma3"]

_TOWER: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}
_NARROW_TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 10,
    "num_attention_heads": 2,
    "image_size": 224,
}


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
    shapes: Mapping[str, PublishedShape] = MappingProxyType(
        {
            "gemma-3-4b": PublishedShape(2560, 10240, 34, 8, 4, "google/gemma-3-4b-it"),
            "gemma-3-12b": PublishedShape(3840, 15360, 48, 16, 8, "google/gemma-3-12b-it"),
        }
    )
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

    def workload(self, model: Any, load: Workload, generator: torch.Generator) -> dict[str, Tensor]:
        """Images of one tile each.

        Raises:
            InputError: a video is asked for.
        """
        if load.frames:
            raise InputError(f"frames is {load.frames}, and {self.title} takes images only; use frames 0")
        config, size = model.config, model.config.vision_config.image_size
        inputs = load.prompt(config.image_token_id, config.mm_tokens_per_image, load.images, generator)
        inputs["token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
        inputs["pixel_values"] = torch.randn(load.batch * load.images, 3, size, size, generator=generator)
        return inputs

    def published_config(self, text: dict[str, Any], placeholders: Mapping[Modality, int], narrow: bool) -> Any:
        """SigLIP, and heads of their own width in the decoder, of whose layers every sixth sees all."""
        from transformers import Gemma3Config

        return Gemma3Config(
            vision_config=_TOWER | (_NARROW_TOWER if narrow else {}),
            text_config={**text, "head_dim": 32 if narrow else 256, "sliding_window": 1024},
            mm_tokens_per_image=16 if narrow else 256,
            image_token_index=placeholders["image"],
            boi_token_index=3,
            eoi_token_index=4,
        )

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
