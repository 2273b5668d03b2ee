"""Gemma 3 for transformers' own model tests; its other tests are `tests/families_only/test_gemma3.py`.

What the stock model wants, learned by running it: `pixel_values` (images, 3, 16, 16), 4 placeholders for each image,
and `token_type_ids`, 1 for images, when it trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Gemma3ForConditionalGeneration

from families import Family, Suite
from tiny_models import IMAGE_ID, TEXT_CONFIG, Inputs, Sample, Side, padded, pixels, prompt_ids

SIZE, TOKENS = 16, 4


class Gemma3(Family):
    """Gemma 3."""

    title = "Gemma 3"
    model_class = Gemma3ForConditionalGeneration
    modalities = ("image",)
    vision_config = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 4,
        "vision_use_head": False,
    }
    text_config = {
        **TEXT_CONFIG,
        "head_dim": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    top_config = {"image_token_index": IMAGE_ID, "mm_tokens_per_image": TOKENS}
    suites = {"Gemma3": Suite(vit_r=4, llm_layers=())}

    def inputs(self, samples: Sequence[Sample], side: Side, model: Any) -> Inputs:
        """One picture of one size for each image."""
        rows = [prompt_ids(s, {"i": iter([[IMAGE_ID] * TOKENS] * len(s.images))}) for s in samples]
        images = [pixels(s, "i", index, (3, SIZE, SIZE)) for s in samples for index in range(len(s.images))]
        inputs = padded(rows, side)
        return {
            **inputs,
            "token_type_ids": (inputs["input_ids"] == IMAGE_ID).int(),
            "pixel_values": torch.stack(images),
        }


FAMILY = Gemma3()
