"""Small models and inputs in the form that transformers' common tests ask for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLModel

from transformers_suite.testers import IMAGE_ID, VIDEO_ID, VISION_END_ID, VISION_START_ID, Tester


class Qwen2VLTester(Tester):
    """An image has 6 x 6 patches, a video two slices of 4 x 4."""

    model_classes = (Qwen2VLModel, Qwen2VLForConditionalGeneration)
    grids = {"image_grid_thw": (1, 6, 6), "video_grid_thw": (2, 4, 4)}
    patch = 4
    num_tokens = {name.removesuffix("_grid_thw"): math.prod(grid) // 4 for name, grid in grids.items()}
    vision_config: dict[str, Any] = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }

    def get_config(self) -> PreTrainedConfig:
        """Qwen2-VL."""
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        return Qwen2VLConfig(
            vision_config=dict(self.vision_config),
            text_config={**self.text_config, "rope_parameters": rope},
            image_token_id=IMAGE_ID,
            video_token_id=VIDEO_ID,
            vision_start_token_id=VISION_START_ID,
            vision_end_token_id=VISION_END_ID,
            tie_word_embeddings=False,
        )

    def visual_inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Patches ``(rows, patches, values)``, which ``packed`` flattens; grids; token types."""
        inputs = {"mm_token_type_ids": torch.tensor([self._row()[1]] * self.batch_size)}
        for name, pixels in zip(self.grids, ("pixel_values", "pixel_values_videos"), strict=True):
            shape = (self.batch_size, math.prod(self.grids[name]), 3 * 2 * self.patch**2)
            inputs[pixels] = torch.rand(shape, generator=generator)
            inputs[name] = torch.tensor([self.grids[name]] * self.batch_size)
        return inputs


class Qwen2VLTests:
    """Qwen2-VL: patches of all rows are packed into one."""

    additional_model_inputs = [
        "pixel_values",
        "image_grid_thw",
        "pixel_values_videos",
        "video_grid_thw",
        "mm_token_type_ids",
    ]

    def _prepare_for_class(self, inputs_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return _packed(super()._prepare_for_class(inputs_dict, *args, **kwargs))

    def _image_features_prepare_config_and_inputs(self) -> Any:
        config, inputs = super()._image_features_prepare_config_and_inputs()
        return config, _packed(inputs)

    def _video_features_prepare_config_and_inputs(self) -> Any:
        config, inputs = super()._video_features_prepare_config_and_inputs()
        return config, _packed(inputs)


def _packed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Patches as the processor gives them."""
    return {
        name: value.flatten(0, 1) if name.startswith("pixel_values") and value.dim() == 3 else value
        for name, value in inputs.items()
    }
