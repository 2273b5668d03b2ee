"""InternVL 3 and 3.5 (the ``-hf`` checkpoints): a tower with a class token, pixel shuffle, Qwen decoders.

The shuffle makes one token of 2 x 2 patches of a square grid: those merge as one, and the grid is whole again in front
of it. The model never learns which tiles belong to one image, so each tile is an image here; so are frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLVisionEncoder, InternVLVisionLayer

from illava_hooks.config import MergeConfig, MergeSchedule, Modality, ModelLimits
from illava_hooks.engine.counts import encoder_counts
from illava_hooks.engine.encoder_layers import MergingLayer, TowerHook, change_layers, handed_on
from illava_hooks.engine.family import Family, ModelParts, changed_layers
from illava_hooks.engine.report import EncoderShape
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import LmmsEval, Picture, PublishedShape, Workload
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.engine.transport import current_run
from illava_hooks.errors import UnsupportedModelError
from illava_hooks.patchers._blocks import BlockFeatures, ExpandTower, tile_pictures
from illava_hooks.patchers._towers import num_used

__all__ = ["FAMILY", "InternVL", "MergingInternVLVisionLayer", "RunningInternVLVisionEncoder"]

# The fractions of depth and of tokens of the others; not yet measured on trained weights.
_PRESET = MergeSchedule((5, 6, 7, 8), 0.16, (8,), 0.70)
_TOWER: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
_NARROW_TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
}


class MergingInternVLVisionLayer(MergingLayer, InternVLVisionLayer):  # type: ignore[no-untyped-call]  # by the base class
    """A layer that merges between attention and MLP."""

    attention_name = "attention"

    def attend(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in the stock layer."""
        mixed, _ = self.attention(self.layernorm_before(hidden))
        out: Tensor = self.lambda_1 * mixed + hidden
        return out

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """As in the stock layer."""
        out: Tensor = self.lambda_2 * self.dropout(self.mlp(self.layernorm_after(hidden))) + hidden
        return out


class RunningInternVLVisionEncoder(InternVLVisionEncoder):
    """The stack of layers, which in stock takes no keyword arguments and so cannot hand a run on.

    Layers need it among their arguments: what a checkpoint replays has no other memory.
    """

    #: By which copies of a swapped class are found again.
    swapped_in = True

    def forward(self, hidden_states: Tensor) -> Any:
        """The stock forward, with the run for every layer."""
        run = current_run()
        if run is None or not isinstance(self, RunningInternVLVisionEncoder):
            return InternVLVisionEncoder.forward(self, hidden_states)
        for layer in self.layer:
            hidden_states = layer(hidden_states, **handed_on(layer, run))
        return BaseModelOutput(last_hidden_state=hidden_states)


MergingInternVLVisionLayer.__name__ = InternVLVisionLayer.__name__  # `_no_split_modules` goes by name
RunningInternVLVisionEncoder.__name__ = InternVLVisionEncoder.__name__


class InternVL(Family):
    """InternVL's family: blocks of 2 x 2 patches merge inside of their tile."""

    name = "internvl"
    title = "InternVL"
    model_types = ("internvl",)
    modalities: tuple[Modality, ...] = ("image",)
    presets: Mapping[Modality, MergeSchedule] = MappingProxyType({"image": _PRESET})
    encoder_layer_types = (InternVLVisionLayer,)
    other_tower = "vision_tower has {kind} layers; use a stock InternVL model"
    shapes: Mapping[str, PublishedShape] = MappingProxyType(
        {
            "internvl3-1b": PublishedShape(896, 4864, 24, 14, 2, "OpenGVLab/InternVL3-1B-hf"),
            "internvl3-8b": PublishedShape(3584, 18944, 28, 28, 4, "OpenGVLab/InternVL3-8B-hf"),
        }
    )
    lmms_eval = LmmsEval(chat="chat.internvl_hf.InternVLHf")

    def tower(self, base: Any) -> Any:
        """InternVL's own."""
        return base.vision_tower

    def layers_of(self, tower: Any) -> Sequence[nn.Module]:
        """Its layers."""
        layers: Sequence[nn.Module] = tower.encoder.layer
        return layers

    def limits(self, model: Any) -> ModelLimits:
        """Depths and patches of a tile; layers behind the chosen feature layer are of no use."""
        config = model.config
        depth, chosen = config.vision_config.num_hidden_layers, config.vision_feature_layer
        used = num_used(chosen, depth) if isinstance(chosen, int) else depth  # a list is refused by check
        llm_depth, (_, patches) = self.text_config(model).num_hidden_layers, rows_of(model)
        return ModelLimits(self.name, used, llm_depth, patches, self.presets_of(model))

    def check(self, model: Any, parts: ModelParts, config: MergeConfig) -> None:
        """Also refuses feature choices under which tiles are no square grids.

        Raises:
            UnsupportedModelError: with the cure.
        """
        super().check(model, parts, config)
        chosen = model.config.vision_feature_layer
        if not isinstance(chosen, int):
            raise UnsupportedModelError(
                f"vision_feature_layer is {chosen}; only a single layer can be patched; use one"
            )
        if config.vit_layers:
            check_strategy(model.config.vision_feature_select_strategy)

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """Swaps the classes of merging layers and of the stack, wraps the feature method, hooks the tower."""
        changed = changed_layers(session.config, len(parts.encoder_layers))
        change_layers(parts.encoder_layers, changed, {InternVLVisionLayer: MergingInternVLVisionLayer}, session)
        session.hooks.wrap(parts.base, "get_image_features", ImageFeatures(parts.base, session, rows_of).features)
        towers: Sequence[Any] = parts.towers
        for tower in towers:
            session.hooks.swap_class(tower.encoder, RunningInternVLVisionEncoder)
            session.hooks.around_forward(tower, TowerHook(session), ExpandTower())

    def encoder_shape(self, model: Any) -> EncoderShape:
        """Sizes of the tower; the projector works on as many tokens as ever."""
        vision, text = model.config.vision_config, self.text_config(model)
        traits, _ = rows_of(model)
        wide = vision.hidden_size * traits.patches_per_unit
        return EncoderShape(
            vision.num_hidden_layers,
            vision.hidden_size,
            vision.intermediate_size,
            traits.patches_per_unit,
            2 * text.hidden_size * (wide + text.hidden_size),
            projects_survivors=False,
            prefix=traits.prefix,
        )

    def kept_tokens(self, base: Any, config: MergeConfig, modality: Modality, shape: Sequence[int]) -> int:
        """Of one tile."""
        traits, patches = rows_of(base)
        return encoder_counts(config, modality, traits, patches).units[-1]

    def projector(self, base: Any) -> nn.Module:
        """The MLP behind the shuffle."""
        projector: nn.Module = base.multi_modal_projector
        return projector

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Picture]:
        """Each tile."""
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return []
        return tile_pictures(pixels.detach().double().cpu(), model.config.vision_config.patch_size[0])

    def workload(self, model: Any, load: Workload, generator: torch.Generator) -> dict[str, Tensor]:
        """Tiles or frames: to the model each is an image."""
        config = model.config
        tiles = load.frames or load.images * load.tiles
        traits, patches = rows_of(model)
        inputs = load.prompt(config.image_token_id, patches // traits.patches_per_unit, tiles, generator)
        height, width = config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(load.batch * tiles, 3, height, width, generator=generator)
        return inputs

    def published_config(self, text: dict[str, Any], placeholders: Mapping[Modality, int], narrow: bool) -> Any:
        """InternViT-300M and a Qwen2."""
        from transformers import InternVLConfig

        vision = _TOWER | {"attention_bias": True, "layer_scale_init_value": 0.1} | (_NARROW_TOWER if narrow else {})
        return InternVLConfig(
            vision_config=vision,
            text_config={**text, "model_type": "qwen2"},
            image_token_id=placeholders["image"],
        )


class ImageFeatures(BlockFeatures):
    """Around ``get_image_features``, which may be told another layer and strategy than the configuration's."""

    def features(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuses what leaves no square grid, and layers that the merging ones lie behind."""
        if self.session.active and self.session.config.image.merges_in_encoder:
            strategy, chosen = kwargs.get("vision_feature_select_strategy"), kwargs.get("vision_feature_layer")
            check_strategy(strategy or self.base.config.vision_feature_select_strategy)
            if chosen is not None and chosen != self.base.config.vision_feature_layer:
                raise UnsupportedModelError(
                    f"vision_feature_layer is {chosen}, and the model was patched for "
                    f"{self.base.config.vision_feature_layer}; set it in the configuration before patch"
                )
        return super().features(method, *args, **kwargs)


def check_strategy(strategy: str) -> None:
    """Refuses a class token among the features.

    Raises:
        UnsupportedModelError: with the cure.
    """
    if strategy != "default":
        raise UnsupportedModelError(
            f"vision_feature_select_strategy is {strategy!r}, which leaves no square grid; use 'default', or "
            "vit_layers=[]"
        )


def rows_of(base: Any) -> tuple[EncoderTraits, int]:
    """What a tile is, and its patches: the blocks are learned from the stock shuffle of numbers."""
    vision, factor = base.config.vision_config, base.config.downsample_ratio
    side = vision.image_size[0] // vision.patch_size[0]
    numbers = torch.arange(side * side, dtype=torch.float64).view(1, side, side, 1)
    blocks = InternVLModel.pixel_shuffle(base, numbers, scale_factor=factor)
    size = blocks.shape[-1]
    traits = EncoderTraits(size, granularity=size, prefix=1, order=blocks.flatten().long(), regroups=True)
    return traits, side * side


FAMILY = InternVL()
