"""LLaVA-1.5: CLIP with a class token, one tile per image, each patch a token; any decoder with full attention.

Models that carry the same name with a SigLIP tower (LLaVA-Interleave) are patched as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from illava_hooks.config import MergeConfig, MergeSchedule, Modality
from illava_hooks.engine.counts import encoder_counts
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.family import ModelParts
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import LmmsEval, Picture, PublishedShape, Workload
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.engine.transport import in_features
from illava_hooks.errors import InputError
from illava_hooks.patchers._blocks import tile_pictures
from illava_hooks.patchers._tiles import Tiles, place_row
from illava_hooks.patchers._towers import (
    CLIP_CONFIG,
    NARROW_CLIP_CONFIG,
    TowerFamily,
    TowerFeatures,
    class_tokens,
    tokens_per_tile,
)

__all__ = ["FAMILY", "Llava"]

# Not yet measured on trained weights.
_PRESET = MergeSchedule((5, 6, 7, 8), 72, (8,), 0.70)


class Llava(TowerFamily):
    """LLaVA-1.5's family: patches merge inside of their image."""

    name = "llava"
    title = "LLaVA-1.5"
    model_types = ("llava",)
    modalities = ("image",)
    presets = MappingProxyType({"image": _PRESET})
    shapes: Mapping[str, PublishedShape] = MappingProxyType(
        {
            "llava-1.5-7b": PublishedShape(4096, 11008, 32, 32, 32, "llava-hf/llava-1.5-7b-hf"),
            "llava-1.5-13b": PublishedShape(5120, 13824, 40, 40, 40, "llava-hf/llava-1.5-13b-hf"),
        }
    )
    lmms_eval = LmmsEval("simple.llava_hf.LlavaHf", "chat.llava_hf.LlavaHf", names_device=True)

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """Changes the tower, wraps ``get_image_features``."""
        self.change_tower(parts, session)
        session.hooks.wrap(parts.base, "get_image_features", ImageFeatures(parts.base, session))

    def kept_tokens(self, base: Any, config: MergeConfig, modality: Modality, shape: Sequence[int]) -> int:
        """Of any image: all have the size of the tower."""
        traits = EncoderTraits(prefix=class_tokens(base.config))
        return encoder_counts(config, modality, traits, tokens_per_tile(base.config)).units[-1]

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Picture]:
        """Each image as the tower sees it."""
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return []
        return tile_pictures(pixels.detach().double().cpu(), model.config.vision_config.patch_size)

    def workload(self, model: Any, load: Workload, generator: torch.Generator) -> dict[str, Tensor]:
        """Images of one tile each.

        Raises:
            InputError: a video is asked for.
        """
        if load.frames:
            raise InputError(f"frames is {load.frames}, and {self.title} takes images only; use frames 0")
        config, size = model.config, model.config.vision_config.image_size
        pixels = torch.randn(load.batch * load.images, 3, size, size, generator=generator)
        prompt = load.prompt(config.image_token_id, tokens_per_tile(config), load.images, generator)
        return {**prompt, "pixel_values": pixels}

    def published_config(self, text: dict[str, Any], placeholders: Mapping[Modality, int], narrow: bool) -> Any:
        """CLIP and a Llama."""
        from transformers import LlavaConfig

        return LlavaConfig(
            vision_config=CLIP_CONFIG | NARROW_CLIP_CONFIG if narrow else CLIP_CONFIG,
            text_config={**text, "model_type": "llama"},
            image_token_index=placeholders["image"],
        )


class ImageFeatures(TowerFeatures):
    """Around ``get_image_features``: same shapes, records attached."""

    def __call__(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One row for each image, of as many patches as its pixels give."""
        if in_features():
            return method(*args, **kwargs)
        if not self.merges("image"):
            return self.run(method, None, args, kwargs)
        call = inspect.signature(method).bind(*args, **kwargs).arguments
        pixels, patch = call["pixel_values"], self.base.config.vision_config.patch_size
        rows, columns = (side // patch for side in pixels.shape[-2:])
        lengths = [rows * columns] * len(pixels)
        run = EncoderRun(self.session, "image", self.traits(), lengths, len(lengths), pixels.device)

        def place(output: Any) -> None:
            placed = [
                place_row(run, Tiles.of(run, index, index + 1, tokens.device), tokens)
                for index, tokens in enumerate(output.pooler_output)
            ]
            output.pooler_output = [tokens for tokens, _ in placed]
            run.records = [record for _, record in placed]

        return self.run(method, run, args, kwargs, place)


FAMILY = Llava()
