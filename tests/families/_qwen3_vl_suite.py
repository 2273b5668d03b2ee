"""Small models and inputs in the form that transformers' common tests ask for."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel

from families._qwen2_vl_suite import Qwen2VLTester, Qwen2VLTests
from transformers_suite.testers import IMAGE_ID, VIDEO_ID, VISION_END_ID, VISION_START_ID


class Qwen3VLTester(Qwen2VLTester):
    """An image has 6 x 6 patches, a video one slice of 4 x 4: several would need text between."""

    model_classes = (Qwen3VLModel, Qwen3VLForConditionalGeneration)
    grids = {"image_grid_thw": (1, 6, 6), "video_grid_thw": (1, 4, 4)}
    num_tokens = {name.removesuffix("_grid_thw"): math.prod(grid) // 4 for name, grid in grids.items()}
    vision_config: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "num_heads": 4,
        "patch_size": Qwen2VLTester.patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }

    def get_config(self) -> PreTrainedConfig:
        """Qwen3-VL."""
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        return Qwen3VLConfig(
            vision_config=dict(self.vision_config),
            text_config={**self.text_config, "head_dim": 8, "rope_parameters": rope},
            image_token_id=IMAGE_ID,
            video_token_id=VIDEO_ID,
            vision_start_token_id=VISION_START_ID,
            vision_end_token_id=VISION_END_ID,
            tie_word_embeddings=False,
        )


class Qwen3VLTests(Qwen2VLTests):
    """Qwen3-VL: packed as Qwen2-VL's."""
