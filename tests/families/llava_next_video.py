"""LLaVA-NeXT-Video: images as LLaVA-NeXT's; frames are pooled 2 x 2 in front of the projector, without newlines.

What the stock model wants, learned by running it: `pixel_values_videos` (videos, frames, 3, 32, 32), so all videos of
a batch have the same number of frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import signature
from typing import Any

import torch
from transformers import LlavaNextVideoForConditionalGeneration, LlavaNextVideoModel

from families.llava import TILE
from families.llava_next import ANYRES_SUITE, AnyresFamily
from tiny_models import IMAGE_ID, VIDEO_ID, Inputs, Sample, Side, padded, pixels, prompt_ids

#: Older releases call frames `pixel_values`.
OLD_VIDEOS = "pixel_values_videos" not in signature(LlavaNextVideoModel.get_video_features).parameters


class LlavaNextVideo(AnyresFamily):
    """LLaVA-NeXT-Video."""

    title = "LLaVA-NeXT-Video"
    pooler_name = "vision_resampler"
    model_class = LlavaNextVideoForConditionalGeneration
    modalities = ("image", "video")
    top_config = {**AnyresFamily.top_config, "video_token_index": VIDEO_ID}
    suites = {"LlavaNextVideo": ANYRES_SUITE}
    shapes = {"llava-next-video-7b": 6.9}
    stock_modules = ("llava_next_video.modeling_llava_next_video", "clip.modeling_clip", "llama.modeling_llama")

    def inputs(self, samples: Sequence[Sample], side: Side, model: Any) -> Inputs:
        """Tiles and sizes of images, frames of videos."""
        visuals, lengths = self.image_inputs_of(samples, model)
        frames, vision = [count for sample in samples for count in sample.videos], model.config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2 // 4
        pieces = {
            "i": iter([[IMAGE_ID] * length for length in lengths]),
            "v": iter([[VIDEO_ID] * (count * tokens) for count in frames]),
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


FAMILY = LlavaNextVideo()
