"""A family as somebody else would write it: stock LLaVA-1.5, from the public contract alone.

CLIP puts a class token in front of its patches; stock takes the output of a layer before the last, drops that token
and projects each patch by itself. Images only, one tile each, no published code, no presets.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from illava_hooks import Family, MergeConfig, MergeSession, UnsupportedModelError
from illava_hooks.config import Modality, ModelLimits
from illava_hooks.engine.counts import encoder_counts
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.encoder_layers import MergingLayer, TowerHook, change_layers, expand_output, run_features
from illava_hooks.engine.family import ModelParts, changed_layers
from illava_hooks.engine.provenance import selection
from illava_hooks.engine.records import VisualRecord
from illava_hooks.engine.report import EncoderShape
from illava_hooks.engine.trace import token_sources, vision_tracks
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.engine.transport import in_features
from illava_hooks.merge.segments import scatter_back


class MergingCLIPEncoderLayer(MergingLayer, CLIPEncoderLayer):
    """A CLIP layer that merges between attention and MLP."""

    def attend(self: Any, hidden: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        return hidden + self.self_attn(self.layer_norm1(hidden), attention_mask=attention_mask, **kwargs)[0]

    def feed_forward(self: Any, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(self.layer_norm2(hidden))


MergingCLIPEncoderLayer.__name__ = CLIPEncoderLayer.__name__  # `_no_split_modules` goes by name


class Llava(Family):
    """LLaVA-1.5."""

    name = "llava"
    model_types = ("llava",)
    modalities = ("image",)
    encoder_layer_types = (CLIPEncoderLayer,)
    traits = EncoderTraits(prefix=1)

    def tower(self, base: Any) -> Any:
        return base.vision_tower

    def layers_of(self, tower: Any) -> Any:
        return getattr(tower, "vision_model", tower).encoder.layers  # older releases hold a model inside

    def limits(self, model: Any) -> ModelLimits:
        """Layers behind the one whose output is taken are of no use."""
        vision, chosen = model.config.vision_config, model.config.vision_feature_layer
        used = chosen if chosen >= 0 else chosen + vision.num_hidden_layers + 1
        llm_depth = model.config.text_config.num_hidden_layers
        return ModelLimits(self.name, used, llm_depth, num_patches(model.config), self.presets_of(model))

    def check(self, model: Any, parts: ModelParts, config: MergeConfig) -> None:
        super().check(model, parts, config)
        check_strategy(model.config.vision_feature_select_strategy)

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        changed = changed_layers(session.config, len(parts.encoder_layers))
        change_layers(parts.encoder_layers, changed, {CLIPEncoderLayer: MergingCLIPEncoderLayer}, session)
        for tower in parts.towers:
            session.hooks.around_forward(tower, TowerHook(session))
        session.hooks.wrap(parts.base, "get_image_features", ImageFeatures(parts.base, session, self.traits))

    def encoder_shape(self, model: Any) -> EncoderShape:
        vision, text = model.config.vision_config, model.config.text_config
        projector = 2 * text.hidden_size * (vision.hidden_size + text.hidden_size)
        return EncoderShape(vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size, 1, projector)

    def kept_tokens(self, base: Any, config: MergeConfig, modality: Modality, shape: Sequence[int]) -> int:
        return encoder_counts(config, modality, self.traits, num_patches(base.config)).units[-1]


class ImageFeatures:
    """Around ``get_image_features``: same shapes, records attached."""

    def __init__(self, base: Any, session: MergeSession, traits: EncoderTraits) -> None:
        self.base, self.session, self.traits = base, session, traits

    def __call__(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if in_features():
            return method(*args, **kwargs)
        call, session = inspect.signature(method).bind(*args, **kwargs).arguments, self.session
        run = None
        if session.active and not session.config.image.is_identity:
            check_strategy(call.get("vision_feature_select_strategy"))
            pixels, length = call["pixel_values"], num_patches(self.base.config)
            run = EncoderRun(session, "image", self.traits, [length] * len(pixels), len(pixels), pixels.device)

        def place(output: Any) -> None:
            assert run is not None
            expand_output(run, output)
            kept_at = run.final.kept_at
            tokens = zip(output.pooler_output, kept_at, strict=True)
            output.pooler_output = [scatter_back(t[None], at[None].to(t.device))[0] for t, at in tokens]
            run.records = [record(run, image) for image in range(len(kept_at))]

        return run_features(session, method, args, kwargs, run, self.base.config, place)


def record(run: EncoderRun, image: int) -> VisualRecord:
    """What the prompt must know of one image: each patch is one of its tokens, at the same place."""
    kept_at, keep = run.final.kept_at[image], run.keep_mask(run.final)[image]
    survivor_of, segments = run.final.origins[image][kept_at], run.patch_counts(image, image + 1)
    found = VisualRecord(run.modality, len(keep), keep, survivor_of, segments, run.layers)
    if run.session.config.track:
        tokens = selection(kept_at, run.final.origins.shape[1])
        found.sources = token_sources(run, image, image + 1, tokens)
        found.vision = vision_tracks(run, image, image + 1)
    return found


def num_patches(config: Any) -> int:
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def check_strategy(strategy: str | None) -> None:
    if strategy not in (None, "default"):
        raise UnsupportedModelError(f"vision_feature_select_strategy is {strategy!r}; use 'default'")
