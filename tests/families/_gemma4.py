"""Gemma 4 for transformers' own model tests; its other tests are `tests/families_only/test_gemma4.py`.

What the stock model wants, learned by running it: `pixel_values` (images, patches, values of a patch), the column and
the row of each patch, and a placeholder for each 3 x 3 patches. Videos are frames in the same form, with the number of
each one's frames; older releases give them a dimension of their own instead, and cannot join them with text.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from transformers import Gemma4ForConditionalGeneration, Gemma4Model

from families import Family, Suite
from tiny_models import IMAGE_ID, TEXT_CONFIG, VIDEO_ID, Inputs, Sample, Side, padded, pixels, prompt_ids

POOL, PATCH, TOKENS = 3, 4, 4
SIDE = POOL * 2  # patches along an image of two tokens by two
COUNTS_FRAMES = "num_frames_per_video" in signature(Gemma4Model.forward).parameters


class Gemma4(Family):
    """Gemma 4."""

    title = "Gemma 4"
    model_class = Gemma4ForConditionalGeneration
    modalities = ("image", "video") if COUNTS_FRAMES else ("image",)
    vision_config = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "patch_size": PATCH,
        "pooling_kernel_size": POOL,
        "position_embedding_size": 16,
    }
    text_config = {
        **TEXT_CONFIG,
        "head_dim": 8,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": TEXT_CONFIG["vocab_size"],
        "hidden_size_per_layer_input": 4,
        "num_kv_shared_layers": 0,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    }
    top_config = {
        "audio_config": None,
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "audio_token_id": 7,
        "boi_token_id": 3,
        "eoi_token_id": 4,
        "boa_token_id": 8,
        "eoa_token_index": 9,
    }
    image_inputs = ("pixel_values", "image_position_ids")
    video_inputs = ("pixel_values_videos", "video_position_ids", "num_frames_per_video")
    suites = {"Gemma4": Suite(vit_r=POOL**2, llm_layers=(), frames=1, rows_are_visuals=False)}

    def inputs(self, samples: Sequence[Sample], side: Side, model: Any) -> Inputs:
        """Pictures of one size, as patches; videos of one frame."""
        pieces = [
            {"i": iter([[IMAGE_ID] * TOKENS] * len(s.images)), "v": iter([[VIDEO_ID] * TOKENS] * len(s.videos))}
            for s in samples
        ]
        inputs = padded([prompt_ids(s, own) for s, own in zip(samples, pieces, strict=True)], side)
        ids, shape = inputs["input_ids"], (SIDE * SIDE, 3 * PATCH**2)
        inputs["mm_token_type_ids"] = (ids == IMAGE_ID).int() + 2 * (ids == VIDEO_ID).int()
        places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).flip(1)
        if images := [pixels(s, "i", index, shape) for s in samples for index in range(len(s.images))]:
            inputs["pixel_values"] = torch.stack(images)
            inputs["image_position_ids"] = places.repeat(len(images), 1, 1)
        if videos := [pixels(s, "v", index, shape) for s in samples for index in range(len(s.videos))]:
            lead = (len(videos),) if COUNTS_FRAMES else (len(videos), 1)
            inputs["pixel_values_videos"] = torch.stack(videos).view(*lead, *shape)
            inputs["video_position_ids"] = places.expand(*lead, *places.shape).contiguous()
            if COUNTS_FRAMES:
                inputs["num_frames_per_video"] = torch.ones(len(videos), dtype=torch.int64)
        return inputs


FAMILY = Gemma4()
