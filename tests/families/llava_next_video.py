"""LLaVA-NeXT-Video: images as LLaVA-NeXT's; frames are pooled 2 x 2 in front of the projector, without newlines.

What the stock model wants, learned by running it: `pixel_values_videos` (videos, frames, 3, 32, 32), so all videos of
a batch have the same number of frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoModel,
)

from families.llava import CLIP, LLAMA, PATCHES, TILE
from families.llava_next import PINPOINTS, AnyresFamily
from tiny_models import IMAGE_ID, VIDEO_ID, Inputs, Sample, Side, build, padded, pixels, prompt_ids

#: Older releases call frames `pixel_values`.
OLD_VIDEOS = "pixel_values_videos" not in signature(LlavaNextVideoModel.get_video_features).parameters


class LlavaNextVideo(AnyresFamily):
    """LLaVA-NeXT-Video."""

    title = "LLaVA-NeXT-Video"
    modalities = ("image", "video")
    shapes = {"llava-next-video-7b": 6.9}
    stock_modules = ("llava_next_video.modeling_llava_next_video", "clip.modeling_clip", "llama.modeling_llama")

    def build(
        self,
        attn_implementation: str = "sdpa",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        vision: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> LlavaNextVideoForConditionalGeneration:
        """CLIP with 4 layers that count and 64 tokens per tile, Llama with 4 layers."""
        settings: dict[str, Any] = {
            "image_token_index": IMAGE_ID,
            "video_token_index": VIDEO_ID,
            "image_grid_pinpoints": [list(size) for size in PINPOINTS],
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
        }
        config = LlavaNextVideoConfig(
            vision_config=CLIPVisionConfig(**(CLIP | (vision or {}))),
            text_config=LlamaConfig(**(LLAMA | (text or {}))),
            **(settings | overrides),
        )
        return build(LlavaNextVideoForConditionalGeneration, config, attn_implementation, seed, dtype)

    def inputs(self, samples: Sequence[Sample], side: Side, model: Any) -> Inputs:
        """Tiles and sizes of images, frames of videos."""
        visuals, lengths = self.image_inputs_of(samples, model)
        frames = [count for sample in samples for count in sample.videos]
        pieces = {
            "i": iter([[IMAGE_ID] * length for length in lengths]),
            "v": iter([[VIDEO_ID] * (count * PATCHES // 4) for count in frames]),
        }
        inputs = {**padded([prompt_ids(sample, pieces) for sample in samples], side), **visuals}
        if frames:
            if len(set(frames)) > 1:
                raise ValueError("LLaVA-NeXT-Video wants the same number of frames in all videos of a batch")
            videos = [pixels(s, "v", i, (n, 3, TILE, TILE)) for s in samples for i, n in enumerate(s.videos)]
            inputs["pixel_values_videos"] = torch.stack(videos)
        return inputs

    def feature_arguments(self, inputs: Inputs) -> dict[str, dict[str, Any]]:
        """Older releases call the frames of videos `pixel_values`."""
        found = super().feature_arguments(inputs)
        if "video" in found and OLD_VIDEOS:
            found["video"] = {"pixel_values": inputs["pixel_values_videos"]}
        return found

    def reference_visuals(self, model: Any, inputs: Inputs, settings: Any) -> Iterable[Any]:
        """Tile by tile, frame by frame."""
        from families import _clip_reference as reference

        yield from super().reference_visuals(model, inputs, settings)
        yield from reference.pooled_videos(model, inputs, settings)

    def projected(self, model: Any, weights: Tensor, patches: Tensor) -> Tensor | None:
        """Tokens that come from no patch are newlines; biases are gone."""
        text = weights.to_dense().sum(1) < 0.5
        return torch.where(text[:, None], model.model.image_newline, self.projector(model)(weights @ patches))


FAMILY = LlavaNextVideo()
