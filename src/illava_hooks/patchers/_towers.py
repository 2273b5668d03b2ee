"""What families share whose vision encoder is a CLIP or SigLIP tower: rows of patches of one size, one row per tile.

CLIP puts a class token in front of its patches. It attends like all others and never merges; strategy ``"default"``
drops it behind the tower.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from illava_hooks.config import MergeConfig, Modality, ModelLimits
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.encoder_layers import MergingLayer, TowerHook, change_layers, expand_output, run_features
from illava_hooks.engine.family import Family, ModelParts, changed_layers
from illava_hooks.engine.report import EncoderShape
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.errors import UnsupportedModelError

__all__ = [
    "CLIP_CONFIG",
    "NARROW_CLIP_CONFIG",
    "MergingCLIPEncoderLayer",
    "MergingSiglipEncoderLayer",
    "PreNormLayer",
    "TowerFamily",
    "TowerFeatures",
    "check_feature_layer",
    "check_strategy",
    "class_tokens",
    "num_used",
    "picked",
    "tokens_per_tile",
    "with_patch_numbers",
]

#: The tower of the published LLaVA-1.5 and LLaVA-NeXT.
CLIP_CONFIG: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
#: What makes it small, for smoke tests.
NARROW_CLIP_CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 10,
    "num_attention_heads": 2,
    "projection_dim": 64,
}


class PreNormLayer(MergingLayer):
    """In front of a stock layer of CLIP's kind: merges between attention and MLP."""

    def attend(self, hidden: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As in the stock layer."""
        layer: Any = self
        mixed, _ = layer.self_attn(hidden_states=layer.layer_norm1(hidden), attention_mask=attention_mask, **kwargs)
        out: Tensor = hidden + mixed
        return out

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """As in the stock layer."""
        layer: Any = self
        out: Tensor = hidden + layer.mlp(layer.layer_norm2(hidden))
        return out


class MergingCLIPEncoderLayer(PreNormLayer, CLIPEncoderLayer):  # type: ignore[no-untyped-call]  # by the base class
    """A CLIP layer that merges between attention and MLP."""


class MergingSiglipEncoderLayer(PreNormLayer, SiglipEncoderLayer):  # type: ignore[no-untyped-call]  # likewise
    """A SigLIP layer that merges between attention and MLP."""


# `_no_split_modules` goes by name.
MergingCLIPEncoderLayer.__name__ = CLIPEncoderLayer.__name__
MergingSiglipEncoderLayer.__name__ = SiglipEncoderLayer.__name__

MERGING_LAYERS: Mapping[type[nn.Module], type[MergingLayer]] = MappingProxyType(
    {CLIPEncoderLayer: MergingCLIPEncoderLayer, SiglipEncoderLayer: MergingSiglipEncoderLayer}
)


class TowerFamily(Family):
    """A family with a CLIP or SigLIP tower and a projector that acts on each patch by itself."""

    encoder_layer_types = tuple(MERGING_LAYERS)
    other_tower = "vision_tower has {kind} layers; only CLIP and SigLIP towers can be patched; use a model with one"

    def tower(self, base: Any) -> Any:
        """The tower, wrappers included."""
        return base.vision_tower

    def layers_of(self, tower: Any) -> Sequence[nn.Module]:
        """The layers of the tower.

        Raises:
            UnsupportedModelError: it is none of CLIP's kind, such as Pixtral's.
        """
        inner = getattr(tower, "vision_model", tower)  # older releases hold a model inside
        layers: Sequence[nn.Module] | None = getattr(getattr(inner, "encoder", None), "layers", None)
        if layers is None:
            raise UnsupportedModelError(
                f"vision_tower is a {type(tower).__name__}; {self.title} can be patched with CLIP and SigLIP towers "
                "only, whose images are rows of equal length; use a model with one"
            )
        return layers

    def projector(self, base: Any) -> nn.Module:
        """The MLP between tower and decoder."""
        projector: nn.Module = base.multi_modal_projector
        return projector

    def limits(self, model: Any) -> ModelLimits:
        """Depths and tokens per tile; layers behind the chosen feature layer are of no use."""
        config = model.config
        depth = config.vision_config.num_hidden_layers
        used = max(num_used(layer, depth) for layer in picked(config.vision_feature_layer))
        llm_depth = config.text_config.num_hidden_layers
        return ModelLimits(self.name, used, llm_depth, tokens_per_tile(config), self.presets_of(model))

    def check(self, model: Any, parts: ModelParts, config: MergeConfig) -> None:
        """Also refuses feature choices that cut across merges, and layouts that nobody published."""
        super().check(model, parts, config)
        stock = model.config
        if config.vit_layers:
            depth = stock.vision_config.num_hidden_layers
            check_feature_layer(stock.vision_feature_layer, depth, config.vit_layers)
            check_strategy(stock, stock.vision_feature_select_strategy)
        if config.method.layout != "aligned":
            raise UnsupportedModelError(
                f"method {config.method.name!r} has layout {config.method.layout!r}, which nobody published for "
                f"{self.title}; use Method(..., layout='aligned')"
            )

    def change_tower(self, parts: ModelParts, session: MergeSession) -> None:
        """Swaps merging layers' classes, and hooks the tower."""
        changed = changed_layers(session.config, len(parts.encoder_layers))
        change_layers(parts.encoder_layers, changed, MERGING_LAYERS, session)
        for tower in parts.towers:
            session.hooks.around_forward(tower, TowerHook(session))

    def encoder_shape(self, model: Any) -> EncoderShape:
        """Sizes of tower and projector."""
        config = model.config
        vision, width = config.vision_config, config.text_config.hidden_size
        projector = 2 * width * (vision.hidden_size * len(picked(config.vision_feature_layer)) + width)
        # Stock runs the whole tower, also layers behind the chosen feature layer.
        return EncoderShape(
            vision.num_hidden_layers,
            vision.hidden_size,
            vision.intermediate_size,
            1,
            projector,
            prefix=class_tokens(config),
        )


class TowerFeatures:
    """Around feature methods that run the tower."""

    def __init__(self, base: Any, session: MergeSession) -> None:
        """Belongs to one model and its session."""
        self.base, self.session = base, session

    def merges(self, modality: Modality) -> bool:
        """Whether a call merges now."""
        return self.session.active and not self.session.config.schedule(modality).is_identity

    def traits(self) -> EncoderTraits:
        """Rows of single patches, behind a class token or none."""
        return EncoderTraits(prefix=class_tokens(self.base.config))

    def run(
        self,
        method: Callable[..., Any],
        run: EncoderRun | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        behind: Callable[[Any], None] | None = None,
    ) -> Any:
        """Calls the stock method with a run around it.

        Args:
            method: the stock feature method.
            run: the run; None: nothing merges.
            args: its positional arguments.
            kwargs: its keyword arguments.
            behind: what happens to the output behind its expansion.
        """
        config = self.base.config
        if run is not None and run.layers:
            call = inspect.signature(method).bind(*args, **kwargs).arguments
            chosen, strategy = (call.get(f"vision_feature_{name}") for name in ("layer", "select_strategy"))
            depth = config.vision_config.num_hidden_layers
            check_feature_layer(config.vision_feature_layer if chosen is None else chosen, depth, run.layers)
            check_strategy(config, strategy or config.vision_feature_select_strategy)

        def expand(output: Any) -> None:
            if run is not None:
                expand_output(run, output)
                if behind is not None:
                    behind(output)

        return run_features(self.session, method, args, kwargs, run, config, expand)


def tokens_per_tile(config: Any) -> int:
    """Patches of one tile."""
    return int((config.vision_config.image_size // config.vision_config.patch_size) ** 2)


def class_tokens(config: Any) -> int:
    """Tokens in front of the patches of a row: CLIP's one, SigLIP has none."""
    return int("clip" in config.vision_config.model_type and "siglip" not in config.vision_config.model_type)


def picked(chosen: Any) -> list[int]:
    """``vision_feature_layer`` as a list."""
    return [chosen] if isinstance(chosen, int) else list(chosen)


def num_used(layer: int, depth: int) -> int:
    """Encoder layers that ``hidden_states[layer]`` has gone through."""
    return layer if layer >= 0 else depth + 1 + layer


def check_feature_layer(chosen: Any, depth: int, layers: tuple[int, ...]) -> None:
    """Refuses feature layers with different numbers of merges before them, and merges that none of them sees.

    Raises:
        UnsupportedModelError: with the cure.
    """
    used = [num_used(layer, depth) for layer in picked(chosen)]
    merges = {sum(merging < layer for merging in layers) for layer in used}
    if len(merges) > 1:
        raise UnsupportedModelError(
            f"vision_feature_layer is {chosen} and spans the merging layers {list(layers)}; choose vit_layers below "
            f"{min(used)} or vit_layers=[]"
        )
    if merges != {len(layers)}:
        raise UnsupportedModelError(
            f"vision_feature_layer is {chosen}, in front of merging layers among {list(layers)}; choose vit_layers "
            f"below {min(used)} or vit_layers=[]"
        )


def check_strategy(config: Any, strategy: str) -> None:
    """Refuses features with a class token among them, and features that lack a patch.

    Raises:
        UnsupportedModelError: with the cure.
    """
    wanted = "default" if class_tokens(config) else "full"
    if strategy != wanted:
        what = "keeps the class token, which never merges" if class_tokens(config) else "drops the first patch"
        raise UnsupportedModelError(
            f"vision_feature_select_strategy is {strategy!r}, which {what}; use {wanted!r} or vit_layers=[]"
        )


def with_patch_numbers(patch: int, tiles: Tensor) -> Tensor:
    """``(T, 3, S, S)`` tiles with their patch numbers as a fourth channel.

    Pixels and numbers go through the same steps from here on, so that they cannot drift apart.
    """
    height, width = tiles.shape[-2:]
    rows, columns = height // patch, width // patch
    # Where patches do not fill the tile (384 = 27 * 14 + 6) the last ones show the rest: it belongs to none.
    down = (torch.arange(height) // patch).clamp_max(rows - 1)
    across = (torch.arange(width) // patch).clamp_max(columns - 1)
    first = torch.arange(len(tiles))[:, None, None] * (rows * columns)
    numbers = first + down[:, None] * columns + across
    return torch.cat([tiles, numbers[:, None].to(tiles)], 1)
