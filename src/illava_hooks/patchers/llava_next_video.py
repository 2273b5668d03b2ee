"""LLaVA-NeXT-Video: images as LLaVA-NeXT's, frames whose patches are pooled in front of the projector."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from illava_hooks.config import MergeConfig, MergeSchedule, Modality
from illava_hooks.engine.compat import pixels_of_videos
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.family import ModelParts
from illava_hooks.engine.hookset import Hook
from illava_hooks.engine.modules import inside
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import Picture, PublishedShape, Workload
from illava_hooks.engine.transport import current_run, in_features
from illava_hooks.errors import UnsupportedModelError
from illava_hooks.patchers._anyres import AnyresFamily, AnyresFeatures
from illava_hooks.patchers._tiles import Tiles, place_video
from illava_hooks.patchers._towers import (
    CLIP_CONFIG,
    NARROW_CLIP_CONFIG,
    tokens_per_tile,
    with_patch_numbers,
)

__all__ = ["FAMILY", "LlavaNextVideo"]

# Not yet measured on trained weights.
_IMAGE = MergeSchedule((5, 6, 7, 8), 72, (8,), 0.70)
_VIDEO = MergeSchedule((3, 4, 5, 6), 72, (2,), 0.70)


class LlavaNextVideo(AnyresFamily):
    """LLaVA-NeXT-Video's family: patches merge inside of their tile or frame."""

    name = "llava_next_video"
    title = "LLaVA-NeXT-Video"
    model_types = ("llava_next_video",)
    modalities = ("image", "video")
    presets = MappingProxyType({"image": _IMAGE, "video": _VIDEO})
    shapes: Mapping[str, PublishedShape] = MappingProxyType(
        {"llava-next-video-7b": PublishedShape(4096, 11008, 32, 32, 32, "llava-hf/LLaVA-NeXT-Video-7B-hf")}
    )

    def check(self, model: Any, parts: ModelParts, config: MergeConfig) -> None:
        """Also refuses poolings of frames that are no averages."""
        super().check(model, parts, config)
        mode = model.config.spatial_pool_mode
        if config.video.merges_in_encoder and config.video.vit_layers and mode != "average":
            raise UnsupportedModelError(
                f"spatial_pool_mode is {mode!r}, behind which nothing tells how much of a token comes from survivors; "
                "use a model that takes averages, or vit_layers=[]"
            )

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """Changes the tower, wraps the feature methods, the packing and the pooling."""
        self.change_tower(parts, session)
        methods = VideoFeatures(parts.base, session)
        session.hooks.wrap(parts.base, "get_image_features", methods.image_features)
        session.hooks.wrap(parts.base, "get_video_features", methods.video_features)
        session.hooks.wrap(parts.base, "pack_image_features", methods.pack)
        for pooler in inside(parts.base.vision_resampler):
            session.hooks.before(pooler, ExpandFrames())
            session.hooks.after(pooler, FoldFrames())

    def kept_tokens(self, base: Any, config: MergeConfig, modality: Modality, shape: Sequence[int]) -> int:
        """Of an image's (tiles, height, width), newlines included, or of a video's (frames,)."""
        if modality == "image":
            return super().kept_tokens(base, config, modality, shape)
        units = self.tile_units(base, config, modality)
        return int(shape[0]) * math.ceil(tokens_per_frame(base.config) * units[-1] / units[0])

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Picture]:
        """Images as LLaVA-NeXT's, then the frames of videos."""
        found = super().pictures(model, inputs)
        if inputs.get("pixel_values_videos") is not None:
            for video in inputs["pixel_values_videos"].detach().double().cpu():
                frames = with_patch_numbers(model.config.vision_config.patch_size, video)
                found.append(Picture("video", tuple((frame,) for frame in frames)))
        return found

    def workload(self, model: Any, load: Workload, generator: torch.Generator) -> dict[str, Tensor]:
        """Tiles or frames at random."""
        if not load.frames:
            return super().workload(model, load, generator)
        config, size = model.config, model.config.vision_config.image_size
        prompt = load.prompt(config.video_token_id, load.frames * tokens_per_frame(config), 1, generator)
        pixels = torch.randn(load.batch, load.frames, 3, size, size, generator=generator)
        return {**prompt, "pixel_values_videos": pixels}

    def published_config(self, text: dict[str, Any], placeholders: Mapping[Modality, int], narrow: bool) -> Any:
        """CLIP and a Llama."""
        from transformers import LlavaNextVideoConfig

        return LlavaNextVideoConfig(
            vision_config=CLIP_CONFIG | NARROW_CLIP_CONFIG if narrow else CLIP_CONFIG,
            text_config={**text, "model_type": "llama"},
            image_token_index=placeholders["image"],
            video_token_index=placeholders["video"],
        )


class VideoFeatures(AnyresFeatures):
    """Around the feature methods of images and videos, and the packing."""

    def video_features(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``get_video_features``: same shapes, records attached."""
        if in_features():
            return method(*args, **kwargs)
        if not self.merges("video"):
            return self.run(method, None, args, kwargs)
        pixels = pixels_of_videos(inspect.signature(method).bind(*args, **kwargs).arguments)
        lengths = [tokens_per_tile(self.base.config)] * (pixels.shape[0] * pixels.shape[1])
        run = EncoderRun(self.session, "video", self.traits(), lengths, len(lengths), pixels.device)
        run.num_videos = pixels.shape[0]
        return self.run(method, run, args, kwargs)


class ExpandFrames(Hook):
    """Pre-hook of the pooling: frames get all their places back, so that stock pools what lies side by side."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Leaves the call alone where no run is under way."""
        run = current_run()
        if run is None:
            return None
        features, *rest = args
        return (Tiles.of(run, 0, len(features), features.device).expand(features), *rest), kwargs


class FoldFrames(Hook):
    """Hook behind the pooling: of each pooled frame as many tokens stay as the encoder kept."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Leaves the output alone where no run is under way."""
        run, (pooled,) = current_run(), output
        if run is None:
            return None
        tiles = Tiles.of(run, 0, len(pooled), pooled.device)
        shares = partial(average_windows, window=module.pool.kernel_size)
        tokens, run.records = place_video(run, tiles, pooled, shares, None, newlines=0)
        for record in run.records:  # all places of pooled frames go through the projector, as without merging
            record.projected = record.num_tokens
        return tokens


def average_windows(values: Tensor, window: int | tuple[int, int]) -> Tensor:
    """How much of each place is in each pooled token: ``(T, N, c)`` values of square frames to ``(T, n, c)``.

    Averages are what stock takes where survivors are pooled; where nothing merged, any pooling looks at its window.
    """
    side = math.isqrt(values.shape[1])
    frames = values.reshape(len(values), side, side, -1).permute(0, 3, 1, 2)
    return nn.functional.avg_pool2d(frames, window, window).flatten(2).transpose(1, 2)


def tokens_per_frame(config: Any) -> int:
    """Tokens of one pooled frame."""
    vision = config.vision_config
    return int((vision.image_size // vision.patch_size // config.spatial_pool_stride) ** 2)


FAMILY = LlavaNextVideo()
