"""Small models and inputs in the form that transformers' common tests ask for."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    PreTrainedConfig,
)

from transformers_suite.testers import IMAGE_ID, VIDEO_ID, Tester


class LlavaOnevisionTester(Tester):
    """An image is a base tile and one more of 4 x 4 patches; a video has two frames."""

    model_classes = (LlavaOnevisionModel, LlavaOnevisionForConditionalGeneration)
    num_tokens = {"image": 16 + 4 * (4 + 1), "video": 2 * 2 * 2 + 1}
    vit_r = 5
    tile = 16
    vision_config: dict[str, Any] = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": tile,
        "patch_size": 4,
        "vision_use_head": False,
    }

    def get_config(self) -> PreTrainedConfig:
        """SigLIP and Qwen2."""
        return LlavaOnevisionConfig(
            vision_config=dict(self.vision_config),
            text_config={"model_type": "qwen2", **self.text_config},
            image_token_index=IMAGE_ID,
            video_token_index=VIDEO_ID,
            image_grid_pinpoints=[[self.tile, self.tile]],
        )

    def visual_inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Tiles and frames."""
        shape = (self.batch_size, 2, 3, self.tile, self.tile)
        return {
            "pixel_values": torch.rand(shape, generator=generator),
            "image_sizes": torch.full((self.batch_size, 2), self.tile),
            "pixel_values_videos": torch.rand(shape, generator=generator),
        }


class LlavaOnevisionTests:
    """What transformers' own tests of the family say beside the common ones."""

    skip_test_image_features_output_shape = True  # its rows are tiles and frames, not images and videos
    skip_test_video_features_output_shape = True
    test_all_params_have_gradient = False  # the tower's last norm stands behind the chosen features
    additional_model_inputs = ["pixel_values", "image_sizes", "pixel_values_videos"]

    def _video_features_prepare_config_and_inputs(self) -> Any:
        config, inputs = super()._video_features_prepare_config_and_inputs()
        if "pixel_values_videos" not in signature(LlavaOnevisionModel.get_video_features).parameters:  # up to 5.17
            inputs["pixel_values"] = inputs.pop("pixel_values_videos")
        return config, inputs
