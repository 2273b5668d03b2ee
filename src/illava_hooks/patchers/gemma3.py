"""Gemma 3, in its vision encoder only: SigLIP tiles of 64 x 64 patches that are pooled 4 x 4.

Four fifths of a small Gemma's prefill are spent in the tower. The patches of one pooled token are kept or merged as
one, so a survivor is pooled as in stock; behind the tower each token shows its survivor, and the language model sees
as many tokens as ever. It is left alone: five of its six layers slide over a window that counts columns, and pictures
attend in both directions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from illava_hooks.config import MergeConfig, MergeSchedule, Modality, ModelLimits
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.encoder_layers import TowerHook, change_layers, expand_output, run_features
from illava_hooks.engine.family import Family, ModelParts, Stage, changed_layers
from illava_hooks.engine.hookset import Hook
from illava_hooks.engine.provenance import selection
from illava_hooks.engine.records import VisualRecord
from illava_hooks.engine.report import EncoderShape
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import Picture
from illava_hooks.engine.trace import token_sources, vision_tracks
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.engine.transport import ENCODER_RUN, in_features
from illava_hooks.errors import UnsupportedModelError
from illava_hooks.patchers.llava_onevision import MergingSiglipEncoderLayer

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
        session.hooks.wrap(parts.base, "get_image_features", ImageFeatures(parts.base, session).features)
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
        side, pixels = grid_side(model.config), inputs["pixel_values"].detach().double().cpu()
        size = model.config.vision_config.patch_size
        numbers = torch.arange(side * side).view(side, side).repeat_interleave(size, 0).repeat_interleave(size, 1)
        extra = pixels.shape[-1] - numbers.shape[-1]  # pixels at the border that fill no patch
        labels = torch.nn.functional.pad(numbers.double(), (0, extra, 0, extra), value=-1)
        return [Picture("image", ((torch.cat([tile, labels[None]]),),)) for tile in pixels]


class ImageFeatures:
    """Around the model's feature method."""

    def __init__(self, base: Any, session: MergeSession) -> None:
        """Belongs to one model and its session."""
        self.base, self.session = base, session

    def features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_image_features``: same shapes, records attached."""
        if in_features():
            return method(*args, **kwargs)
        run: EncoderRun | None = None
        if self.session.active and not self.session.config.image.is_identity:
            pixels = inspect.signature(method).bind(*args, **kwargs).arguments["pixel_values"]
            traits, length = block_traits(self.base.config), grid_side(self.base.config) ** 2
            run = EncoderRun(self.session, "image", traits, [length] * len(pixels), len(pixels), pixels.device)

        def note(output: Any) -> None:
            if run is not None:
                run.records = [_record(run, tile) for tile in range(run.num_rows)]

        return run_features(self.session, method, args, kwargs, run, self.base.config, note)


class ExpandTower(Hook):
    """Hook behind the tower: every patch shows its survivor, in picture order, before stock pools them."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Leaves the output alone when no run travels with the call."""
        run: EncoderRun | None = kwargs.get(ENCODER_RUN)
        (out,) = output
        if run is None or out is None:
            return None
        expand_output(run, out)
        return out


def grid_side(config: Any) -> int:
    """Patches along a side of a tile."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def block_traits(config: Any) -> EncoderTraits:
    """Blocks of patches that are pooled into one token."""
    side, blocks = grid_side(config), round(config.mm_tokens_per_image**0.5)
    size = side // blocks
    order = torch.arange(side * side).view(blocks, size, blocks, size).transpose(1, 2).flatten()
    return EncoderTraits(size * size, granularity=size * size, order=order, regroups=True)


def _record(run: EncoderRun, tile: int) -> VisualRecord:
    """What merged in one tile; each block is one of its tokens, in the order in which stock pools them."""
    kept_at: Tensor = run.final.kept_at[tile]
    keep, survivor_of = run.keep_mask(run.final)[tile], run.final.origins[tile][kept_at]
    record = VisualRecord("image", len(keep), keep, survivor_of, run.patch_counts(tile, tile + 1), run.layers)
    if run.session.config.track:
        tokens = selection(kept_at.cpu(), run.final.origins.shape[1])
        record.sources = token_sources(run, tile, tile + 1, tokens)
        record.vision = vision_tracks(run, tile, tile + 1)
    return record


FAMILY = Gemma3()
